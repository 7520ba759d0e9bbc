"""The GRPO loss of each token and its derivative: clipped surrogate, KL term and rollout correction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_floating, require_shape
from vcr1_kernels.records import ImportanceLevel, KlEstimator, Objective, TokenInputs, TokenLoss


def grpo_token_loss(
    log_probs: Tensor,
    advantages: Tensor,
    *,
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
) -> TokenLoss:
    """Compute the loss of each token of packed responses; the caller weights and sums it (GRPO, Dr.GRPO, DAPO, BNPO).

    With ratio r = exp(log_probs - old_log_probs) and advantage A:
    loss = kl_coef * kl - c * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). The objective is DeepSeekMath's
    (arXiv:2402.03300), with DAPO's separate clip bounds (arXiv:2503.14476), the dual clip of arXiv:1912.09729, GSPO's
    sequence ratio (arXiv:2507.18071) and Schulman's KL estimators k1, k2 and k3 (joschu.net/blog/kl-approx.html).

    Args:
        log_probs: float [tokens], log-probs of the policy; the only argument that receives a gradient.
        advantages: float [tokens].
        old_log_probs: float [tokens], log-probs of the policy before the update. None: on-policy; the ratio is 1 and
            still carries the policy gradient.
        ref_log_probs: float [tokens], log-probs of the reference policy. None: no KL term.
        rollout_log_probs: float [tokens], log-probs that the rollout engine reported. The surrogate is then multiplied
            by c = min(exp(old_log_probs - rollout_log_probs), rollout_ratio_cap), which carries no gradient (truncated
            importance sampling). None: c = 1.
        clip_low: the ratio is clipped from below at 1 - clip_low.
        clip_high: the ratio is clipped from above at 1 + clip_high.
        dual_clip: where A < 0, the surrogate is bounded from below by dual_clip * A. None: no bound.
        kl_coef: weight of the KL estimate.
        kl_estimator: with d = log_probs - ref_log_probs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1.
        rollout_ratio_cap: upper bound of c. None: no bound.
        importance_level: "sequence" gives every token the exponential of its segment's mean log-ratio as its ratio; the
            gradient still flows to each token through its own log-prob.
        segment_ids: int64 [tokens] in [0, tokens), the response of each token; required for "sequence".

    Raises:
        ValueError: a tensor has the wrong shape, a name is unknown, or a bound is out of range.
    """
    objective = Objective(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        rollout_ratio_cap=rollout_ratio_cap,
        importance_level=importance_level,
    )
    inputs = TokenInputs(advantages, old_log_probs, ref_log_probs, rollout_log_probs)
    require_shape("log_probs", log_probs, "tokens")
    require_floating("log_probs", log_probs)
    require_token_inputs(inputs, len(log_probs))
    segments = ratio_segments(objective, segment_ids, len(log_probs))
    return differentiable_token_loss(log_probs, inputs, segments, objective)


def differentiable_token_loss(
    log_probs: Tensor, inputs: TokenInputs, segments: Tensor | None, objective: Objective
) -> TokenLoss:
    """Compute the loss of each token from checked arguments, with a gradient for `log_probs`.

    `segments` is the result of `ratio_segments`: None for token-level ratios.
    """
    log_ratio = None
    if segments is not None:
        current = log_probs.detach()
        old = current if inputs.old_log_probs is None else inputs.old_log_probs
        log_ratio = _segment_mean(current - old, segments)
    return TokenLoss(*_GrpoTokenLoss.apply(log_probs, inputs, log_ratio, objective))


def ratio_segments(objective: Objective, segment_ids: Tensor | None, num_tokens: int) -> Tensor | None:
    """Return the segments over which log-ratios are averaged, or None for token-level ratios.

    Raises:
        ValueError: the objective has sequence-level ratios and segment_ids is missing or not [num_tokens].
    """
    if objective.importance_level == "token":
        return None
    if segment_ids is None:
        raise ValueError('importance_level="sequence" needs segment_ids')
    require_shape("segment_ids", segment_ids, num_tokens)
    return segment_ids


def require_token_inputs(inputs: TokenInputs, num_tokens: int) -> None:
    """Raise ValueError unless the objective's tensors are floating-point and [num_tokens]."""
    for name, tensor in inputs._asdict().items():
        if tensor is not None:
            require_shape(name, tensor, num_tokens)
            require_floating(name, tensor)


def token_loss_and_grad(
    log_probs: Tensor, inputs: TokenInputs, log_ratio: Tensor | None, objective: Objective
) -> tuple[TokenLoss, Tensor]:
    """Compute the loss of each token and its derivative with respect to the token's log-prob.

    `log_ratio` [tokens] replaces log_probs - old_log_probs for sequence-level ratios. In both cases the derivative of
    the ratio with respect to the token's log-prob is the ratio itself, so both share the code below.

    Returns:
        The loss and the derivative, both [tokens]. Neither is part of an autograd graph if gradients are disabled, as
        in the forward of an autograd function.
    """
    old_log_probs = log_probs if inputs.old_log_probs is None else inputs.old_log_probs
    if log_ratio is None:
        log_ratio = log_probs - old_log_probs
    if use_triton(log_probs):
        from vcr1_kernels.triton_ops.token_loss import launch_token_loss

        return launch_token_loss(log_probs, inputs._replace(old_log_probs=old_log_probs), log_ratio, objective)
    advantages = inputs.advantages
    ratio = log_ratio.exp()
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    surrogate = ratio * advantages
    clipped_surrogate = ratio.clamp(low, high) * advantages
    # The minimum takes the clipped surrogate, which is constant, only on one side for each sign of the advantage.
    clipped = torch.where(advantages < 0, ratio < low, (ratio > high) & (advantages > 0))
    surrogate_grad = torch.where(clipped, 0, surrogate)  # d(r A) / d(log-prob) = r A
    surrogate = torch.minimum(surrogate, clipped_surrogate)
    if objective.dual_clip is not None:
        dual_clipped = (advantages < 0) & (ratio > objective.dual_clip)
        surrogate = torch.where(dual_clipped, objective.dual_clip * advantages, surrogate)
        surrogate_grad = torch.where(dual_clipped, 0, surrogate_grad)
        clipped = clipped | dual_clipped
    if inputs.rollout_log_probs is not None:
        correction = (old_log_probs - inputs.rollout_log_probs).exp().clamp(max=objective.rollout_ratio_cap or math.inf)
        surrogate, surrogate_grad = surrogate * correction, surrogate_grad * correction
    loss, grad = -surrogate, -surrogate_grad
    kl = torch.zeros_like(log_probs)
    if inputs.ref_log_probs is not None:
        kl, kl_grad = _kl_and_grad(log_probs - inputs.ref_log_probs, objective.kl_estimator)
        loss, grad = loss + objective.kl_coef * kl, grad + objective.kl_coef * kl_grad
    return TokenLoss(loss, kl, ratio, clipped), grad


def _kl_and_grad(delta: Tensor, estimator: KlEstimator) -> tuple[Tensor, Tensor]:
    """Return the estimate of KL(policy || reference) and its derivative, given delta = log policy - log reference."""
    match estimator:
        case "k1":
            return delta, torch.ones_like(delta)
        case "k2":
            return 0.5 * delta**2, delta
        case "k3":
            # reference / policy - 1. expm1 keeps the digits of nearly equal policies, which exp(-delta) - 1 loses.
            reference_excess = torch.expm1(-delta)
            return reference_excess + delta, -reference_excess


def _segment_mean(values: Tensor, segment_ids: Tensor) -> Tensor:
    """Return for each token the mean over its segment; [tokens].

    The sums have one entry per token, because there cannot be more segments than tokens. Computing the exact number of
    segments would make the host wait for the device.
    """
    sums = torch.zeros_like(values).index_add_(0, segment_ids, values)
    counts = torch.zeros_like(values).index_add_(0, segment_ids, torch.ones_like(values))
    return (sums / counts)[segment_ids]


class _GrpoTokenLoss(torch.autograd.Function):
    """Computes the derivative in forward, together with the loss; backward is one multiplication."""

    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, inputs: TokenInputs, log_ratio: Tensor | None, objective: Objective
    ) -> tuple[Tensor, ...]:
        result, grad = token_loss_and_grad(log_probs, inputs, log_ratio, objective)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(result.kl, result.ratio, result.clipped)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad_loss * grad).to(grad.dtype), None, None, None
