"""The GRPO objective of a microbatch, and the metrics of its forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from vcr1_kernels import LinearGrpoLoss, Objective, linear_objective_loss

from megatron_vcr1.config.training_sections import GrpoSection
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.training.grpo.batch import PolicyBatch
from megatron_vcr1.training.metrics import Metrics


def objective_from_settings(section: GrpoSection) -> Objective:
    """Return the scalar settings of the objective. The default settings give VideoChat-R1's equation 2."""
    return Objective(
        clip_low=section.clip_low,
        clip_high=section.clip_high,
        dual_clip=section.dual_clip,
        kl_coef=section.kl_coef,
        kl_estimator=section.kl_estimator,
        rollout_ratio_cap=section.rollout_ratio_cap,
        importance_level=section.importance_level,
        entropy_coef=section.entropy_coef,
    )


def grpo_loss(
    model: VideoLanguageModel, hidden: Tensor, batch: PolicyBatch, objective: Objective, *, temperature: float
) -> LinearGrpoLoss:
    """Compute the weighted sum of the objective over a microbatch's tokens, fused with the language-model head.

    Args:
        hidden: [targets, hidden_size], the last stage's output for `batch`.
        temperature: sampling temperature; log-probs are computed at the same temperature.
    """
    weight = model.head_weight()
    return linear_objective_loss(
        hidden,
        weight,
        batch.packed.target_ids,
        batch.advantages,
        objective,
        token_weights=batch.weights,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        # grpo.rollout_ratio_cap turns the rollout correction on. Without a cap the kernel must not see the engine's
        # log-probs: it would correct with an unbounded ratio.
        rollout_log_probs=None if objective.rollout_ratio_cap is None else batch.rollout_log_probs,
        segment_ids=batch.segment_ids,
        return_entropy=True,
        temperature=temperature,
        group=model.tensor_group,
        # Under megatron-core's DDP the kernel adds the head's gradient directly to the gradient buffer.
        weight_grad=getattr(weight, "main_grad", None),
    )


def policy_statistics(result: LinearGrpoLoss) -> dict[str, Tensor]:
    """Reduce the outputs of a microbatch's loss to the tensors that `add_policy_metrics` reads.

    Returns:
        "sums": float32 [4], the sums over tokens of the KL estimate, the entropy, the ratio and whether it is clipped;
        "log_probs": float32 [targets].
    """
    tokens = result.tokens
    columns = (tokens.kl, result.entropy, tokens.ratio, tokens.clipped.float())
    return {"sums": torch.stack([column.sum() for column in columns]), "log_probs": result.log_probs}


def add_policy_metrics(
    metrics: Metrics, statistics: Mapping[str, Tensor], batch: PolicyBatch, *, with_mismatch: bool
) -> None:
    """Add a microbatch's `policy_statistics` to the metrics of the step.

    Args:
        with_mismatch: also compare the policy's log-probs with those of the engine. Only meaningful in the first pass
            over a rollout.
    """
    log_probs = statistics["log_probs"]
    num_tokens = len(log_probs)
    names = ("kl", "entropy", "ratio/mean", "clip_fraction")
    for name, total in zip(names, statistics["sums"].tolist(), strict=True):
        if name != "kl" or batch.ref_log_probs is not None:  # without a reference the KL is unknown, not 0
            metrics.add_to_mean(name, total, num_tokens)
    if with_mismatch and num_tokens:  # a context-parallel rank may have no response
        # The engine sampled before the first update of the step. With several minibatches in a pass, `log_probs` may
        # already come from an updated policy.
        before = log_probs if batch.old_log_probs is None else batch.old_log_probs
        absolute, largest, kl = mismatch(before, batch.rollout_log_probs)
        metrics.add_to_mean("mismatch/mean_abs", absolute, num_tokens)
        metrics.update_max("mismatch/max_abs", largest)
        metrics.add_to_mean("mismatch/kl", kl, num_tokens)


def mismatch(log_probs: Tensor, rollout_log_probs: Tensor) -> tuple[float, float, float]:
    """Compare the log-probs of training and of the engine, for tokens that the engine sampled; both [tokens].

    Returns:
        The sum of the absolute differences, the largest absolute difference, and the sum of the k3 estimates of
        KL(engine || training).
    """
    delta = log_probs - rollout_log_probs
    return float(delta.abs().sum()), float(delta.abs().max()), float((torch.expm1(delta) - delta).sum())
