"""Benchmark of mrope and qkv_mrope: memory-bound, every value is read once and written once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.case import Case, without_grad
from torch import Tensor
from vcr1_kernels import mrope, qkv_mrope, reference


def cases(device: torch.device) -> list[Case]:
    """Return mrope forward, and qkv_mrope forward and backward."""
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
    return [Case("mrope forward", shape, providers, min_bytes=min_bytes), _joint_case(query, key, cos, sin, shape)]


def _joint_case(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, shape: str) -> Case:
    num_tokens, num_kv_heads, head_dim = key.shape
    heads = (num_kv_heads, query.shape[1] // num_kv_heads + 2, head_dim)
    projection, bias = (
        torch.randn(size, device=query.device, dtype=query.dtype).requires_grad_()
        for size in ((num_tokens, *heads), heads)
    )
    grads = [torch.randn_like(tensor) for tensor in (query, key, key)]

    def gradients(op: Callable[..., tuple[Tensor, ...]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(projection, cos, sin, bias=bias), (projection, bias), grads)

    providers = {"vcr1_kernels": gradients(qkv_mrope), "torch": gradients(reference.qkv_mrope)}
    # Forward and backward read and write the projection; the gradient of the bias is a sum over it.
    min_bytes = (5 * projection.numel() + 2 * cos.numel()) * query.dtype.itemsize
    return Case("qkv_mrope forward+backward", shape, providers, min_bytes=min_bytes)
