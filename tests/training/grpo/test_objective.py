"""Every option of [grpo] against the formulas of its paper, implemented again in float64 on a toy policy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from vcr1_kernels import LinearGrpoLoss

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.training_sections import GrpoSection
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.grpo.batch import Counts, PolicyBatch, token_weights
from megatron_vcr1.training.grpo.objective import (
    add_policy_metrics,
    grpo_loss,
    mismatch,
    objective_from_settings,
    policy_statistics,
)
from megatron_vcr1.training.metrics import Metrics

LENGTHS = (4, 1, 7, 3)
MAX_NEW_TOKENS = 10
VOCAB_SIZE, HIDDEN_SIZE = 11, 6
TEMPERATURE = 0.8


class Toy:
    """A policy that is a linear layer, with log-probs of an old policy, a reference and an engine for its rollout."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        num_tokens = sum(LENGTHS)
        lengths = torch.tensor(LENGTHS)
        self.weight = normal(VOCAB_SIZE, HIDDEN_SIZE)
        self.hidden = normal(num_tokens, HIDDEN_SIZE)
        self.targets = torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator)
        log_probs = self.log_probs(self.hidden, self.weight)
        packed = cast(PackedBatch, SimpleNamespace(target_ids=self.targets))
        self.batch = PolicyBatch(
            packed,
            advantages=torch.tensor([1.2, 0.7, -0.4, -1.5], dtype=torch.float64).repeat_interleave(lengths),
            rollout_log_probs=log_probs + 0.3 * normal(num_tokens),
            segment_ids=torch.arange(len(LENGTHS)).repeat_interleave(lengths),
            weights=torch.ones(num_tokens, dtype=torch.float64),
            ref_log_probs=log_probs + 0.5 * normal(num_tokens),
            old_log_probs=log_probs + 0.4 * normal(num_tokens),
        )

    def all_log_probs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T / TEMPERATURE).log_softmax(-1)

    def log_probs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self.all_log_probs(hidden, weight).gather(1, self.targets[:, None])[:, 0]

    def fused(self, section: GrpoSection, batch: PolicyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and its gradients with respect to hidden and weight, as training computes them."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        model = cast(VideoLanguageModel, SimpleNamespace(head_weight=lambda: weight, tensor_group=None))
        objective = objective_from_settings(section)
        counts = Counts(len(LENGTHS), sum(LENGTHS))
        weights = token_weights(LENGTHS, counts, section.loss_normalization, MAX_NEW_TOKENS).double()
        result = grpo_loss(model, hidden, replace(batch, weights=weights), objective, temperature=TEMPERATURE)
        return (result.loss.detach(), *torch.autograd.grad(result.loss, (hidden, weight)))

    def expected(self, section: GrpoSection, batch: PolicyBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the same from the papers' formulas, response by response, with autograd."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        vocab_log_probs = self.all_log_probs(hidden, weight)
        log_probs = self.log_probs(hidden, weight)
        entropy = -(vocab_log_probs.exp() * vocab_log_probs).sum(-1)
        old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        responses = []
        for tokens in torch.arange(sum(LENGTHS)).split(LENGTHS):
            losses = _token_losses(section, log_probs[tokens], old[tokens], batch, tokens)
            responses.append(losses - section.entropy_coef * entropy[tokens])
        match section.loss_normalization:
            case "sequence":
                loss = torch.stack([losses.mean() for losses in responses]).mean()
            case "token":
                loss = torch.cat(responses).mean()
            case "constant":
                loss = torch.stack([losses.sum() / MAX_NEW_TOKENS for losses in responses]).mean()
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def _token_losses(section: GrpoSection, log_probs: Tensor, old: Tensor, batch: PolicyBatch, tokens: Tensor) -> Tensor:
    """Return the losses of one response's tokens; `tokens` are their indices in the batch."""
    advantage = batch.advantages[tokens]
    if section.importance_level == "sequence":  # GSPO-token: the sequence's ratio with each token's own gradient
        sequence = (log_probs.detach() - old).mean()
        ratio = (log_probs - log_probs.detach() + sequence).exp()
    else:
        ratio = (log_probs - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - section.clip_low, 1 + section.clip_high) * advantage)
    if section.dual_clip is not None:
        bounded = torch.maximum(surrogate, section.dual_clip * advantage)
        surrogate = torch.where(advantage < 0, bounded, surrogate)
    if section.rollout_ratio_cap is not None:
        surrogate = surrogate * (old - batch.rollout_log_probs[tokens]).exp().clamp(max=section.rollout_ratio_cap)
    loss = -surrogate
    if batch.ref_log_probs is not None:
        delta = log_probs - batch.ref_log_probs[tokens]
        estimates = {"k1": delta, "k2": delta**2 / 2, "k3": (-delta).exp() + delta - 1}
        loss = loss + section.kl_coef * estimates[section.kl_estimator]
    return loss


ON_POLICY = {"old_log_probs": None}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, None]]] = {
    "paper": ({}, ON_POLICY),
    "no-reference": ({"kl_coef": 0.0}, ON_POLICY | {"ref_log_probs": None}),
    "k1": ({"kl_estimator": "k1", "kl_coef": 0.5}, ON_POLICY),
    "k2": ({"kl_estimator": "k2", "kl_coef": 0.5}, ON_POLICY),
    "several-updates": ({}, {}),
    "clip-higher": ({"clip_low": 0.1, "clip_high": 0.5}, {}),
    "dual-clip": ({"dual_clip": 1.05}, {}),
    "dr-grpo": ({"loss_normalization": "constant", "kl_coef": 0.0}, {"ref_log_probs": None}),
    "dapo": (
        {"loss_normalization": "token", "kl_coef": 0.0, "clip_high": 0.28},
        {"ref_log_probs": None},
    ),
    "gspo": ({"importance_level": "sequence", "clip_low": 0.03, "clip_high": 0.04}, {}),
    "gspo-on-policy": ({"importance_level": "sequence"}, ON_POLICY),
    "entropy-bonus": ({"entropy_coef": 0.2}, {}),
    "truncated-importance-sampling": ({"rollout_ratio_cap": 1.1}, {}),
    "truncated-importance-sampling-on-policy": ({"rollout_ratio_cap": 1.1}, ON_POLICY),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_match_their_papers_formulas(option: str) -> None:
    settings, absent = OPTIONS[option]
    section, toy = GrpoSection.model_validate(settings), Toy()
    batch = replace(toy.batch, **absent)
    for got, expected in zip(toy.fused(section, batch), toy.expected(section, batch), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # weights are float32


@pytest.mark.parametrize("option", [name for name in OPTIONS if OPTIONS[name][0] and name != "no-reference"])
def test_options_change_the_gradient(option: str) -> None:
    settings, absent = OPTIONS[option]
    toy = Toy()
    batch = replace(toy.batch, **absent)
    _, *gradients = toy.fused(GrpoSection.model_validate(settings), batch)
    _, *default = toy.fused(GrpoSection(), batch)
    if option == "gspo-on-policy":  # both ratios are 1
        torch.testing.assert_close(gradients, default)
    else:
        assert any(not torch.allclose(one, other) for one, other in zip(gradients, default, strict=True))


def test_statistics_and_mismatch() -> None:
    toy = Toy()
    result = _paper_result(toy)
    log_probs = toy.log_probs(toy.hidden, toy.weight)
    vocab_log_probs = toy.all_log_probs(toy.hidden, toy.weight)
    assert toy.batch.old_log_probs is not None
    ratio = (log_probs - toy.batch.old_log_probs).exp()
    clipped = torch.where(toy.batch.advantages > 0, ratio > 1.2, ratio < 0.8)
    kl, entropy, total_ratio, num_clipped = policy_statistics(result)["sums"].tolist()
    assert kl == pytest.approx(result.tokens.kl.sum().item())
    assert entropy == pytest.approx(-(vocab_log_probs.exp() * vocab_log_probs).sum().item())
    assert total_ratio == pytest.approx(ratio.sum().item())
    assert num_clipped == clipped.sum().item() > 0
    delta = log_probs - toy.batch.rollout_log_probs
    absolute, largest, engine_kl = mismatch(log_probs, toy.batch.rollout_log_probs)
    assert (absolute, largest) == pytest.approx((delta.abs().sum().item(), delta.abs().max().item()))
    assert engine_kl == pytest.approx((delta.exp() - 1 - delta).sum().item())


def test_mismatch_compares_the_policy_before_the_first_update() -> None:
    toy = Toy()
    statistics = policy_statistics(_paper_result(toy))
    with mesh.world(ParallelSection()):
        metrics = Metrics()
        add_policy_metrics(metrics, statistics, toy.batch, with_mismatch=True)
        row = metrics.reduce()
        assert toy.batch.old_log_probs is not None
        delta = toy.batch.old_log_probs - toy.batch.rollout_log_probs
        assert row["mismatch/mean_abs"] == pytest.approx(delta.abs().mean().item())
        assert row["mismatch/max_abs"] == pytest.approx(delta.abs().max().item())
        without = Metrics()
        add_policy_metrics(without, statistics, replace(toy.batch, ref_log_probs=None), with_mismatch=False)
        row = without.reduce()
    assert not {"kl", "mismatch/mean_abs"} & row.keys() and row["ratio/mean"] > 0


def _paper_result(toy: Toy) -> LinearGrpoLoss:
    model = cast(VideoLanguageModel, SimpleNamespace(head_weight=lambda: toy.weight, tensor_group=None))
    return grpo_loss(model, toy.hidden, toy.batch, objective_from_settings(GrpoSection()), temperature=TEMPERATURE)
