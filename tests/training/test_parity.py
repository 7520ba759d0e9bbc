"""SFT and GRPO steps match a reference made of transformers' model, torch's autograd and torch's AdamW."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.grpo.rollout_source import StepGroups
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import PromptStream
from megatron_vcr1.training.targets import TargetEncoder, completion_text
from megatron_vcr1.training.train import build, read_inputs_of_rank
from tests.model import tiny
from tests.training import workspace

NUM_STEPS = 3
OPTIMIZER = {
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
    "decay": "linear",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "epsilon": 1e-6,
}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("parity"), family=request.param, num_videos=6)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


class TransformersLearner:
    """The transformers model with torch's AdamW; only the prompts come from this package."""

    def __init__(self, model_dir: Path) -> None:
        self.config = ModelConfig.from_pretrained(model_dir)
        self.model = self._load(model_dir)
        self.reference = self._load(model_dir).requires_grad_(False)
        matrices = [weight for weight in self.model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self.model.parameters() if weight.dim() == 1]
        decayed = {"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}
        self.optimizer = torch.optim.AdamW(
            [decayed, {"params": vectors, "weight_decay": 0.0}], lr=OPTIMIZER["learning_rate"], eps=OPTIMIZER["epsilon"]
        )

    @staticmethod
    def _load(model_dir: Path) -> torch.nn.Module:
        kind = transformers.AutoModelForImageTextToText
        return kind.from_pretrained(model_dir, dtype=torch.float32).train()

    def log_probs(self, prompt: EncodedPrompt, response: Tensor, model: torch.nn.Module | None = None) -> Tensor:
        logits = tiny.transformers_logits(model or self.model, self.config, prompt, response)
        return logits.double().log_softmax(-1).gather(1, response[:, None])[:, 0]

    def step(self, loss: Tensor, number: int) -> tuple[float, float]:
        """Do backward, clipping and an AdamW step; return the loss and the gradient norm before clipping."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER["max_grad_norm"])
        span = OPTIMIZER["learning_rate"] - OPTIMIZER["min_learning_rate"]
        for group in self.optimizer.param_groups:
            group["lr"] = OPTIMIZER["learning_rate"] - span * number / NUM_STEPS
        self.optimizer.step()
        return loss.item(), norm.item()


def test_sft_matches_cross_entropy_with_adamw(folder: Path, world: None) -> None:
    config = workspace.config(folder, "sft", optimizer=OPTIMIZER, train={"num_steps": NUM_STEPS})
    _, trainer = build(config, read_inputs_of_rank(config, ModelConfig.from_pretrained(config.model.path)))
    theirs = TransformersLearner(config.model.path)
    processor = PromptProcessor.from_pretrained(config.model.path, ModelConfig.from_pretrained(config.model.path))
    stream, targets = PromptStream(config.data, processor, seed=config.train.seed), TargetEncoder(processor)
    for number in range(NUM_STEPS):
        prompts = stream.take(config.train.prompts_per_step)
        responses = [
            targets.encode(completion_text(prompt.sample, stream.templates, thinking=False)) for prompt in prompts
        ]
        log_probs = [
            theirs.log_probs(prompt.prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        ]
        loss, norm = theirs.step(-torch.cat(log_probs).mean(), number)
        result = trainer.step(number + 1, Metrics())
        assert result.applied
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def paper_objective(theirs: TransformersLearner, sampled: StepGroups, kl_coef: float) -> Tensor:
    """Compute equations 1 and 2 of VideoChat-R1, response by response.

    The objective is the mean over responses of the mean over tokens of (ratio * advantage - kl_coef * KL), with the k3
    estimate of the KL to the reference; the loss is its negative.
    """
    terms = []
    for group in sampled.kept:
        rewards = [reward.total for reward in group.rewards]
        mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
        for rollout, reward in zip(group.rollouts, rewards, strict=True):
            response = torch.tensor(rollout.token_ids)
            log_probs = theirs.log_probs(group.prompt.prompt, response)
            reference = theirs.log_probs(group.prompt.prompt, response, theirs.reference)
            ratio = (log_probs - log_probs.detach()).exp()
            kl = (reference - log_probs).exp() - (reference - log_probs) - 1
            advantage = (reward - mean) / (deviation + 1e-4)
            terms.append((ratio * advantage - kl_coef * kl).mean())
    return -torch.stack(terms).mean()


def test_grpo_matches_the_paper_with_adamw(folder: Path, world: None) -> None:
    kl_coef = 0.4  # large enough to matter in the loss
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = ["tests.training.own_rewards:variety", "tests.training.own_rewards:letters"]
    base = workspace.config(folder, "grpo")
    config = workspace.config(
        folder,
        "grpo",
        optimizer=OPTIMIZER,
        train={"num_steps": NUM_STEPS, "microbatch_tokens": 250},
        grpo={"group_size": 3, "kl_coef": kl_coef},
        data={**base.data.model_dump(), "sources": [source]},
    )
    _, trainer = build(config, read_inputs_of_rank(config, ModelConfig.from_pretrained(config.model.path)))
    assert isinstance(trainer, GrpoTrainer)
    theirs = TransformersLearner(config.model.path)
    sampled = _record_groups(trainer)
    for number in range(NUM_STEPS):
        result = trainer.step(number + 1, Metrics())
        loss, norm = theirs.step(paper_objective(theirs, sampled[-1], kl_coef), number)
        assert result.applied and norm > 0.01
        assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def _record_groups(trainer: GrpoTrainer) -> list[StepGroups]:
    """Return a list to which the groups of each step are added as the trainer gets them."""
    sampled: list[StepGroups] = []
    next_groups = trainer._source.next_groups

    def record(step: int, metrics: Metrics) -> StepGroups:
        sampled.append(next_groups(step, metrics))
        return sampled[-1]

    trainer._source.next_groups = record  # type: ignore[method-assign]
    return sampled
