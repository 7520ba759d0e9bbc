"""Log-probs of target tokens from logits."""

from __future__ import annotations

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
from vcr1_kernels.records import RowSoftmax


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
    """Compute the log-prob of each target token under softmax(logits / temperature).

    Forward reads the logits once; backward reads them once and writes their gradient once. With a process group, each
    rank holds an equal shard of the vocabulary, in rank order, and one exchange of 16 bytes per token merges the
    shards. A token whose logits are all -inf has log-prob -inf, entropy 0 and no gradient through its softmax.

    Args:
        logits: [tokens, vocab_shard], last dimension contiguous.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        temperature: softmax temperature, > 0.
        group: tensor-parallel process group, or None if the vocabulary is not sharded. All of its ranks must call this
            function, which runs a collective in forward.
        return_entropy: also return the entropy of each token's distribution, with its gradient.
        inplace_backward: overwrite `logits` with their gradient in backward, which saves a tensor of their size. The
            caller promises that nothing reads the logits afterwards; a second backward raises an error.

    Returns:
        Log-probs, float32 [tokens] (float64 for float64 logits), and with return_entropy the entropy, [tokens].

    Raises:
        ValueError: an argument has the wrong shape or is not contiguous, or a target is outside the vocabulary.
    """
    require_shape("logits", logits, "tokens", "vocab_shard")
    require_floating("logits", logits)
    require_contiguous_last_dim("logits", logits)
    num_shards = dist.get_world_size(group) if group is not None else 1
    require_token_ids("target_ids", target_ids, len(logits), logits.shape[1] * num_shards)
    require_temperature(temperature)
    log_probs, entropy = _LogProbsFromLogits.apply(
        logits, target_ids, temperature, group, return_entropy, inplace_backward
    )
    return (log_probs, entropy) if return_entropy else log_probs


class _LogProbsFromLogits(torch.autograd.Function):
    """Saves the logits and a few numbers per token; backward recomputes the probabilities from them."""

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
            logits, target_ids, first_id=ctx.first_id, temperature=temperature, with_entropy=with_entropy
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
            # Autograd does not see the writes of a Triton kernel. The new version makes a second backward raise.
            torch.autograd.graph.increment_version(logits)
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
