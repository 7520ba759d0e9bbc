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


def qkv_mrope(projection: Tensor, cos: Tensor, sin: Tensor, *, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split a joint projection into query, key and value, after adding its bias, and rotate query and key.

    On a GPU, one kernel reads and writes every value once. With separate operators, the bias, the copy of the query to
    contiguous memory, the rotation and the copy of the value each do that.

    Args:
        projection: [tokens, num_kv_heads, heads_per_kv_head + 2, head_dim], Megatron's layout: for each key-value head,
            the query heads that share it, the key and the value. head_dim is even.
        cos: RoPE table as for `mrope`, [tokens, head_dim]; receives no gradient.
        sin: RoPE table, [tokens, head_dim]; receives no gradient.
        bias: added to the projection of each token, [num_kv_heads, heads_per_kv_head + 2, head_dim].

    Returns:
        The rotated query [tokens, num_kv_heads * heads_per_kv_head, head_dim], contiguous, the rotated key and the
        value, both [tokens, num_kv_heads, head_dim] and views of one tensor. All in the projection's dtype.

    Raises:
        ValueError: an argument has the wrong shape.
    """
    require_shape("projection", projection, "tokens", "num_kv_heads", "heads_per_kv_head + 2", "head_dim")
    num_tokens, num_kv_heads, num_slots, head_dim = projection.shape
    if head_dim % 2 or num_slots < 3:
        raise ValueError(f"a projection needs an even head_dim and at least 3 heads, got {list(projection.shape)}")
    for name, tensor in (("projection", projection), ("cos", cos), ("sin", sin)):
        require_floating(name, tensor)
    for name, angles in (("cos", cos), ("sin", sin)):
        require_shape(name, angles, num_tokens, head_dim)
    if bias is not None:
        require_shape("bias", bias, num_kv_heads, num_slots, head_dim)
    return _QkvRotate.apply(projection, bias, cos, sin)


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


class _QkvRotate(torch.autograd.Function):
    """Saves only the tables, like `_Rotate`: nothing of the projection is kept for backward."""

    @staticmethod
    def forward(ctx: Any, projection: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.bias_dtype = None if bias is None else bias.dtype
        num_tokens, num_kv_heads, num_slots, head_dim = projection.shape
        query = projection.new_empty(num_tokens, num_kv_heads * (num_slots - 2), head_dim)
        key, value = projection.new_empty(num_tokens, 2 * num_kv_heads, head_dim).chunk(2, dim=1)
        if use_triton(projection):
            from vcr1_kernels.triton_ops.mrope import launch_split

            launch_split(projection, bias, cos, sin, query, key, value)
            return query, key, value
        if bias is not None:
            projection = projection + bias
        _rotate(projection[:, :, :-2], cos, sin, out=query.unflatten(1, (num_kv_heads, -1)), transposed=False)
        _rotate(projection[:, :, -2], cos, sin, out=key, transposed=False)
        value.copy_(projection[:, :, -1])
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        num_tokens, num_kv_heads, head_dim = grad_key.shape
        grad = grad_query.new_empty(num_tokens, num_kv_heads, grad_query.shape[1] // num_kv_heads + 2, head_dim)
        if use_triton(grad_query):
            from vcr1_kernels.triton_ops.mrope import launch_join

            launch_join(grad_query, grad_key, grad_value, cos, sin, grad)
        else:
            _rotate(grad_query.unflatten(1, (num_kv_heads, -1)), cos, sin, out=grad[:, :, :-2], transposed=True)
            _rotate(grad_key, cos, sin, out=grad[:, :, -2], transposed=True)
            grad[:, :, -1] = grad_value
        grad_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_bias, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, transposed: bool) -> None:
    """Rotate x [tokens, ..., head_dim], or multiply it by the transposed rotation matrix, and write it to `out`.

    `out` may be x itself. The Triton kernel needs [tokens, heads, head_dim].
    """
    if use_triton(x):
        from vcr1_kernels.triton_ops.mrope import launch_rotate

        launch_rotate(x, cos, sin, out=out, transposed=transposed)
        return
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    cos, sin = (table.view(len(table), *(1,) * (x.dim() - 2), 2 * half) for table in (cos, sin))
    # The sign of rotate_half goes into the sines, so that swapping the halves is a plain roll. The transposed matrix
    # swaps the sines of the two halves and flips their signs; the halves of a general table may differ.
    sin_first, sin_second = sin.to(compute_dtype).chunk(2, dim=-1)
    sin = torch.cat((sin_second, -sin_first) if transposed else (-sin_first, sin_second), dim=-1)
    x_float = x.to(compute_dtype)
    swapped = x_float.roll(half, -1).mul_(sin)
    if out.dtype == compute_dtype:
        torch.addcmul(swapped, x_float, cos.to(compute_dtype), out=out)
    else:
        out.copy_(swapped.addcmul_(x_float, cos.to(compute_dtype)))
