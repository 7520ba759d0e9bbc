"""Records that the PyTorch path and the Triton path of the ops share. They hold data and import nothing but torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]
ImportanceLevel = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The scalar settings of the GRPO objective, validated once, here.

    With the ratio r = exp(log_probs - old_log_probs), the advantage A and the rollout correction c, the loss of a token
    is kl_coef * kl - c * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - entropy_coef * entropy.

    Attributes:
        clip_low: the ratio is clipped from below at 1 - clip_low; in [0, 1].
        clip_high: the ratio is clipped from above at 1 + clip_high; >= 0.
        dual_clip: for tokens with A < 0, the surrogate is bounded from below by dual_clip * A; > 1. None: no bound.
        kl_coef: weight of the KL estimate.
        kl_estimator: with d = log_probs - ref_log_probs, "k1" is d, "k2" is d^2 / 2 and "k3" is exp(-d) + d - 1.
        rollout_ratio_cap: upper bound of the rollout correction c; > 0. None: no bound.
        importance_level: "token" uses each token's own ratio (GRPO). "sequence" uses the exponential of the mean
            log-ratio of the token's segment (GSPO).
        entropy_coef: weight of the entropy bonus. Only the ops that compute the entropy (the linear ones) apply it.

    Raises:
        ValueError: a bound is out of range, or the name of an estimator or an importance level is unknown.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.04
    kl_estimator: KlEstimator = "k3"
    rollout_ratio_cap: float | None = None
    importance_level: ImportanceLevel = "token"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be greater than 1, got {self.dual_clip}")
        if self.kl_estimator not in get_args(KlEstimator):
            raise ValueError(f"kl_estimator must be one of {get_args(KlEstimator)}, got {self.kl_estimator!r}")
        if self.rollout_ratio_cap is not None and self.rollout_ratio_cap <= 0:
            raise ValueError(f"rollout_ratio_cap must be positive, got {self.rollout_ratio_cap}")
        if self.importance_level not in get_args(ImportanceLevel):
            raise ValueError(
                f"importance_level must be one of {get_args(ImportanceLevel)}, got {self.importance_level!r}"
            )


class TokenInputs(NamedTuple):
    """Tensors that the objective reads for each token, besides the policy's log-probs; all [tokens], no gradient."""

    advantages: Tensor
    old_log_probs: Tensor | None  # log-probs of the policy before the update; None: on-policy, the ratio is 1
    ref_log_probs: Tensor | None  # log-probs of the reference policy; None: no KL term
    rollout_log_probs: Tensor | None  # log-probs reported by the rollout engine; None: no rollout correction

    def select(self, tokens: slice) -> TokenInputs:
        """Return the inputs of a range of tokens, as views."""
        return TokenInputs(
            self.advantages[tokens],
            *(None if tensor is None else tensor[tokens] for tensor in self[1:]),
        )


class TokenLoss(NamedTuple):
    """The loss of each token and its metrics; all [tokens]. Only `loss` carries a gradient."""

    loss: Tensor  # kl_coef * kl - rollout correction * clipped surrogate
    kl: Tensor  # estimate of KL(policy || reference); 0 without reference log-probs
    ratio: Tensor  # importance ratio policy / old policy
    clipped: Tensor  # bool: the clip or the dual clip is active, so the surrogate has no gradient


class LinearGrpoLoss(NamedTuple):
    """The result of the fused loss. Only `loss` carries a gradient."""

    loss: Tensor  # scalar: sum of token_weights * (token loss - entropy_coef * entropy)
    log_probs: Tensor  # [tokens]
    entropy: Tensor  # [tokens]; zeros if a token-level objective neither weights the entropy nor returns it
    tokens: TokenLoss  # each field [tokens]


class RowStatistics(NamedTuple):
    """Softmax statistics of each row over one part of the vocabulary; all [tokens].

    The dtype is float32, or float64 for float64 logits.
    """

    max: Tensor  # max_j x_j
    sum_exp: Tensor  # sum_j exp(d_j) with d_j = (x_j - max) / temperature
    sum_exp_shifted: Tensor  # sum_j exp(d_j) d_j; 0 if the entropy was not requested
    target: Tensor  # x_target; 0 if the target is in another part


class RowSoftmax(NamedTuple):
    """The softmax of each row over the whole vocabulary; all [tokens]."""

    max: Tensor  # max_j x_j
    log_sum: Tensor  # log sum_j exp((x_j - max) / temperature)
    log_probs: Tensor  # log p_target
    entropy: Tensor  # undefined unless the statistics were computed with the entropy
