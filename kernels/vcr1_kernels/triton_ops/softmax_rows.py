"""Triton path of `vcr1_kernels.ops.softmax_rows`.

The statistics read the logits once; the gradient reads them once and writes once. All arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.backend import on_its_gpu
from vcr1_kernels.records import RowSoftmax
from vcr1_kernels.triton_ops import FUSED

# Enough programs to fill any GPU. With fewer rows than this, the vocabulary is split among several programs per row.
_MIN_PROGRAMS = 1024
# A program reads a tile of _DEPTH x _LANES logits in each iteration.
_DEPTH, _LANES = 4, 2048
_BLOCK = _DEPTH * _LANES
_NUM_WARPS = 8


# Triton compiles a kernel again for each alignment of a pointer, and slices of packed batches start anywhere. The
# pointers to per-token tensors are excluded from this specialization; only the logits profit from it.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["columns_ptr", "parts_ptr"],
)
def _row_statistics_kernel(
    logits_ptr,
    columns_ptr,  # int64 [tokens]: the target's column in this shard; out of range if it is in another shard
    parts_ptr,  # float32 [num_splits, 4, tokens]
    row_stride,
    vocab_size,
    num_rows,
    split_size,  # a multiple of DEPTH * LANES
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Compute max, sum exp(d), sum exp(d) d and the target logit of one split of one row; see `RowStatistics`.

    Grid: (rows, splits). Columns >= vocab_size are read as -inf, so that they add nothing to the sums.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride exceeds 2^31 for large batches
    split = tl.program_id(1)
    row_ptr = logits_ptr + row * row_stride
    start = split * split_size
    exp2_scale = inverse_temperature * 1.4426950408889634  # exp(x / temperature) = exp2(x * exp2_scale)

    # Online softmax (arXiv:1805.02867) in each lane separately: the loop contains no reduction across threads, and
    # little more than one exponential per value. The running maximum starts at a finite number, not at -inf, so that
    # none of the differences below is NaN, even if all logits are -inf.
    lane_max = tl.full([LANES], -1e30, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_shifted = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for offset in range(start, start + split_size, DEPTH * LANES):
        columns = offset + tile
        x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(lane_max, tl.max(x, 0))
        shift = lane_max - new_max
        rescale = tl.exp2(shift * exp2_scale)
        exp = tl.exp2((x - new_max[None, :]) * exp2_scale)
        if WITH_ENTROPY:
            # The bound turns exp(d) d of masked logits into 0 * -1e30 = 0; 0 * -inf would be NaN. What was accumulated
            # moves to the new maximum as in `vcr1_kernels.ops.softmax_rows._merge`.
            shifted = tl.maximum((x - new_max[None, :]) * inverse_temperature, -1e30)
            lane_shifted = rescale * (lane_shifted + shift * inverse_temperature * lane_sum) + tl.sum(exp * shifted, 0)
        lane_sum = lane_sum * rescale + tl.sum(exp, 0)
        lane_max = new_max

    # Merge the lanes in the same way.
    row_max = tl.max(lane_max, 0)
    shift = lane_max - row_max
    rescale = tl.exp2(shift * exp2_scale)
    target = tl.load(columns_ptr + row)
    inside = (target >= start) & (target < tl.minimum(start + split_size, vocab_size))
    target_logit = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)

    part_ptr = parts_ptr + split.to(tl.int64) * 4 * num_rows + row
    tl.store(part_ptr, row_max)
    tl.store(part_ptr + num_rows, tl.sum(lane_sum * rescale, 0))
    tl.store(part_ptr + 2 * num_rows, tl.sum(rescale * (lane_shifted + shift * inverse_temperature * lane_sum), 0))
    tl.store(part_ptr + 3 * num_rows, target_logit)


@triton.jit(
    do_not_specialize_on_alignment=[
        "columns_ptr",
        "max_ptr",
        "log_sum_ptr",
        "entropy_ptr",
        "grad_log_probs_ptr",
        "grad_entropy_ptr",
    ]
)
def _logit_gradient_kernel(
    logits_ptr,
    out_ptr,
    columns_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    grad_log_probs_ptr,
    grad_entropy_ptr,
    logits_row_stride,
    out_row_stride,
    vocab_size,
    inverse_temperature,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute dx_j = (g (1[j = target] - p_j) - h p_j (log p_j + entropy)) / temperature for one block of one row.

    g is grad_log_probs and h is grad_entropy. Grid: (rows, column blocks). Every program writes exactly the logits that
    it has read, so `out` may be `logits`.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    x = tl.load(logits_ptr + row * logits_row_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    log_p = (x - tl.load(max_ptr + row)) * inverse_temperature - tl.load(log_sum_ptr + row)
    p = tl.exp2(log_p * 1.4426950408889634)
    grad_log_prob = tl.load(grad_log_probs_ptr + row)
    gradient = tl.where(columns == tl.load(columns_ptr + row), 1.0 - p, -p) * grad_log_prob
    if HAS_GRAD_ENTROPY:
        log_p_plus_entropy = tl.maximum(log_p, -1e30) + tl.load(entropy_ptr + row)  # finite where p = 0
        gradient -= tl.load(grad_entropy_ptr + row) * p * log_p_plus_entropy
    gradient *= inverse_temperature
    tl.store(out_ptr + row * out_row_stride + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@on_its_gpu
def launch_row_statistics(logits: Tensor, columns: Tensor, temperature: float, with_entropy: bool) -> Tensor:
    """Return the statistics of each split of logits [tokens, vocab_shard]; float32 [num_splits, 4, tokens].

    The caller merges the splits in a fixed order, so results do not depend on the order in which programs run.
    """
    num_rows, vocab_size = logits.shape
    # Splits are whole blocks, so that only the last one of a row is masked; rounding up may leave fewer of them.
    num_splits = min(-(-_MIN_PROGRAMS // max(num_rows, 1)), -(-vocab_size // _BLOCK))
    split_size = triton.cdiv(triton.cdiv(vocab_size, num_splits), _BLOCK) * _BLOCK
    num_splits = triton.cdiv(vocab_size, split_size)
    parts = torch.empty(num_splits, 4, num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _row_statistics_kernel[(num_rows, num_splits)](
            logits,
            columns,
            parts,
            logits.stride(0),
            vocab_size,
            num_rows,
            split_size,
            1 / temperature,
            WITH_ENTROPY=with_entropy,
            DEPTH=_DEPTH,
            LANES=_LANES,
            num_warps=_NUM_WARPS,
            **FUSED,
        )
    return parts


@on_its_gpu
def launch_logit_gradient(
    logits: Tensor,
    columns: Tensor,
    softmax: RowSoftmax,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    *,
    out: Tensor,
) -> None:
    """Write the gradient of logits [tokens, vocab_shard] to `out`, which may be `logits`."""
    num_rows, vocab_size = logits.shape
    if not logits.numel():
        return
    _logit_gradient_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
        logits,
        out,
        columns,
        softmax.max,
        softmax.log_sum,
        softmax.entropy,
        grad_log_probs.contiguous(),
        softmax.entropy if grad_entropy is None else grad_entropy.contiguous(),
        logits.stride(0),
        out.stride(0),
        vocab_size,
        1 / temperature,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
        **FUSED,
    )
