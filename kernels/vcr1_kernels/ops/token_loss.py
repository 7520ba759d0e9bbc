"""The GRPO objective of each token: clipped surrogate, KL and rollout correction, with its derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_floating, require_shape

KlEstimator = Literal["k1", "k2", "k3"]
ImportanceLevel = Literal["token", "sequence"]


class TokenLoss(NamedTuple):
    """All [tokens]; only `loss` carries a gradient."""

    loss: Tensor  # kl_coef * kl - rollout correction * surrogate
    kl: Tensor  # estimate of KL(policy || reference), 0 without reference log-probs
    ratio: Tensor  # importance ratio policy / old policy
    clipped: Tensor  # bool: the clip (or dual clip) holds this token's surrogate constant


@dataclass(frozen=True, slots=True)
class Objective:
    """The scalars of the objective; `grpo_token_loss` says what they mean."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: KlEstimator
    rollout_ratio_cap: float | None

    def __post_init__(self) -> None:
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must exceed 1, got {self.dual_clip}")
        if self.kl_estimator not in get_args(KlEstimator):
            raise ValueError(f"kl_estimator must be one of {get_args(KlEstimator)}, got {self.kl_estimator!r}")
        if self.rollout_ratio_cap is not None and self.rollout_ratio_cap <= 0:
            raise ValueError(f"rollout_ratio_cap must be positive, got {self.rollout_ratio_cap}")


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
    """Loss of each token of packed responses; the caller weights and sums it (GRPO, Dr.GRPO, DAPO, BNPO).

    With ratio r = exp(log_probs - old_log_probs) and advantage A:
    loss = kl_coef * kl - c * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). The objective is DeepSeekMath's
    (arXiv:2402.03300), separate clip bounds DAPO's (2503.14476), the dual clip 1912.09729's, the sequence ratio GSPO's
    (2507.18071), and the estimators k1, k2, k3 are Schulman's (joschu.net/blog/kl-approx.html).

    Args:
        log_probs: float [tokens], the policy's; the only argument that receives a gradient.
        advantages: [tokens].
        old_log_probs: [tokens] of the policy that the update started from. None: on-policy, the ratio is 1 and still
            carries the policy gradient.
        ref_log_probs: [tokens] of the reference policy. None: no KL term.
        rollout_log_probs: [tokens] as the sampling engine reported them. The surrogate is then multiplied by
            c = min(exp(old_log_probs - rollout_log_probs), rollout_ratio_cap), without a gradient (truncated importance
            sampling); c = 1 if None.
        clip_low: the ratio is clipped below at 1 - clip_low.
        clip_high: the ratio is clipped above at 1 + clip_high.
        dual_clip: where A < 0 the surrogate is at least dual_clip * A. None: no bound.
        kl_coef: weight of the KL estimate.
        kl_estimator: with d = log_probs - ref_log_probs, k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1.
        rollout_ratio_cap: bound on c; None: none.
        importance_level: "sequence" takes the exponential of the segment's mean log-ratio as every token's ratio, each
            token with its own gradient.
        segment_ids: int64 [tokens] in [0, tokens), the response of each token; needed for "sequence".

    Raises:
        ValueError: misshapen input, an unknown name or an impossible bound.
    """
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef, kl_estimator, rollout_ratio_cap)
    require_shape("log_probs", log_probs, "tokens")
    require_floating("log_probs", log_probs)
    check_per_token(len(log_probs), advantages, old_log_probs, ref_log_probs, rollout_log_probs)
    segments = segments_of_ratio(importance_level, segment_ids, len(log_probs))
    return apply_objective(log_probs, advantages, old_log_probs, ref_log_probs, rollout_log_probs, segments, objective)


def apply_objective(
    log_probs: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    segments: Tensor | None,
    objective: Objective,
) -> TokenLoss:
    """`grpo_token_loss` of checked arguments; `segments` is None for token-level ratios."""
    log_ratio = None
    if segments is not None:
        current = log_probs.detach()
        log_ratio = _segment_mean(current - (current if old_log_probs is None else old_log_probs), segments)
    return TokenLoss(
        *_GrpoTokenLoss.apply(
            log_probs, advantages, old_log_probs, ref_log_probs, rollout_log_probs, log_ratio, objective
        )
    )


def segments_of_ratio(importance_level: str, segment_ids: Tensor | None, num_tokens: int) -> Tensor | None:
    """The segments whose mean is the ratio, or None for token-level ratios; raises ValueError if they do not fit."""
    if importance_level not in get_args(ImportanceLevel):
        raise ValueError(f"importance_level must be one of {get_args(ImportanceLevel)}, got {importance_level!r}")
    if importance_level == "token":
        return None
    if segment_ids is None:
        raise ValueError('importance_level="sequence" needs segment_ids')
    require_shape("segment_ids", segment_ids, num_tokens)
    return segment_ids


def check_per_token(
    num_tokens: int,
    advantages: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
) -> None:
    """Raise ValueError unless the objective's tensors are floating-point and [num_tokens]."""
    named = {
        "advantages": advantages,
        "old_log_probs": old_log_probs,
        "ref_log_probs": ref_log_probs,
        "rollout_log_probs": rollout_log_probs,
    }
    for name, tensor in named.items():
        if tensor is not None:
            require_shape(name, tensor, num_tokens)
            require_floating(name, tensor)


def token_loss_and_slope(
    log_probs: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    log_ratio: Tensor | None,
    objective: Objective,
) -> tuple[TokenLoss, Tensor]:
    """The token losses and their derivatives by the log-probs, [tokens], both without a graph.

    `log_ratio` replaces log_probs - old_log_probs where the ratio is a sequence's; in either case the derivative of the
    ratio by the token's log-prob is the ratio itself.
    """
    old = log_probs if old_log_probs is None else old_log_probs
    if log_ratio is None:
        log_ratio = log_probs - old
    if use_triton(log_probs):
        from vcr1_kernels.triton_ops.token_loss import launch_token_loss

        return launch_token_loss(log_probs, advantages, old, ref_log_probs, rollout_log_probs, log_ratio, objective)
    ratio = log_ratio.exp()
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    surrogate = ratio * advantages
    bound = ratio.clamp(low, high) * advantages
    clipped = torch.where(advantages < 0, ratio < low, (ratio > high) & (advantages > 0))
    surrogate_slope = torch.where(clipped, 0, surrogate)
    surrogate = torch.minimum(surrogate, bound)
    if objective.dual_clip is not None:
        beyond = (advantages < 0) & (ratio > objective.dual_clip)
        surrogate = torch.where(beyond, objective.dual_clip * advantages, surrogate)
        surrogate_slope = torch.where(beyond, 0, surrogate_slope)
        clipped = clipped | beyond
    if rollout_log_probs is not None:
        correction = (old - rollout_log_probs).exp().clamp(max=objective.rollout_ratio_cap or math.inf)
        surrogate, surrogate_slope = surrogate * correction, surrogate_slope * correction
    loss, slope = -surrogate, -surrogate_slope
    kl = torch.zeros_like(log_probs)
    if ref_log_probs is not None:
        kl, kl_slope = _kl_and_slope(log_probs - ref_log_probs, objective.kl_estimator)
        loss, slope = loss + objective.kl_coef * kl, slope + objective.kl_coef * kl_slope
    return TokenLoss(loss, kl, ratio, clipped), slope


def _kl_and_slope(delta: Tensor, estimator: KlEstimator) -> tuple[Tensor, Tensor]:
    """The estimate of KL(policy || reference) of delta = log policy - log reference, and its derivative by delta."""
    match estimator:
        case "k1":
            return delta, torch.ones_like(delta)
        case "k2":
            return 0.5 * delta**2, delta
        case "k3":
            shortfall = torch.expm1(-delta)
            return shortfall + delta, -shortfall


def _segment_mean(values: Tensor, segment_ids: Tensor) -> Tensor:
    """The mean over each token's segment, [tokens], without asking the device how many segments there are."""
    sums = torch.zeros_like(values).index_add_(0, segment_ids, values)
    counts = torch.zeros_like(values).index_add_(0, segment_ids, torch.ones_like(values))
    return (sums / counts)[segment_ids]


class _GrpoTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        advantages: Tensor,
        old_log_probs: Tensor | None,
        ref_log_probs: Tensor | None,
        rollout_log_probs: Tensor | None,
        log_ratio: Tensor | None,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        result, slope = token_loss_and_slope(
            log_probs, advantages, old_log_probs, ref_log_probs, rollout_log_probs, log_ratio, objective
        )
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(result.kl, result.ratio, result.clipped)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (grad_loss * slope).to(slope.dtype), None, None, None, None, None, None
