"""Triton path of `vcr1_kernels.ops.mrope`: rotary position embedding, one read and one write per value."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.backend import on_its_gpu
from vcr1_kernels.triton_ops import FUSED


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,  # may be x_ptr
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    cos_stride,
    sin_stride,
    num_heads,
    HALF: tl.constexpr,  # head_dim / 2
    TRANSPOSED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # HALF rounded up to a power of two
):
    """Compute out = x * cos + rotate_half(x) * sin for BLOCK_HEADS heads of one token.

    Grid: (tokens, head blocks). Every program loads both halves of its heads before it stores anything, so the kernel
    can run in place. Products and sums are float32 whatever the dtypes, and are rounded once.
    """
    token = tl.program_id(0).to(tl.int64)  # 64 bits: token * stride can exceed 2^31
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channels = tl.arange(0, BLOCK_HALF)
    inside = channels < HALF
    # The angles of a token are loaded once and used by all heads of the block.
    cos_first = tl.load(cos_ptr + token * cos_stride + channels, mask=inside).to(tl.float32)
    cos_second = tl.load(cos_ptr + token * cos_stride + HALF + channels, mask=inside).to(tl.float32)
    sin_first = tl.load(sin_ptr + token * sin_stride + channels, mask=inside).to(tl.float32)
    sin_second = tl.load(sin_ptr + token * sin_stride + HALF + channels, mask=inside).to(tl.float32)
    if TRANSPOSED:  # the matrix [[cos_1, -sin_1], [sin_2, cos_2]] becomes [[cos_1, sin_2], [-sin_1, cos_2]]
        sin_first, sin_second = -sin_second, -sin_first

    mask = (heads < num_heads)[:, None] & inside[None, :]
    x_offsets = token * x_token_stride + heads[:, None] * x_head_stride + channels[None, :]
    first = tl.load(x_ptr + x_offsets, mask=mask).to(tl.float32)
    second = tl.load(x_ptr + x_offsets + HALF, mask=mask).to(tl.float32)
    new_first = first * cos_first[None, :] - second * sin_first[None, :]
    new_second = second * cos_second[None, :] + first * sin_second[None, :]
    out_offsets = token * out_token_stride + heads[:, None] * out_head_stride + channels[None, :]
    tl.store(out_ptr + out_offsets, new_first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + out_offsets + HALF, new_second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_halves(ptr, mask, HALF: tl.constexpr):
    """Load the first and the second halves of heads as float32."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32), tl.load(ptr + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _qkv_kernel(
    joint_ptr,  # contiguous [tokens, NUM_KV_HEADS, HEADS_PER_KV_HEAD + 2, head_dim]
    bias_ptr,  # contiguous, like one token of `joint`
    query_ptr,  # contiguous [tokens, NUM_KV_HEADS * HEADS_PER_KV_HEAD, head_dim]
    key_ptr,  # [tokens, NUM_KV_HEADS, head_dim], like value; the heads of a token are contiguous
    value_ptr,
    cos_ptr,  # contiguous [tokens, head_dim], like sin
    sin_ptr,
    key_token_stride,
    value_token_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2
    HAS_BIAS: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # HALF rounded up to a power of two
):
    """Rotate BLOCK_HEADS heads of one token on their way from `joint` to query, key and value.

    JOIN is the backward pass: it multiplies by the transposed rotation matrix, from query, key and value to `joint`.
    Heads are numbered as in `joint`. A value is not rotated: its angle is 0. Grid: (tokens, head blocks).
    """
    token = tl.program_id(0).to(tl.int64)  # 64 bits: token * stride can exceed 2^31
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    channels = tl.arange(0, BLOCK_HALF)
    inside = channels < HALF
    num_heads: tl.constexpr = NUM_KV_HEADS * (HEADS_PER_KV_HEAD + 2)
    mask = (heads < num_heads)[:, None] & inside[None, :]
    kv_head, slot = heads // (HEADS_PER_KV_HEAD + 2), heads % (HEADS_PER_KV_HEAD + 2)
    is_query, is_value = slot < HEADS_PER_KV_HEAD, slot == HEADS_PER_KV_HEAD + 1

    joint = joint_ptr + (token * num_heads + heads[:, None]) * 2 * HALF + channels[None, :]
    query_head = token * NUM_KV_HEADS * HEADS_PER_KV_HEAD + kv_head * HEADS_PER_KV_HEAD + slot
    key = key_ptr + token * key_token_stride + kv_head[:, None] * 2 * HALF + channels[None, :]
    value = value_ptr + token * value_token_stride + kv_head[:, None] * 2 * HALF + channels[None, :]
    split = tl.where(is_value[:, None], value, key)
    split = tl.where(is_query[:, None], query_ptr + query_head[:, None] * 2 * HALF + channels[None, :], split)

    first, second = _load_halves(split if JOIN else joint, mask, HALF)
    if HAS_BIAS:
        first_bias, second_bias = _load_halves(bias_ptr + heads[:, None] * 2 * HALF + channels[None, :], mask, HALF)
        first, second = first + first_bias, second + second_bias
    cos_first, cos_second = _load_halves(cos_ptr + token * 2 * HALF + channels, inside, HALF)
    sin_first, sin_second = _load_halves(sin_ptr + token * 2 * HALF + channels, inside, HALF)
    if JOIN:  # the transposed matrix, as in `_rotate_kernel`
        sin_first, sin_second = -sin_second, -sin_first
    is_rotated = (slot <= HEADS_PER_KV_HEAD)[:, None]
    new_first = tl.where(is_rotated, first * cos_first[None, :] - second * sin_first[None, :], first)
    new_second = tl.where(is_rotated, second * cos_second[None, :] + first * sin_second[None, :], second)
    target = joint if JOIN else split
    tl.store(target, new_first.to(joint_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, new_second.to(joint_ptr.dtype.element_ty), mask=mask)


@on_its_gpu
def launch_rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, transposed: bool) -> None:
    """Write the rotation of x [tokens, heads, head_dim] to `out`, which may be x."""
    num_tokens, num_heads, head_dim = x.shape
    if not x.numel():
        return
    block_heads = min(triton.next_power_of_2(num_heads), 32)
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        cos.stride(0),
        sin.stride(0),
        num_heads,
        HALF=head_dim // 2,
        TRANSPOSED=transposed,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        **FUSED,
    )


@on_its_gpu
def launch_split(
    joint: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """Write the heads of a projection, with its bias, to query, key and value, and rotate query and key."""
    bias = None if bias is None else bias.contiguous()
    _launch_qkv(joint.contiguous(), bias, query, key, value, cos, sin, join=False)


@on_its_gpu
def launch_join(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, joint: Tensor) -> None:
    """Write the gradient of `launch_split`'s projection to `joint`, given those of query, key and value."""
    _launch_qkv(joint, None, query.contiguous(), key.contiguous(), value.contiguous(), cos, sin, join=True)


def _launch_qkv(
    joint: Tensor,
    bias: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    join: bool,
) -> None:
    if not joint.numel():
        return
    num_tokens, num_kv_heads, num_slots, head_dim = joint.shape
    num_heads = num_kv_heads * num_slots
    block_heads = min(triton.next_power_of_2(num_heads), 16)
    _qkv_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        joint,
        bias,
        query,
        key,
        value,
        cos.contiguous(),
        sin.contiguous(),
        key.stride(0),
        value.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEADS_PER_KV_HEAD=num_slots - 2,
        HALF=head_dim // 2,
        HAS_BIAS=bias is not None,
        JOIN=join,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        **FUSED,
    )
