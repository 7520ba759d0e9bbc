"""Benchmark of shared_prefix_attention: a GRPO group, compared with attention that repeats the prompt per response."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmarks.case import Case, backward, is_installed, without_grad
from torch import Tensor
from vcr1_kernels import SegmentLayout, shared_prefix_attention


def cases(device: torch.device) -> list[Case]:
    """Return the cases for one group, forward and forward + backward."""
    on_gpu = device.type == "cuda"
    prompt, group_size, response, num_heads, num_kv_heads, head_dim = (
        (4096, 8, 256, 28, 4, 128) if on_gpu else (512, 8, 64, 8, 2, 64)
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layout = SegmentLayout((prompt, *[response] * group_size), (-1, *[0] * group_size))
    shared = [
        torch.randn(layout.num_tokens, heads, head_dim, device=device, dtype=dtype).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    unshared = [_repeat_prompt(tensor, layout).requires_grad_() for tensor in shared]
    length = prompt + response

    def ours() -> Tensor:
        return shared_prefix_attention(*shared, layout)

    def sdpa() -> Tensor:
        query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in unshared)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    functions: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "vcr1_kernels": (ours, shared),
        "torch SDPA, prompt repeated": (sdpa, unshared),
    }
    if on_gpu:
        functions["FlexAttention, same mask"] = (_flex_attention(shared, layout), shared)
        if is_installed("flash_attn"):
            functions["flash-attn varlen, prompt repeated"] = (_flash_attention(unshared, length), unshared)
    num_pairs = prompt**2 / 2 + group_size * response * (prompt + response / 2)  # of a query and a visible key
    forward_flops = int(4 * num_pairs * num_heads * head_dim)
    shape = f"P={prompt} G={group_size} R={response} heads={num_heads}/{num_kv_heads} d={head_dim} {dtype}"
    steps = {name: backward(lambda f=f: f().sum(), *leaves) for name, (f, leaves) in functions.items()}
    return [
        Case(
            "shared_prefix_attention forward",
            shape,
            {name: without_grad(function) for name, (function, _) in functions.items()},
            flops=forward_flops,
        ),
        Case("shared_prefix_attention forward+backward", shape, steps, flops=int(3.5 * forward_flops)),
    ]


def _repeat_prompt(tensor: Tensor, layout: SegmentLayout) -> Tensor:
    """Return G sequences prompt + response, one after the other, from the packed group."""
    prompt, *responses = tensor.detach().split(list(layout.lengths))
    return torch.cat([part for response in responses for part in (prompt, response)])


def _flex_attention(inputs: list[Tensor], layout: SegmentLayout) -> Callable[[], Tensor]:
    """Return FlexAttention with a block mask equal to the layout's."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = inputs[0].device
    segment = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths)).to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((segment[query] == segment[key]) | (segment[key] == 0))

    mask = create_block_mask(visible, None, None, layout.num_tokens, layout.num_tokens, device=device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(*(x.transpose(0, 1)[None] for x in inputs), block_mask=mask, enable_gqa=True)


def _flash_attention(inputs: list[Tensor], length: int) -> Callable[[], Tensor]:
    """Return flash-attn on the sequences with the repeated prompt, each `length` tokens long."""
    from flash_attn import flash_attn_varlen_func

    bounds = torch.arange(0, len(inputs[0]) + 1, length, dtype=torch.int32, device=inputs[0].device)
    return lambda: flash_attn_varlen_func(*inputs, bounds, bounds, length, length, causal=True)
