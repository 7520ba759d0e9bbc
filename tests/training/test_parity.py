"""Steps of SFT and GRPO against the same steps with transformers' model, torch's autograd and torch's AdamW."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.grpo.scoring import ScoredGroup, StepGroups
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import PromptStream
from megatron_vcr1.training.targets import TargetEncoder, completion_text
from megatron_vcr1.training.train import build
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("parity"), num_videos=6)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(RunConfig.model_validate({"model": {"path": "model"}}).parallel):
        yield


class TransformersLearner:
    """The published model, trained with nothing of ours but the prompts."""

    def __init__(self, model_dir: Path) -> None:
        self.config = ModelConfig.from_pretrained(model_dir)
        self.model = self._load(model_dir)
        self.reference = self._load(model_dir).requires_grad_(False)
        matrices = [one for one in self.model.parameters() if one.dim() > 1]
        vectors = [one for one in self.model.parameters() if one.dim() == 1]
        decayed = {"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}
        self.optimizer = torch.optim.AdamW(
            [decayed, {"params": vectors, "weight_decay": 0.0}], lr=OPTIMIZER["learning_rate"], eps=OPTIMIZER["epsilon"]
        )

    @staticmethod
    def _load(model_dir: Path) -> torch.nn.Module:
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        return kind.from_pretrained(model_dir, dtype=torch.float32).train()

    def log_probs(self, prompt: EncodedPrompt, response: Tensor, model: torch.nn.Module | None = None) -> Tensor:
        logits = tiny.transformers_logits(model or self.model, self.config, prompt, response)
        return logits.double().log_softmax(-1).gather(1, response[:, None])[:, 0]

    def step(self, loss: Tensor, number: int) -> tuple[float, float]:
        """Backward and AdamW; the loss and the gradient's norm."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER["max_grad_norm"])
        span = OPTIMIZER["learning_rate"] - OPTIMIZER["min_learning_rate"]
        for group in self.optimizer.param_groups:
            group["lr"] = OPTIMIZER["learning_rate"] - span * number / NUM_STEPS
        self.optimizer.step()
        return loss.item(), norm.item()


def test_sft_is_cross_entropy_with_adamw(folder: Path, world: None) -> None:
    config = workspace.config(folder, "sft", optimizer=OPTIMIZER, train={"num_steps": NUM_STEPS})
    _, trainer, _ = build(config)
    theirs = TransformersLearner(config.model.path)
    processor = PromptProcessor.from_pretrained(config.model.path)
    stream, targets = PromptStream(config.data, processor, seed=config.train.seed), TargetEncoder(processor)
    for number in range(NUM_STEPS):
        prompts = stream.take(config.train.prompts_per_step)
        answers = [targets.encode(completion_text(one.sample, stream.templates, thinking=False)) for one in prompts]
        log_probs = [theirs.log_probs(one.prompt, answer) for one, answer in zip(prompts, answers, strict=True)]
        loss, norm = theirs.step(-torch.cat(log_probs).mean(), number)
        result = trainer.step(number + 1, Metrics())
        assert result.applied
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def papers_objective(theirs: TransformersLearner, sampled: StepGroups, kl_coef: float) -> Tensor:
    """Equations 1 and 2 of VideoChat-R1, response by response: minus the mean over responses of the mean over tokens
    of ratio times advantage, less the KL to the reference (k3).
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


def test_grpo_is_the_papers_equations_with_adamw(folder: Path, world: None) -> None:
    kl_coef = 0.4  # a KL term that shows
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
    _, trainer, _ = build(config)
    assert isinstance(trainer, GrpoTrainer)
    theirs = TransformersLearner(config.model.path)
    sampled = _watch(trainer)
    for number in range(NUM_STEPS):
        result = trainer.step(number + 1, Metrics())
        loss, norm = theirs.step(papers_objective(theirs, sampled[-1], kl_coef), number)
        assert result.applied and norm > 0.01
        assert result.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def _watch(trainer: GrpoTrainer) -> list[StepGroups]:
    """What the trainer learns from, as it comes."""
    sampled: list[StepGroups] = []
    refill = trainer._rollouts.refill

    def watched(groups: list[ScoredGroup], metrics: Metrics) -> StepGroups:
        sampled.append(refill(groups, metrics))
        return sampled[-1]

    trainer._rollouts.refill = watched  # type: ignore[method-assign]
    return sampled
