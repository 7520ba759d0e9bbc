"""Benchmark of mrope: memory-bound, queries and keys are read once and written once."""

from __future__ import annotations

import torch
from benchmarks.case import Case, without_grad
from vcr1_kernels import mrope, reference


def cases(device: torch.device) -> list[Case]:
    """Return one case, forward only."""
    on_gpu = device.type == "cuda"
    num_tokens, num_heads, num_kv_heads, head_dim = (16384, 28, 4, 128) if on_gpu else (2048, 8, 2, 64)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    query = torch.randn(num_tokens, num_heads, head_dim, device=device, dtype=dtype)
    key = torch.randn(num_tokens, num_kv_heads, head_dim, device=device, dtype=dtype)
    angles = torch.randn(num_tokens, head_dim // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    providers = {
        "vcr1_kernels": without_grad(lambda: mrope(query, key, cos, sin)),
        "torch": without_grad(lambda: reference.mrope(query, key, cos, sin)),
    }
    if on_gpu:
        compiled = torch.compile(reference.mrope)
        providers["torch.compile"] = without_grad(lambda: compiled(query, key, cos, sin))
    min_bytes = 2 * (query.numel() + key.numel() + cos.numel()) * dtype.itemsize
    shape = f"T={num_tokens} heads={num_heads}/{num_kv_heads} d={head_dim} {dtype}"
    return [Case("mrope forward", shape, providers, min_bytes=min_bytes)]
