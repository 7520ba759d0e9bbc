"""Log-probabilities of given tokens from their logits."""

from __future__ import annotations

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
from vcr1_kernels.ops.softmax_rows import RowSoftmax, logit_gradient, row_softmax, row_statistics


@overload
def log_probs_from_logits(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = ...,
    group: dist.ProcessGroup | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def log_probs_from_logits(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = ...,
    group: dist.ProcessGroup | None = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def log_probs_from_logits(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under softmax(logits / temperature).

    Forward reads the logits once, backward reads them once and writes their gradient once. With a process group, each
    rank holds an equal shard of the vocabulary in rank order and one exchange of 16 bytes a token joins them. A row
    whose logits are all -inf has log-prob -inf, entropy 0 and no gradient through its softmax.

    Args:
        logits: [tokens, vocab_shard], rows contiguous.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        temperature: the softmax temperature, > 0.
        group: tensor-parallel process group, or None if the vocabulary is whole.
        return_entropy: also return the entropy of each row's distribution, with its gradient.
        inplace_backward: write the gradient over `logits` in backward, which saves a tensor of their size. The caller
            promises that nothing reads the logits after that; a second backward raises an error.

    Returns:
        float32 [tokens] (float64 for float64 logits), and the entropy, [tokens], if asked.

    Raises:
        ValueError: misshapen or non-contiguous input, or a target outside the vocabulary.
    """
    require_shape("logits", logits, "tokens", "vocab_shard")
    require_floating("logits", logits)
    require_contiguous_rows("logits", logits)
    num_shards = dist.get_world_size(group) if group is not None else 1
    require_token_ids("target_ids", target_ids, len(logits), logits.shape[1] * num_shards)
    require_temperature(temperature)
    log_probs, entropy = _LogProbsFromLogits.apply(
        logits, target_ids, temperature, group, return_entropy, inplace_backward
    )
    return (log_probs, entropy) if return_entropy else log_probs


class _LogProbsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target_ids: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        ctx.first_id = dist.get_rank(group) * logits.shape[1] if group is not None else 0
        ctx.set_materialize_grads(False)
        statistics = row_statistics(
            logits, target_ids, first_id=ctx.first_id, temperature=temperature, for_entropy=with_entropy
        )
        softmax = row_softmax(statistics, temperature, group)
        ctx.save_for_backward(logits, target_ids, *softmax)
        return softmax.log_probs, softmax.entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target_ids, *softmax = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(softmax[0])
        if ctx.inplace_backward:
            torch.autograd.graph.increment_version(logits)  # a Triton kernel's writes are not seen by autograd
        grad_logits = logit_gradient(
            logits,
            target_ids,
            RowSoftmax(*softmax),
            grad_log_probs,
            grad_entropy,
            first_id=ctx.first_id,
            temperature=ctx.temperature,
            out=logits if ctx.inplace_backward else torch.empty_like(logits),
        )
        return grad_logits, None, None, None, None, None
