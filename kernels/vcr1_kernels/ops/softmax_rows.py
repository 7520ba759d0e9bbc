"""Row statistics of a softmax over a (sharded, temperature-scaled) vocabulary, and the gradient that follows.

Everything that the log-probs, the entropy and their gradients need of a row x are four numbers, which shards and
splits of the vocabulary merge exactly. They are relative to the row's maximum, so that logits of 1e4 lose no digits:
log p_j = (x_j - max) / temperature - log_sum. Each function has a Triton and a PyTorch path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcr1_kernels.backend import use_triton

# 4 MB in float32: the PyTorch path passes over a block of rows several times while it lies in the CPU's cache.
_BLOCK_ELEMENTS = 2**20
# Stands in for log 0 where it is multiplied by a probability of 0.
_LOWEST = -1e30


class RowStatistics(NamedTuple):
    """Of the part of each row that was seen; all [tokens], float32 (float64 for float64 logits)."""

    max: Tensor  # max_j x_j
    sum_exp: Tensor  # sum_j exp(d_j) with d_j = (x_j - max) / temperature
    sum_exp_shifted: Tensor  # sum_j exp(d_j) d_j, or 0 where no entropy is wanted
    target: Tensor  # x_target, or 0 if it lies in another part


class RowSoftmax(NamedTuple):
    """The softmax of whole rows; all [tokens]."""

    max: Tensor  # max_j x_j
    log_sum: Tensor  # log sum_j exp((x_j - max) / temperature)
    log_probs: Tensor  # log p_target
    entropy: Tensor  # meaningless unless the statistics were taken for it


def row_statistics(
    logits: Tensor, target_ids: Tensor, *, first_id: int, temperature: float, for_entropy: bool
) -> RowStatistics:
    """Statistics of logits [tokens, vocab_shard], whose columns are the token ids from `first_id` on."""
    if use_triton(logits):
        from vcr1_kernels.triton_ops.softmax_rows import launch_row_statistics

        parts = launch_row_statistics(logits, target_ids - first_id, temperature, for_entropy)
        return _merge(parts, temperature)
    compute_dtype = torch.promote_types(logits.dtype, torch.float32)
    statistics = torch.zeros(4, len(logits), dtype=compute_dtype, device=logits.device)
    for rows in _row_blocks(logits):
        block = logits[rows].to(compute_dtype)
        row_max = block.amax(-1)
        statistics[0, rows] = row_max
        statistics[3, rows] = _take_targets(block, target_ids[rows] - first_id)
        shifted = block - row_max.masked_fill(row_max == -torch.inf, 0)[:, None]
        if temperature != 1:
            shifted.div_(temperature)
        if for_entropy:
            exp = shifted.exp()
            statistics[2, rows] = shifted.clamp_min_(_LOWEST).mul_(exp).sum(-1)
        else:
            exp = shifted.exp_()
        statistics[1, rows] = exp.sum(-1)
    return RowStatistics(*statistics)


def row_softmax(statistics: RowStatistics, temperature: float, group: dist.ProcessGroup | None) -> RowSoftmax:
    """Complete the statistics over the vocabulary shards of `group`, with one exchange of four numbers a row."""
    if group is not None:
        mine = torch.stack(statistics)
        num_shards = dist.get_world_size(group)
        parts = mine.new_empty(num_shards * len(mine), mine.shape[1])  # gloo wants the shards one behind the other
        dist.all_gather_into_tensor(parts, mine, group=group)
        statistics = _merge(parts.view(num_shards, *mine.shape), temperature)
    # A row whose logits are all -inf has no distribution: its log-probs become -inf, its entropy and gradients 0.
    empty = statistics.sum_exp == 0
    row_max, sum_exp = statistics.max.masked_fill(empty, 0), statistics.sum_exp.masked_fill(empty, 1)
    log_sum = sum_exp.log()
    log_probs = (statistics.target - row_max) / temperature - log_sum
    return RowSoftmax(row_max, log_sum, log_probs, log_sum - statistics.sum_exp_shifted / sum_exp)


def logit_gradient(
    logits: Tensor,
    target_ids: Tensor,
    softmax: RowSoftmax,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    *,
    first_id: int,
    temperature: float,
    out: Tensor,
) -> Tensor:
    """Gradient of sum(grad_log_probs * log_probs + grad_entropy * entropy), written to `out`, which may be `logits`.

    dx_j = (grad_log_probs (1[j = target] - p_j) - grad_entropy p_j (log p_j + entropy)) / temperature.
    """
    if use_triton(logits):
        from vcr1_kernels.triton_ops.softmax_rows import launch_logit_gradient

        launch_logit_gradient(
            logits, target_ids - first_id, softmax, grad_log_probs, grad_entropy, temperature, out=out
        )
        return out
    compute_dtype = softmax.max.dtype
    for rows in _row_blocks(logits):
        block = out[rows] if out is logits and out.dtype == compute_dtype else logits[rows].to(compute_dtype, copy=True)
        block.sub_(softmax.max[rows, None])
        if temperature != 1:
            block.div_(temperature)
        log_p = block.sub_(softmax.log_sum[rows, None])
        scale = -grad_log_probs[rows, None] / temperature
        if grad_entropy is None:
            gradient = log_p.exp_().mul_(scale)
        else:
            entropy_scale = -grad_entropy[rows, None] / temperature
            p = log_p.exp()
            slope = log_p.clamp_min_(_LOWEST).add_(softmax.entropy[rows, None]).mul_(entropy_scale).add_(scale)
            gradient = slope.mul_(p)
        _add_at_targets(gradient, target_ids[rows] - first_id, -scale[:, 0])
        if gradient.data_ptr() != out[rows].data_ptr():
            out[rows] = gradient
    return out


def _merge(parts: Tensor, temperature: float) -> RowStatistics:
    """Statistics [num_parts, 4, tokens] of the parts of each row to those of the whole."""
    if len(parts) == 1:
        return RowStatistics(*parts[0])
    part_max, part_sum, part_shifted, part_target = parts.unbind(1)
    row_max = part_max.amax(0)
    shift = torch.where(
        part_sum > 0, (part_max - row_max) / temperature, 0
    )  # a part that is all -inf contributes nothing
    scale = shift.exp()
    return RowStatistics(
        row_max,
        (scale * part_sum).sum(0),
        (scale * (part_shifted + shift * part_sum)).sum(0),
        part_target.sum(0),
    )


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    num_rows, num_columns = logits.shape
    rows_per_block = max(_BLOCK_ELEMENTS // max(num_columns, 1), 1) if logits.device.type == "cpu" else num_rows
    for start in range(0, num_rows, max(rows_per_block, 1)):
        yield slice(start, start + rows_per_block)


def _take_targets(logits: Tensor, columns: Tensor) -> Tensor:
    """logits[row, columns[row]], or 0 where the column lies in another shard; [tokens]."""
    inside = (columns >= 0) & (columns < logits.shape[1])
    taken = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, taken, 0)


def _add_at_targets(gradient: Tensor, columns: Tensor, amount: Tensor) -> None:
    inside = (columns >= 0) & (columns < gradient.shape[1])
    gradient.scatter_add_(1, columns.clamp(0, gradient.shape[1] - 1)[:, None], (amount * inside)[:, None])
