"""Triton path of `vcr1_kernels.ops.softmax_rows`: a read for the statistics, a read and a write for the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.ops.softmax_rows import RowSoftmax

# Enough programs to fill any GPU: with fewer rows than this, several programs share a row.
_MIN_PROGRAMS = 1024
_DEPTH, _LANES = 4, 2048
_BLOCK = _DEPTH * _LANES
_NUM_WARPS = 8


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["columns_ptr", "parts_ptr"],
)
def _row_statistics_kernel(
    logits_ptr,
    columns_ptr,  # int64 [tokens]: the target's column in this shard, out of range if it lies in another
    parts_ptr,  # float32 [num_splits, 4, tokens]
    row_stride,
    vocab_size,
    num_rows,
    split_size,  # a multiple of DEPTH * LANES
    inverse_temperature,
    FOR_ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_ptr = logits_ptr + row * row_stride
    start = split * split_size
    exp2_scale = inverse_temperature * 1.4426950408889634  # exp(x / temperature) = exp2(x * exp2_scale)

    # Each lane has its own running maximum over DEPTH values a step, so that the loop holds no reduction across threads
    # and little more than one exponential a value. It starts at a finite number: the differences below are never NaN.
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
        if FOR_ENTROPY:
            shifted = tl.maximum((x - new_max[None, :]) * inverse_temperature, -1e30)
            lane_shifted = rescale * (lane_shifted + shift * inverse_temperature * lane_sum) + tl.sum(exp * shifted, 0)
        lane_sum = lane_sum * rescale + tl.sum(exp, 0)
        lane_max = new_max

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
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    x = tl.load(logits_ptr + row * logits_row_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    log_p = (x - tl.load(max_ptr + row)) * inverse_temperature - tl.load(log_sum_ptr + row)
    p = tl.exp2(log_p * 1.4426950408889634)
    grad_log_prob = tl.load(grad_log_probs_ptr + row)
    gradient = tl.where(columns == tl.load(columns_ptr + row), 1.0 - p, -p) * grad_log_prob
    if HAS_GRAD_ENTROPY:
        surprise = tl.maximum(log_p, -1e30) + tl.load(entropy_ptr + row)
        gradient -= tl.load(grad_entropy_ptr + row) * p * surprise
    gradient *= inverse_temperature
    tl.store(out_ptr + row * out_row_stride + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def launch_row_statistics(logits: Tensor, columns: Tensor, temperature: float, for_entropy: bool) -> Tensor:
    """Statistics of logits [tokens, vocab_shard] by splits of the vocabulary; float32 [num_splits, 4, tokens]."""
    num_rows, vocab_size = logits.shape
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
            FOR_ENTROPY=for_entropy,
            DEPTH=_DEPTH,
            LANES=_LANES,
            num_warps=_NUM_WARPS,
        )
    return parts


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
    )
