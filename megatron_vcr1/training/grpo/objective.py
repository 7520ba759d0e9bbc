"""The GRPO objective of a microbatch: settings and rollouts to the arguments of the fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from vcr1_kernels import LinearGrpoLoss, Objective, linear_objective_loss

from megatron_vcr1.config.training_sections import GrpoSection
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.qwen_vl import QwenVLModel


@dataclass(frozen=True, slots=True)
class TokenData:
    """What the objective knows of each target of a microbatch, on the device; all [targets], in the order of the batch.

    Attributes:
        segment_ids: the response of each token.
        ref_log_probs: the reference's; None without a KL term.
        old_log_probs: the policy's before the first update of the step; None if this is the first and only one.
    """

    advantages: Tensor
    rollout_log_probs: Tensor
    segment_ids: Tensor
    ref_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None

    def to(self, device: torch.device) -> TokenData:
        """The same on a device."""
        values: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Counts:
    """What a loss is normalised by: over all copies of the model, in one optimizer step."""

    num_responses: float
    num_tokens: float


def token_weights(
    response_lengths: Sequence[int],
    counts: Counts,
    normalization: Literal["sequence", "token", "constant"],
    max_new_tokens: int,
) -> Tensor:
    """The weight of each token's loss in the step's; [targets], float32.

    'sequence': 1 / (responses * tokens of its response), GRPO's mean of means. 'token': 1 / tokens, DAPO's.
    'constant': 1 / (responses * most tokens of a response), Dr.GRPO's.
    """
    lengths = torch.tensor(response_lengths)
    match normalization:
        case "sequence":
            each = 1 / (counts.num_responses * lengths.double())
        case "token":
            each = torch.full((len(lengths),), 1 / counts.num_tokens, dtype=torch.float64)
        case "constant":
            each = torch.full((len(lengths),), 1 / (counts.num_responses * max_new_tokens), dtype=torch.float64)
    return each.float().repeat_interleave(lengths)


def grpo_loss(
    model: QwenVLModel,
    hidden: Tensor,
    batch: PackedBatch,
    data: TokenData,
    weights: Tensor,
    section: GrpoSection,
    *,
    temperature: float,
) -> LinearGrpoLoss:
    """VideoChat-R1's equation 2 by default, and what the settings make of it.

    Args:
        hidden: [targets, hidden_size], the last stage's output for `batch`.
        weights: [targets], see `token_weights`.
        temperature: of the sampling, which the log-probs are those of.
    """
    weight = model.head_weight()
    objective = Objective(
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
        kl_coef=section.kl_coef,
        kl_estimator=section.kl_estimator,
        rollout_ratio_cap=section.rollout_ratio_cap,
        importance_level=section.importance_level,
        entropy_coef=section.entropy_coef,
    )
    return linear_objective_loss(
        hidden,
        weight,
        batch.target_ids,
        data.advantages,
        objective,
        token_weights=weights,
        old_log_probs=data.old_log_probs,
        ref_log_probs=data.ref_log_probs,
        rollout_log_probs=None if section.rollout_ratio_cap is None else data.rollout_log_probs,
        segment_ids=data.segment_ids,
        return_entropy=True,
        temperature=temperature,
        group=model.tensor_group,
        weight_grad=getattr(weight, "main_grad", None),  # megatron-core's gradient buffer
    )


def policy_statistics(result: LinearGrpoLoss) -> dict[str, Tensor]:
    """For metrics: "sums" over a microbatch's tokens of kl, entropy, ratio and clipped, and their "log_probs"."""
    tokens = result.tokens
    columns = (tokens.kl, result.entropy, tokens.ratio, tokens.clipped.float())
    return {"sums": torch.stack([column.sum() for column in columns]), "log_probs": result.log_probs}


def mismatch(log_probs: Tensor, rollout_log_probs: Tensor) -> tuple[float, float, float]:
    """How far the training's log-probs are from the engine's, of tokens that the engine sampled; both [tokens].

    Returns:
        The sum of absolute differences, the largest one, and the sum of the k3 estimates of KL(engine || training).
    """
    delta = log_probs - rollout_log_probs
    return float(delta.abs().sum()), float(delta.abs().max()), float((torch.expm1(delta) - delta).sum())
