"""Triton path of `vcr1_kernels.ops.mrope`: rotary position embedding, one read and one write per value."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


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
    )
