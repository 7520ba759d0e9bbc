"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_rows, require_floating, require_shape


def mrope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = True) -> tuple[Tensor, Tensor]:
    """Rotate query and key by each token's angles (rotate-half convention).

    out = x * cos + rotate_half(x) * sin with rotate_half([a | b]) = [-b | a]. The angles are one per token and channel,
    so that multimodal RoPE, whose sections take the time, height or width position, needs nothing more here.

    Args:
        query: [tokens, num_heads, head_dim], head_dim even.
        key: [tokens, num_kv_heads, head_dim].
        cos: [tokens, head_dim], no gradient.
        sin: [tokens, head_dim], no gradient.
        inplace: overwrite query and key. A leaf that requires a gradient cannot be, nor one of the outputs of
            `torch.split`: slice instead.

    Returns:
        The same query and key tensors, or new contiguous ones.

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
    return _Rotate.apply(query, cos, sin, inplace), _Rotate.apply(key, cos, sin, inplace)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if inplace:
            ctx.mark_dirty(x)
        out = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _rotate(x, cos, sin, out=out, transposed=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_input = torch.empty_like(grad_output)
        _rotate(grad_output, cos, sin, out=grad_input, transposed=True)
        return grad_input, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, transposed: bool) -> None:
    """Write the rotation of x [tokens, heads, head_dim], or with the transposed matrix, to `out`, which may be x."""
    if use_triton(x):
        from vcr1_kernels.triton_ops.mrope import launch_rotate

        launch_rotate(x, cos, sin, out=out, transposed=transposed)
        return
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    sin_first, sin_second = sin.to(compute_dtype).chunk(2, dim=-1)
    sin = torch.cat((sin_second, -sin_first) if transposed else (-sin_first, sin_second), dim=-1)
    wide = x.to(compute_dtype)
    turned = wide.roll(half, -1).mul_(sin[:, None])
    if out.dtype == compute_dtype:
        torch.addcmul(turned, wide, cos.to(compute_dtype)[:, None], out=out)
    else:
        out.copy_(turned.addcmul_(wide, cos.to(compute_dtype)[:, None]))
