"""Log-probs of target tokens from hidden states; the logits exist only one chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.checks import (
    require_contiguous_last_dim,
    require_floating,
    require_shape,
    require_temperature,
    require_token_ids,
)
from vcr1_kernels.ops.softmax_rows import logit_gradient, row_softmax, row_statistics
from vcr1_kernels.records import RowSoftmax, RowStatistics

# Size of the buffer for one chunk of logits. On a GPU, matmuls slow down below a few thousand rows; on a CPU, a chunk
# should fit roughly into the last-level cache, because it is read several times.
GPU_CHUNK_BYTES = 1280 * 2**20
CPU_CHUNK_BYTES = 16 * 2**20


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
    """Compute the log-prob of each target token under softmax(hidden @ weight.T / temperature).

    The logits exist one chunk of tokens at a time, in hidden's dtype; backward recomputes them.

    Args:
        hidden: [tokens, hidden_size]; with a group, the same on every rank.
        weight: [vocab_shard, hidden_size], in hidden's dtype; with a group, rank r holds the r-th equal shard.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        temperature: softmax temperature, > 0.
        group: tensor-parallel process group, or None if the vocabulary is not sharded. All of its ranks must call this
            function and its backward, which run collectives.
        return_entropy: also return the entropy of each token's distribution, with its gradient.
        weight_grad: buffer of weight's shape, in its dtype or a higher precision. Backward adds the gradient of weight
            to it and returns none to autograd, which saves a tensor of this size and a pass over it.

    Returns:
        Log-probs, float32 [tokens] (float64 for float64 inputs), and with return_entropy the entropy, [tokens]. The
        gradient of `hidden` is complete on every rank (reduced over the group); the gradient of `weight` is that of the
        shard.

    Raises:
        ValueError: an argument has the wrong shape, hidden and weight have different dtypes, or a target is outside the
            vocabulary.
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
        require_contiguous_last_dim(name, tensor)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast them to one dtype")
    num_shards = dist.get_world_size(group) if group is not None else 1
    require_token_ids("target_ids", target_ids, len(hidden), len(weight) * num_shards)
    require_temperature(temperature)
    if weight_grad is not None:
        require_shape("weight_grad", weight_grad, *weight.shape)


def first_token_id(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Return the vocabulary id of the first row of this rank's shard of `weight`."""
    return dist.get_rank(group) * len(weight) if group is not None else 0


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of tokens and their logits [chunk, vocab_shard].

    All chunks share one buffer: each chunk overwrites the previous one. The callers write the gradient of the logits
    into the buffer too. Chunks have about equal lengths, which depend on shapes only and so agree across ranks.
    """
    chunk_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES
    max_tokens = max(chunk_bytes // max(len(weight) * hidden.element_size(), 1), 1)
    num_chunks = -(-len(hidden) // max_tokens)
    buffer = hidden.new_empty(-(-len(hidden) // max(num_chunks, 1)), len(weight))
    for start in range(0, len(hidden), max(len(buffer), 1)):
        chunk = slice(start, min(start + len(buffer), len(hidden)))
        yield chunk, torch.mm(hidden[chunk], weight.t(), out=buffer[: chunk.stop - start])


class HeadGradients:
    """Gradients of hidden and weight, added up over chunks of the gradient of the logits.

    The sums are float32, except in a `weight_grad` of another data type, where each chunk's sum is rounded.

    Attributes:
        hidden: gradient of hidden, or None if it is not needed; its matmul is then skipped.
        weight: gradient of weight. None if it is not needed (a frozen head), or if it is added to `weight_grad`.
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
        # Without shards, a token's gradient is the result of one matmul, which accumulates in float32 internally. With
        # shards it is a sum over ranks: rounding each term to half precision first would lose digits.
        hidden_dtype = hidden.dtype if group is None else accumulate_dtype
        self.hidden = torch.empty_like(hidden, dtype=hidden_dtype) if needs_hidden else None
        # The gradient of weight is a sum over chunks, so its buffer is float32, unless the caller has another one.
        self._weight_total = None
        if needs_weight:
            self._weight_total = (
                torch.zeros_like(weight, dtype=accumulate_dtype) if weight_grad is None else weight_grad
            )
        self.weight = self._weight_total if weight_grad is None else None

    def add(self, tokens: slice, grad_logits: Tensor) -> None:
        """Accumulate the gradient of the logits of a range of tokens, [chunk, vocab_shard]."""
        hidden, weight = self._inputs
        if self.hidden is not None:
            if self.hidden.dtype == grad_logits.dtype:
                torch.mm(grad_logits, weight, out=self.hidden[tokens])
            else:
                self.hidden[tokens] = _mm_float32(grad_logits, weight)
        if self._weight_total is not None:
            _addmm_(self._weight_total, grad_logits.t(), hidden[tokens])

    def reduce(self) -> None:
        """Sum the gradient of hidden over the vocabulary shards. A collective: all ranks of the group must call it."""
        if self.hidden is not None and self._group is not None:
            dist.all_reduce(self.hidden, group=self._group)


def _mm_float32(left: Tensor, right: Tensor) -> Tensor:
    """Multiply half-precision matrices and return float32, without rounding the result to half precision."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _addmm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, in the precision of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _LinearLogProbs(torch.autograd.Function):
    """Saves hidden, weight and five numbers per token; forward and backward loop over chunks of logits."""

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
        for chunk, logits in logit_chunks(hidden, weight):
            part = row_statistics(
                logits, target_ids[chunk], first_id=ctx.first_id, temperature=temperature, with_entropy=with_entropy
            )
            statistics[:, chunk] = torch.stack(part)
        # One exchange for all tokens, not one per chunk.
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
        for chunk, logits in logit_chunks(hidden, weight):
            grad_logits = logit_gradient(
                logits,
                target_ids[chunk],
                RowSoftmax(*(column[chunk] for column in softmax)),
                grad_log_probs[chunk],
                None if grad_entropy is None else grad_entropy[chunk],
                first_id=ctx.first_id,
                temperature=ctx.temperature,
                out=logits,
            )
            gradients.add(chunk, grad_logits)
        gradients.reduce()
        grads = (None if grad is None else grad.to(hidden.dtype) for grad in (gradients.hidden, gradients.weight))
        return *grads, *(None,) * 5
