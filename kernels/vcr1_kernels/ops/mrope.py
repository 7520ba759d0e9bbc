"""Rotary position embedding of queries and keys, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_rows, require_floating, require_shape


def mrope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate query and key in place by each token's angles (rotate-half convention).

    out = x * cos + rotate_half(x) * sin with rotate_half([a | b]) = [-b | a]. The angles are one per token and channel,
    so that multimodal RoPE, whose sections take the time, height or width position, needs nothing more here.

    Args:
        query: [tokens, num_heads, head_dim], head_dim even; overwritten. A leaf that requires a gradient cannot be, nor
            one of the outputs of `torch.split`: slice instead.
        key: [tokens, num_kv_heads, head_dim]; overwritten.
        cos: [tokens, head_dim], no gradient.
        sin: [tokens, head_dim], no gradient.

    Returns:
        The same query and key tensors.

    Raises:
        ValueError: misshapen or non-contiguous input.
    """
    require_shape("query", query, "tokens", "num_heads", "head_dim")
    num_tokens, _, head_dim = query.shape
    require_shape("key", key, num_tokens, "num_kv_heads", head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    for name, angles in (("cos", cos), ("sin", sin)):
        require_shape(name, angles, num_tokens, head_dim)
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require_floating(name, tensor)
        require_contiguous_rows(name, tensor)
    # One op each: autograd allows in-place changes of views only to functions of one output.
    return _RotateInPlace.apply(query, cos, sin), _RotateInPlace.apply(key, cos, sin)


class _RotateInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        _rotate(x, cos, sin, out=x, transposed=False)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_input = torch.empty_like(grad_output)
        _rotate(grad_output, cos, sin, out=grad_input, transposed=True)
        return grad_input, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, transposed: bool) -> None:
    """Write the rotation of x [tokens, heads, head_dim], or with the transposed matrix, to `out`, which may be x."""
    if use_triton(x):
        from vcr1_kernels.triton_ops.mrope import launch_rotate

        launch_rotate(x, cos, sin, out=out, transposed=transposed)
        return
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(compute_dtype).chunk(2, dim=-1)
    cos_first, cos_second = cos.to(compute_dtype)[:, None].chunk(2, dim=-1)
    sin_first, sin_second = sin.to(compute_dtype)[:, None].chunk(2, dim=-1)
    if transposed:
        sin_first, sin_second = -sin_second, -sin_first
    new_first, new_second = first * cos_first - second * sin_first, second * cos_second + first * sin_second
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.copy_(new_first)
    out_second.copy_(new_second)
