"""Rotary position embedding of queries and keys, for text and (mRoPE) for time, height and width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_last_dim, require_floating, require_shape


def mrope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = True) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their tokens (rotate-half convention).

    out = x * cos + rotate_half(x) * sin with rotate_half([a | b]) = [-b | a] (RoPE, arXiv:2104.09864). Each token and
    channel has its own angle. Multimodal RoPE, whose channel sections use the position in time, height or width
    (arXiv:2409.12191), therefore needs no case of its own: its sections are already in the tables.

    Args:
        query: [tokens, num_heads, head_dim]; head_dim is even.
        key: [tokens, num_kv_heads, head_dim].
        cos: RoPE table, [tokens, head_dim]; receives no gradient.
        sin: RoPE table, [tokens, head_dim]; receives no gradient.
        inplace: overwrite query and key. Autograd does not allow this for a leaf that requires a gradient, nor for an
            output of `torch.split`; slice the tensor instead.

    Returns:
        The rotated query and key: the same tensors if inplace, otherwise new contiguous ones.

    Raises:
        ValueError: an argument has the wrong shape, or its last dimension is not contiguous.
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
        require_contiguous_last_dim(name, tensor)
    # Two calls, because autograd does not let a function with several outputs change views in place.
    return _Rotate.apply(query, cos, sin, inplace), _Rotate.apply(key, cos, sin, inplace)


class _Rotate(torch.autograd.Function):
    """Saves only the tables: the rotation is linear, and backward multiplies by the transposed rotation matrix."""

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
    """Rotate x [tokens, heads, head_dim], or multiply it by the transposed rotation matrix, and write it to `out`.

    `out` may be x itself.
    """
    if use_triton(x):
        from vcr1_kernels.triton_ops.mrope import launch_rotate

        launch_rotate(x, cos, sin, out=out, transposed=transposed)
        return
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    # The sign of rotate_half goes into the sines, so that swapping the halves is a plain roll. The transposed matrix
    # swaps the sines of the two halves and flips their signs; the halves of a general table may differ.
    sin_first, sin_second = sin.to(compute_dtype).chunk(2, dim=-1)
    sin = torch.cat((sin_second, -sin_first) if transposed else (-sin_first, sin_second), dim=-1)
    x_float = x.to(compute_dtype)
    swapped = x_float.roll(half, -1).mul_(sin[:, None])
    if out.dtype == compute_dtype:
        torch.addcmul(swapped, x_float, cos.to(compute_dtype)[:, None], out=out)
    else:
        out.copy_(swapped.addcmul_(x_float, cos.to(compute_dtype)[:, None]))
