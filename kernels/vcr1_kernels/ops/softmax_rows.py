"""Softmax over a (sharded, temperature-scaled) vocabulary: statistics of each row of logits, and the gradient.

The log-probs, the entropy and their gradients depend on a row x of logits only through four numbers (`RowStatistics`).
The statistics of parts of the vocabulary (shards of ranks, or splits by a kernel) can be merged exactly. They are
relative to the maximum of the row, so that logits of 1e4 lose no digits: log p_j = (x_j - max) / temperature - log_sum.

`row_statistics` and `logit_gradient` have a Triton path and a PyTorch path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from vcr1_kernels.backend import use_triton
from vcr1_kernels.records import RowSoftmax, RowStatistics

# 4 MB in float32: the PyTorch path reads a block of rows several times, so the block should stay in the CPU's cache.
_BLOCK_ELEMENTS = 2**20
# Replaces log 0 = -inf in products with a probability of 0, which would otherwise be NaN.
_LOWEST_LOG = -1e30


def row_statistics(
    logits: Tensor, target_ids: Tensor, *, first_id: int, temperature: float, with_entropy: bool
) -> RowStatistics:
    """Compute the statistics of logits [tokens, vocab_shard].

    Args:
        logits: [tokens, vocab_shard], last dimension contiguous.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        first_id: vocabulary id of the first column; the columns hold consecutive ids.
        temperature: softmax temperature, > 0.
        with_entropy: compute the sum that the entropy needs.
    """
    if use_triton(logits):
        from vcr1_kernels.triton_ops.softmax_rows import launch_row_statistics

        parts = launch_row_statistics(logits, target_ids - first_id, temperature, with_entropy)
        return _merge(parts, temperature)
    compute_dtype = torch.promote_types(logits.dtype, torch.float32)
    statistics = torch.zeros(4, len(logits), dtype=compute_dtype, device=logits.device)
    for rows in _row_blocks(logits):
        block = logits[rows].to(compute_dtype)
        row_max = block.amax(-1)
        statistics[0, rows] = row_max
        statistics[3, rows] = _gather_targets(block, target_ids[rows] - first_id)
        # Subtracting a maximum of -inf would give NaN; with 0 instead, all exponentials of the row are 0.
        shifted = block - row_max.masked_fill(row_max == -torch.inf, 0)[:, None]
        if temperature != 1:
            shifted.div_(temperature)
        if with_entropy:
            exp = shifted.exp()
            statistics[2, rows] = shifted.clamp_min_(_LOWEST_LOG).mul_(exp).sum(-1)
        else:
            exp = shifted.exp_()
        statistics[1, rows] = exp.sum(-1)
    return RowStatistics(*statistics)


def row_softmax(statistics: RowStatistics, temperature: float, group: dist.ProcessGroup | None) -> RowSoftmax:
    """Merge the statistics over the vocabulary shards of `group` and compute log-probs and entropy.

    A collective, if there is a group: all of its ranks must call this function. It exchanges four numbers per token.
    """
    if group is not None:
        own_shard = torch.stack(statistics)
        num_shards = dist.get_world_size(group)
        # gloo requires the gathered tensor to be the shards concatenated along the first dimension.
        parts = own_shard.new_empty(num_shards * len(own_shard), own_shard.shape[1])
        dist.all_gather_into_tensor(parts, own_shard, group=group)
        statistics = _merge(parts.view(num_shards, *own_shard.shape), temperature)
    # A row whose logits are all -inf has no distribution: its log-probs become -inf, its entropy and gradients 0.
    empty = statistics.sum_exp == 0
    row_max, sum_exp = statistics.max.masked_fill(empty, 0), statistics.sum_exp.masked_fill(empty, 1)
    log_sum = sum_exp.log()
    log_probs = (statistics.target - row_max) / temperature - log_sum
    # H = -sum_j p_j log p_j = log_sum - sum_j p_j d_j with p_j = exp(d_j) / sum_exp
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
    """Compute the gradient of sum(grad_log_probs * log_probs + grad_entropy * entropy) with respect to the logits.

    dx_j = (grad_log_probs (1[j = target] - p_j) - grad_entropy p_j (log p_j + entropy)) / temperature.

    Args:
        logits, target_ids, first_id, temperature: as for `row_statistics`.
        softmax: softmax of the same rows over the whole vocabulary, from `row_softmax`.
        grad_log_probs: [tokens].
        grad_entropy: [tokens], or None for zeros.
        out: tensor of the shape of `logits` that receives the gradient; may be `logits` itself.

    Returns:
        `out`.
    """
    if use_triton(logits):
        from vcr1_kernels.triton_ops.softmax_rows import launch_logit_gradient

        launch_logit_gradient(
            logits, target_ids - first_id, softmax, grad_log_probs, grad_entropy, temperature, out=out
        )
        return out
    compute_dtype = softmax.max.dtype
    for rows in _row_blocks(logits):
        # Work in `out` if it already holds the logits in the right dtype, otherwise in a copy of the block.
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
            factor = log_p.clamp_min_(_LOWEST_LOG).add_(softmax.entropy[rows, None]).mul_(entropy_scale).add_(scale)
            gradient = factor.mul_(p)
        _add_at_targets(gradient, target_ids[rows] - first_id, -scale[:, 0])
        if gradient.data_ptr() != out[rows].data_ptr():
            out[rows] = gradient
    return out


def _merge(parts: Tensor, temperature: float) -> RowStatistics:
    """Merge statistics of the parts of each row, [num_parts, 4, tokens], into those of the whole row.

    Moving a part's reference from its own maximum to the row's shifts every d_j by the same amount s, so that
    sum exp(d + s) = exp(s) sum exp(d) and sum exp(d + s) (d + s) = exp(s) (sum exp(d) d + s sum exp(d)).
    """
    if len(parts) == 1:
        return RowStatistics(*parts[0])
    part_max, part_sum, part_shifted, part_target = parts.unbind(1)
    row_max = part_max.amax(0)
    # A part whose logits are all -inf contributes nothing: its sums are 0, and -inf - (-inf) would be NaN.
    shift = torch.where(part_sum > 0, (part_max - row_max) / temperature, 0)
    scale = shift.exp()
    return RowStatistics(
        row_max,
        (scale * part_sum).sum(0),
        (scale * (part_shifted + shift * part_sum)).sum(0),
        part_target.sum(0),
    )


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Yield ranges of rows that fit into the cache on a CPU; on other devices, all rows at once."""
    num_rows, num_columns = logits.shape
    rows_per_block = max(_BLOCK_ELEMENTS // max(num_columns, 1), 1) if logits.device.type == "cpu" else num_rows
    for start in range(0, num_rows, max(rows_per_block, 1)):
        yield slice(start, start + rows_per_block)


def _gather_targets(logits: Tensor, columns: Tensor) -> Tensor:
    """Return logits[row, columns[row]], or 0 where the column is in another shard; [tokens]."""
    inside = (columns >= 0) & (columns < logits.shape[1])
    targets = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, targets, 0)


def _add_at_targets(gradient: Tensor, columns: Tensor, amount: Tensor) -> None:
    """Add amount[row] to gradient[row, columns[row]] in place, except where the column is in another shard."""
    inside = (columns >= 0) & (columns < gradient.shape[1])
    gradient.scatter_add_(1, columns.clamp(0, gradient.shape[1] - 1)[:, None], (amount * inside)[:, None])
