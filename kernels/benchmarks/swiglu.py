"""Benchmark of swiglu forward and backward: memory-bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from benchmarks.case import Case, backward
from torch import Tensor
from vcr1_kernels import swiglu


def cases(device: torch.device) -> list[Case]:
    """Return one case, forward + backward."""
    on_gpu = device.type == "cuda"
    num_tokens, ffn_size = (16384, 18944) if on_gpu else (1024, 2048)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    gate_up = torch.randn(num_tokens, 2 * ffn_size, device=device, dtype=dtype).requires_grad_()
    grad_out = torch.randn(num_tokens, ffn_size, device=device, dtype=dtype)

    def plain() -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    functions = {"vcr1_kernels": lambda: swiglu(gate_up), "torch": plain}
    if on_gpu:
        functions["torch.compile"] = torch.compile(plain)
    providers = {name: backward(lambda f=f: (f() * grad_out).sum(), gate_up) for name, f in functions.items()}
    # Forward reads two tensors of this size and writes one; backward reads three and writes two. The loss is the same
    # for all providers and is not counted.
    min_bytes = 8 * grad_out.numel() * dtype.itemsize
    return [Case("swiglu forward+backward", f"T={num_tokens} ffn={ffn_size} {dtype}", providers, min_bytes=min_bytes)]
