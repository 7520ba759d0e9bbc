"""The GRPO loss from hidden states: head, log-probs, objective and their gradients in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.checks import require_equal_to_one, require_shape
from vcr1_kernels.ops.linear_log_probs import (
    HeadGradients,
    check_head,
    first_token_id,
    linear_log_probs,
    logit_chunks,
)
from vcr1_kernels.ops.softmax_rows import logit_gradient, row_softmax, row_statistics
from vcr1_kernels.ops.token_loss import (
    differentiable_token_loss,
    ratio_segments,
    require_token_inputs,
    token_loss_and_grad,
)
from vcr1_kernels.records import (
    ImportanceLevel,
    KlEstimator,
    LinearGrpoLoss,
    Objective,
    TokenInputs,
    TokenLoss,
)


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
    """Compute the weighted sum of `grpo_token_loss` over `linear_log_probs` in one pass.

    This is `linear_objective_loss` with the fields of its `Objective` as keyword arguments.

    Args:
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator, rollout_ratio_cap, importance_level, entropy_coef:
            the fields of `Objective`.
        hidden, weight, target_ids, advantages, and the other arguments: as for `linear_objective_loss`.

    Raises:
        ValueError: as for `Objective` and `linear_objective_loss`.
    """
    objective = Objective(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        rollout_ratio_cap=rollout_ratio_cap,
        importance_level=importance_level,
        entropy_coef=entropy_coef,
    )
    return linear_objective_loss(
        hidden,
        weight,
        target_ids,
        advantages,
        objective,
        token_weights=token_weights,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        rollout_log_probs=rollout_log_probs,
        segment_ids=segment_ids,
        return_entropy=return_entropy,
        temperature=temperature,
        group=group,
        weight_grad=weight_grad,
    )


def linear_objective_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    objective: Objective,
    *,
    token_weights: Tensor,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_entropy: bool = False,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_grad: Tensor | None = None,
) -> LinearGrpoLoss:
    """Compute the weighted sum of the objective over the tokens, without storing the logits.

    loss = sum_t token_weights[t] * (token_loss[t] - entropy_coef * entropy[t]), see `Objective`.

    With token-level ratios, the derivative of a token's loss is known as soon as its log-prob is known. Forward
    therefore overwrites each chunk of logits with its gradient and accumulates it into the gradients of hidden and
    weight: 6 * tokens * vocab * hidden_size FLOPs, and no second pass over the vocabulary. Backward can run only once.
    A sequence-level ratio needs all log-probs of a response first, so its logits are recomputed in backward.

    Args:
        hidden: [tokens, hidden_size], hidden states of the response tokens; with a group, the same on every rank.
        weight: [vocab_shard, hidden_size], in hidden's dtype; with a group, rank r holds the r-th equal shard.
        target_ids: int64 [tokens], ids in the whole vocabulary.
        advantages: float [tokens].
        objective: scalar settings of the objective.
        token_weights: float [tokens]; they define the normalization. GRPO: 1 / (responses * tokens of the response).
            Dr.GRPO: 1 / (responses * maximum length). DAPO and BNPO: 1 / tokens of the (global or local) batch.
        old_log_probs: float [tokens], log-probs of the policy before the update. None: on-policy, the ratio is 1.
        ref_log_probs: float [tokens], log-probs of the reference policy. None: no KL term.
        rollout_log_probs: float [tokens], log-probs from the rollout engine. None: no rollout correction.
        segment_ids: int64 [tokens] in [0, tokens), the response of each token; required for sequence-level ratios.
        return_entropy: compute the entropy (a metric) even if the objective does not use it.
        temperature: softmax temperature, > 0.
        group: tensor-parallel process group, or None if the vocabulary is not sharded. All of its ranks must call this
            function: it runs collectives, in forward and (sequence level) in backward.
        weight_grad: gradient buffer as for `linear_log_probs`; it saves a tensor of weight's size when memory use
            peaks. With token-level ratios it is filled in forward already, so the caller must differentiate the loss
            itself, or a sum of it with other losses: the gradient of the loss must be 1.

    Returns:
        The scalar loss and, detached, the tensors that metrics need. The gradient of `hidden` is complete on every
        rank; the gradient of `weight` is that of the shard. In float16, scale `token_weights` so that the gradients of
        the logits, about weight * advantage, do not underflow.

    Raises:
        ValueError: an argument has the wrong shape, hidden and weight have different dtypes, a target is outside the
            vocabulary, or segment_ids is missing. In backward: weight_grad was given with token-level ratios and the
            gradient of the loss is not 1.
    """
    check_head(hidden, weight, target_ids, temperature, group, weight_grad)
    inputs = TokenInputs(advantages, old_log_probs, ref_log_probs, rollout_log_probs)
    require_token_inputs(inputs, len(hidden))
    require_shape("token_weights", token_weights, len(hidden))
    segments = ratio_segments(objective, segment_ids, len(hidden))
    if segments is None:
        loss, log_probs, entropy, *token_loss = _TokenLevelLoss.apply(
            hidden,
            weight,
            target_ids,
            token_weights,
            inputs,
            objective,
            return_entropy or objective.entropy_coef != 0,
            temperature,
            group,
            torch.is_grad_enabled(),  # inside an autograd function's forward it is always False
            weight_grad,
        )
        return LinearGrpoLoss(loss, log_probs, entropy, TokenLoss(*token_loss))
    log_probs, entropy = linear_log_probs(
        hidden, weight, target_ids, temperature=temperature, group=group, return_entropy=True, weight_grad=weight_grad
    )
    return _sequence_level_loss(log_probs, entropy, token_weights, inputs, segments, objective)


def _sequence_level_loss(
    log_probs: Tensor,
    entropy: Tensor,
    token_weights: Tensor,
    inputs: TokenInputs,
    segments: Tensor,
    objective: Objective,
) -> LinearGrpoLoss:
    """Compute the loss from the log-probs of whole responses; `log_probs` and `entropy` carry gradients."""
    tokens = differentiable_token_loss(log_probs, inputs, segments, objective)
    loss = tokens.loss - objective.entropy_coef * entropy if objective.entropy_coef else tokens.loss
    tokens = tokens._replace(loss=tokens.loss.detach())
    return LinearGrpoLoss((token_weights * loss).sum(), log_probs.detach(), entropy.detach(), tokens)


class _TokenLevelLoss(torch.autograd.Function):
    """Computes the gradients in forward; backward only multiplies them by the gradient of the scalar loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_ids: Tensor,
        token_weights: Tensor,
        inputs: TokenInputs,
        objective: Objective,
        with_entropy: bool,
        temperature: float,
        group: dist.ProcessGroup | None,
        grad_enabled: bool,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, ...]:
        first_id = first_token_id(weight, group)
        entropy_coef = objective.entropy_coef
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad if grad_enabled else (False, False)
        gradients = HeadGradients(
            hidden, weight, group, needs_hidden=needs_hidden, needs_weight=needs_weight, weight_grad=weight_grad
        )
        outputs = _empty_outputs(hidden)
        # Every rank of the group makes the same chunks, so that the collective in row_softmax runs equally often.
        for chunk, logits in logit_chunks(hidden, weight):
            statistics = row_statistics(
                logits, target_ids[chunk], first_id=first_id, temperature=temperature, with_entropy=with_entropy
            )
            softmax = row_softmax(statistics, temperature, group)
            tokens, loss_grad = token_loss_and_grad(softmax.log_probs, inputs.select(chunk), None, objective)
            entropy = softmax.entropy if with_entropy else torch.zeros_like(softmax.log_probs)
            for output, values in zip(outputs, (softmax.log_probs, entropy, *tokens), strict=True):
                output[chunk] = values
            if needs_hidden or needs_weight:
                grad_logits = logit_gradient(
                    logits,
                    target_ids[chunk],
                    softmax,
                    token_weights[chunk] * loss_grad,
                    -entropy_coef * token_weights[chunk] if entropy_coef else None,
                    first_id=first_id,
                    temperature=temperature,
                    out=logits,
                )
                gradients.add(chunk, grad_logits)
        gradients.reduce()
        ctx.filled_weight_grad = needs_weight and weight_grad is not None
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.dtype = hidden.dtype
        log_probs, entropy, token_loss, kl, ratio, clipped = outputs
        loss = (token_weights * (token_loss - entropy_coef * entropy)).sum()
        ctx.mark_non_differentiable(log_probs, entropy, token_loss, kl, ratio, clipped)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.filled_weight_grad:
            require_equal_to_one("the gradient of a loss with weight_grad", grad_loss)
        # The gradients are scaled in place because they are the largest tensors of this op. Autograd notices that saved
        # tensors were changed, so a second backward raises an error instead of returning wrong gradients.
        grads = (None if saved is None else saved.mul_(grad_loss).to(ctx.dtype) for saved in ctx.saved_tensors)
        return *grads, *(None,) * 9


def _empty_outputs(hidden: Tensor) -> list[Tensor]:
    """Allocate log_probs, entropy, loss, kl, ratio (float32 or float64) and clipped (bool), all [tokens]."""
    compute_dtype = torch.promote_types(hidden.dtype, torch.float32)
    dtypes = (*(compute_dtype,) * 5, torch.bool)
    return [torch.empty(len(hidden), dtype=dtype, device=hidden.device) for dtype in dtypes]
