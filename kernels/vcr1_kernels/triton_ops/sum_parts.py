"""Sum of the parts of a gradient that several programs computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.triton_ops import FUSED


def sum_parts(parts: Tensor, num_parts: int, dtype: torch.dtype) -> Tensor:
    """Add consecutive parts in float32, in their order.

    Args:
        parts: float32 [tokens, heads * num_parts, head_dim], contiguous.
        dtype: dtype of the result.

    Returns:
        [tokens, heads, head_dim].
    """
    num_tokens, num_all_parts, head_dim = parts.shape
    total = torch.empty(num_tokens, num_all_parts // num_parts, head_dim, dtype=dtype, device=parts.device)
    num_rows, block_rows = num_tokens * total.shape[1], 16
    _sum_parts_kernel[(triton.cdiv(num_rows, block_rows),)](
        parts,
        total,
        num_rows,
        NUM_PARTS=num_parts,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        **FUSED,
    )
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _sum_parts_kernel(
    parts_ptr,  # float32, contiguous [rows, NUM_PARTS, HEAD_DIM]; a row is a head of a token
    total_ptr,  # contiguous [rows, HEAD_DIM]
    num_rows,
    NUM_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,  # HEAD_DIM rounded up to a power of two
):
    """Add the parts of a block of rows. Grid: (row blocks,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    channels = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (rows < num_rows) & (channels < HEAD_DIM)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + (rows * NUM_PARTS + part) * HEAD_DIM + channels, mask=mask, other=0.0)
    tl.store(total_ptr + rows * HEAD_DIM + channels, total.to(total_ptr.dtype.element_ty), mask=mask)
