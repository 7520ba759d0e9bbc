"""Log-probabilities of given tokens from hidden states, without ever storing the logits whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.checks import (
    require_contiguous_rows,
    require_floating,
    require_shape,
    require_temperature,
    require_token_ids,
)
from vcr1_kernels.ops.softmax_rows import RowSoftmax, RowStatistics, logit_gradient, row_softmax, row_statistics

# Workspace for one chunk of logits. On a GPU the matrix products lose rate below some thousand rows; on a CPU the chunk
# should stay near the last-level cache.
_GPU_CHUNK_BYTES = 1280 * 2**20
_CPU_CHUNK_BYTES = 16 * 2**20


@overload
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = ...,
    group: dist.ProcessGroup | None = ...,
    return_entropy: Literal[False] = ...,
    weight_grad: Tensor | None = ...,
) -> Tensor: ...
@overload
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = ...,
    group: dist.ProcessGroup | None = ...,
    return_entropy: Literal[True],
    weight_grad: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    weight_grad: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under softmax(hidden @ weight.T / temperature).

    The logits exist a chunk of tokens at a time, in hidden's dtype; backward computes them again.

    Args:
        hidden: [tokens, hidden_size]; with a group, the same on every rank.
        weight: [vocab_shard, hidden_size], in hidden's dtype; with a group, rank r holds the r-th equal shard.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        temperature: the softmax temperature, > 0.
        group: tensor-parallel process group, or None if the vocabulary is whole.
        return_entropy: also return the entropy of each row's distribution, with its gradient.
        weight_grad: float32 (float64 for float64 weights), of weight's shape: backward adds the gradient of weight
            here, and autograd hears nothing of it. It spares a tensor of this size and a pass over it.

    Returns:
        float32 [tokens] (float64 for float64 inputs), and the entropy, [tokens], if asked. The gradient of `hidden` is
        complete on every rank (reduced over the group), the gradient of `weight` is the shard's.

    Raises:
        ValueError: misshapen input, two dtypes, or a target outside the vocabulary.
    """
    check_head(hidden, weight, target_ids, temperature, group, weight_grad)
    log_probs, entropy = _LinearLogProbs.apply(
        hidden, weight, target_ids, temperature, group, return_entropy, weight_grad
    )
    return (log_probs, entropy) if return_entropy else log_probs


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    weight_grad: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of a language-model head fit together."""
    require_shape("hidden", hidden, "tokens", "hidden_size")
    require_shape("weight", weight, "vocab_shard", hidden.shape[1])
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        require_floating(name, tensor)
        require_contiguous_rows(name, tensor)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast them to one dtype")
    num_shards = dist.get_world_size(group) if group is not None else 1
    require_token_ids("target_ids", target_ids, len(hidden), len(weight) * num_shards)
    require_temperature(temperature)
    if weight_grad is not None:
        require_shape("weight_grad", weight_grad, *weight.shape)


def first_token_id(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """The vocabulary id of this rank's first row of `weight`."""
    return dist.get_rank(group) * len(weight) if group is not None else 0


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits [chunk, vocab_shard], chunk by chunk in one buffer: the next chunk overwrites the last."""
    chunk_bytes = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _GPU_CHUNK_BYTES
    max_rows = max(chunk_bytes // max(len(weight) * hidden.element_size(), 1), 1)
    num_chunks = -(-len(hidden) // max_rows)
    buffer = hidden.new_empty(-(-len(hidden) // max(num_chunks, 1)), len(weight))
    for start in range(0, len(hidden), max(len(buffer), 1)):
        rows = slice(start, min(start + len(buffer), len(hidden)))
        yield rows, torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - start])


class HeadGradients:
    """Gradients of hidden and weight, accumulated in float32 from chunks of the logits' gradient.

    One that is not needed (a frozen head) is None, and costs no product. With `weight_grad`, weight's is added to that
    and is None here.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        group: dist.ProcessGroup | None,
        *,
        needs_hidden: bool,
        needs_weight: bool,
        weight_grad: Tensor | None = None,
    ) -> None:
        self._inputs, self._group = (hidden, weight), group
        accumulate_dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Without shards a row's gradient is one product, which accumulates in float32 by itself.
        hidden_dtype = hidden.dtype if group is None else accumulate_dtype
        self.hidden = torch.empty_like(hidden, dtype=hidden_dtype) if needs_hidden else None
        self._weight_total = None
        if needs_weight:
            self._weight_total = (
                torch.zeros_like(weight, dtype=accumulate_dtype) if weight_grad is None else weight_grad
            )
        self.weight = self._weight_total if weight_grad is None else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """Take in the gradient of the logits of `rows`, [chunk, vocab_shard]."""
        hidden, weight = self._inputs
        if self.hidden is not None:
            if self.hidden.dtype == grad_logits.dtype:
                torch.mm(grad_logits, weight, out=self.hidden[rows])
            else:
                self.hidden[rows] = _mm_float32(grad_logits, weight)
        if self._weight_total is not None:
            _addmm_float32_(self._weight_total, grad_logits.t(), hidden[rows])

    def reduce(self) -> None:
        """Complete hidden's gradient over the vocabulary shards."""
        if self.hidden is not None and self._group is not None:
            dist.all_reduce(self.hidden, group=self._group)


def _mm_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of half-precision matrices, not rounded from the accumulator's float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _addmm_float32_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in total's precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.temperature, ctx.group, ctx.weight_grad = temperature, group, weight_grad
        ctx.first_id = first_token_id(weight, group)
        ctx.set_materialize_grads(False)
        compute_dtype = torch.promote_types(hidden.dtype, torch.float32)
        statistics = torch.empty(4, len(hidden), dtype=compute_dtype, device=hidden.device)
        for rows, logits in logit_chunks(hidden, weight):
            chunk = row_statistics(
                logits, target_ids[rows], first_id=ctx.first_id, temperature=temperature, for_entropy=with_entropy
            )
            statistics[:, rows] = torch.stack(chunk)
        softmax = row_softmax(RowStatistics(*statistics), temperature, group)
        ctx.save_for_backward(hidden, weight, target_ids, *softmax)
        return softmax.log_probs, softmax.entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target_ids, *columns = ctx.saved_tensors
        softmax = RowSoftmax(*columns)
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(softmax.max)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        gradients = HeadGradients(
            hidden,
            weight,
            ctx.group,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            weight_grad=ctx.weight_grad,
        )
        for rows, logits in logit_chunks(hidden, weight):
            grad_logits = logit_gradient(
                logits,
                target_ids[rows],
                RowSoftmax(*(column[rows] for column in softmax)),
                grad_log_probs[rows],
                None if grad_entropy is None else grad_entropy[rows],
                first_id=ctx.first_id,
                temperature=ctx.temperature,
                out=logits,
            )
            gradients.add(rows, grad_logits)
        gradients.reduce()
        grads = (None if grad is None else grad.to(hidden.dtype) for grad in (gradients.hidden, gradients.weight))
        return *grads, *(None,) * 5
