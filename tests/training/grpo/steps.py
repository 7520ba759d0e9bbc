"""GRPO trainers on the tiny workspace, and their steps, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.train import build, read_inputs_of_rank
from tests.training import workspace

VARIETY = "tests.training.own_rewards:variety"
LETTERS = "tests.training.own_rewards:letters"


def config(folder: Path, rewards: Sequence[str] = (VARIETY,), **sections: dict[str, Any]) -> RunConfig:
    """Return the settings of a GRPO run on a workspace, with rewards that a policy gets without training."""
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False, "rewards": rewards}
    return workspace.config(folder, "grpo", data={"sources": [source]}, **sections)


def build_trainer(run: RunConfig) -> tuple[Learner, GrpoTrainer]:
    learner, trainer = build(run, read_inputs_of_rank(run, ModelConfig.from_pretrained(run.model.path)))
    assert isinstance(trainer, GrpoTrainer)
    return learner, trainer


def do_step(trainer: GrpoTrainer, step: int = 1) -> dict[str, float]:
    """Do a step and return its result and metrics in one row."""
    metrics = Metrics()
    result = trainer.step(step, metrics)
    return {"loss": result.loss, "grad_norm": result.grad_norm, "applied": result.applied, **metrics.reduce()}
