"""The GRPO loss from hidden states, forward and backward in one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.checks import require_one, require_shape
from vcr1_kernels.ops.linear_log_probs import (
    HeadGradients,
    check_head,
    first_token_id,
    linear_log_probs,
    logit_chunks,
)
from vcr1_kernels.ops.softmax_rows import logit_gradient, row_softmax, row_statistics
from vcr1_kernels.ops.token_loss import (
    ImportanceLevel,
    KlEstimator,
    Objective,
    TokenLoss,
    apply_objective,
    check_per_token,
    segments_of_ratio,
    token_loss_and_slope,
)


class LinearGrpoLoss(NamedTuple):
    """Only `loss` carries a gradient."""

    loss: Tensor  # scalar: sum of token_weights * (token loss - entropy_coef * entropy)
    log_probs: Tensor  # [tokens]
    entropy: Tensor  # [tokens]; zeros if a token-level objective neither weights it nor is asked for it
    tokens: TokenLoss  # of [tokens]


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    *,
    token_weights: Tensor,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.04,
    kl_estimator: KlEstimator = "k3",
    rollout_ratio_cap: float | None = None,
    importance_level: ImportanceLevel = "token",
    segment_ids: Tensor | None = None,
    entropy_coef: float = 0.0,
    return_entropy: bool = False,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_grad: Tensor | None = None,
) -> LinearGrpoLoss:
    """Weighted sum of `grpo_token_loss` over `linear_log_probs`, without storing or recomputing the logits.

    A token-level objective knows a token's coefficient once its log-prob is known, so forward overwrites each chunk of
    logits by its gradient and takes it into the gradients of hidden and weight: 6 * tokens * vocab * hidden_size
    operations and no second pass. A sequence-level ratio needs all log-probs of a response first; its logits are
    computed twice. Backward can run once.

    Args:
        hidden: [tokens, hidden_size]; response positions only. With a group, the same on every rank.
        weight: [vocab_shard, hidden_size], in hidden's dtype; with a group, rank r holds the r-th equal shard.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        advantages: [tokens].
        token_weights: [tokens]; makes the normalisation. GRPO: 1 / (responses * tokens of the response); Dr.GRPO:
            1 / (responses * maximal length); DAPO and BNPO: 1 / tokens of the (global or local) batch.
        entropy_coef: weight of an entropy bonus, in the same pass.
        return_entropy: take the entropy (a metric) even if entropy_coef is 0.
        temperature: the softmax temperature, > 0.
        group: tensor-parallel process group, or None if the vocabulary is whole.
        weight_grad: as in `linear_log_probs`; it spares that tensor at the moment that needs most memory. A token-level
            objective fills it in forward already: the caller promises to differentiate the loss itself, or its sum with
            others.
        old_log_probs, ..., segment_ids: as in `grpo_token_loss`.

    Returns:
        The scalar loss and, detached, what metrics need. The gradient of `hidden` is complete on every rank, the
        gradient of `weight` is the shard's. In float16 scale `token_weights` so that the logits' gradients, about
        weight * advantage, stay above its smallest number.

    Raises:
        ValueError: misshapen input, two dtypes, a target outside the vocabulary, an unknown name or impossible bound;
            in backward, weight_grad was given to a token-level objective and the gradient of the loss is not 1.
    """
    check_head(hidden, weight, target_ids, temperature, group, weight_grad)
    check_per_token(len(hidden), advantages, old_log_probs, ref_log_probs, rollout_log_probs)
    require_shape("token_weights", token_weights, len(hidden))
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, rollout_ratio_cap)
    segments = segments_of_ratio(importance_level, segment_ids, len(hidden))
    if segments is not None:
        log_probs, entropy = linear_log_probs(
            hidden,
            weight,
            target_ids,
            temperature=temperature,
            group=group,
            return_entropy=True,
            weight_grad=weight_grad,
        )
        tokens = apply_objective(
            log_probs, advantages, old_log_probs, ref_log_probs, rollout_log_probs, segments, objective
        )
        loss = tokens.loss - entropy_coef * entropy if entropy_coef else tokens.loss
        tokens = tokens._replace(loss=tokens.loss.detach())
        return LinearGrpoLoss((token_weights * loss).sum(), log_probs.detach(), entropy.detach(), tokens)

    def loss_and_slope(rows: slice, log_probs: Tensor) -> tuple[TokenLoss, Tensor]:
        old, ref, rollout = (
            None if tensor is None else tensor[rows] for tensor in (old_log_probs, ref_log_probs, rollout_log_probs)
        )
        return token_loss_and_slope(log_probs, advantages[rows], old, ref, rollout, None, objective)

    loss, log_probs, entropy, *token_loss = _TokenLevelLoss.apply(
        hidden,
        weight,
        target_ids,
        token_weights,
        loss_and_slope,
        entropy_coef,
        return_entropy or entropy_coef != 0,
        temperature,
        group,
        torch.is_grad_enabled(),
        weight_grad,
    )
    return LinearGrpoLoss(loss, log_probs, entropy, TokenLoss(*token_loss))


class _TokenLevelLoss(torch.autograd.Function):
    """Gradient in forward; backward only multiplies by the gradient of the scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        token_weights: Tensor,
        loss_and_slope: Callable[[slice, Tensor], tuple[TokenLoss, Tensor]],
        entropy_coef: float,
        with_entropy: bool,
        temperature: float,
        group: dist.ProcessGroup | None,
        grad_enabled: bool,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, ...]:
        first_id = first_token_id(weight, group)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad if grad_enabled else (False, False)
        needs_grad = needs_hidden or needs_weight
        gradients = HeadGradients(
            hidden, weight, group, needs_hidden=needs_hidden, needs_weight=needs_weight, weight_grad=weight_grad
        )
        columns = _empty_columns(hidden)
        for rows, logits in logit_chunks(hidden, weight):
            statistics = row_statistics(
                logits, target_ids[rows], first_id=first_id, temperature=temperature, for_entropy=with_entropy
            )
            softmax = row_softmax(statistics, temperature, group)
            tokens, slope = loss_and_slope(rows, softmax.log_probs)
            entropy = softmax.entropy if with_entropy else torch.zeros_like(softmax.log_probs)
            for column, chunk in zip(columns, (softmax.log_probs, entropy, *tokens), strict=True):
                column[rows] = chunk
            if not needs_grad:
                continue
            grad_logits = logit_gradient(
                logits,
                target_ids[rows],
                softmax,
                token_weights[rows] * slope,
                -entropy_coef * token_weights[rows] if entropy_coef else None,
                first_id=first_id,
                temperature=temperature,
                out=logits,
            )
            gradients.add(rows, grad_logits)
        gradients.reduce()
        ctx.added_weight_grad = needs_weight and weight_grad is not None
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.dtype = hidden.dtype
        log_probs, entropy, token_loss, kl, ratio, clipped = columns
        loss = (token_weights * (token_loss - entropy_coef * entropy)).sum()
        ctx.mark_non_differentiable(log_probs, entropy, token_loss, kl, ratio, clipped)
        return loss, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.added_weight_grad:
            require_one("the gradient of a loss with weight_grad", grad_loss)
        # In place: these are the largest tensors of the op. Autograd refuses a second backward through changed tensors.
        grads = (None if saved is None else saved.mul_(grad_loss).to(ctx.dtype) for saved in ctx.saved_tensors)
        return *grads, *(None,) * 9


def _empty_columns(hidden: Tensor) -> list[Tensor]:
    """Room for log_probs, entropy, loss, kl, ratio (float32 or float64) and clipped (bool), each [tokens]."""
    compute_dtype = torch.promote_types(hidden.dtype, torch.float32)
    dtypes = (*(compute_dtype,) * 5, torch.bool)
    return [torch.empty(len(hidden), dtype=dtype, device=hidden.device) for dtype in dtypes]
