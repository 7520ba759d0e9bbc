"""Training of a tiny model on random groups: a small run with everything that a checkpoint contains."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model import cpu
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.microbatches import Microbatch
from megatron_vcr1.training.optimizer import Learner
from tests.model import tiny

GROUPS_PER_STEP = 4
RESPONSE_LENGTHS = (5, 3)  # number of tokens of the two responses of each group
TARGETS_PER_STEP = GROUPS_PER_STEP * sum(RESPONSE_LENGTHS)
OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 2, "decay": "cosine", "weight_decay": 0.1}


class ToyRun:
    """Model, optimizer and schedule under a layout, and the run's checkpoints."""

    def __init__(self, model_dir: Path, directory: Path, settings: dict[str, dict[str, Any]]) -> None:
        model = {"path": model_dir, "dtype": "float32", **settings.get("model", {})}
        optimizer = {**OPTIMIZER, **settings.get("optimizer", {})}
        self.config = RunConfig.model_validate({**settings, "model": model, "optimizer": optimizer})
        mesh.initialize(self.config.parallel)
        self.model = build_model(
            ModelConfig.from_pretrained(model_dir), self.config.model, self.config.parallel, self.config.recompute
        )
        load_model_weights(self.model, model_dir)
        self.learner = Learner(self.model, self.config.optimizer, num_steps=8)
        self.store = RunStore(directory, self.config.checkpoint)
        self.steps = 0

    def train(self, num_steps: int) -> list[tuple[float, float]]:
        """Train for some steps; return the loss and the gradient norm of each."""
        return [self._step() for _ in range(num_steps)]

    def _step(self) -> tuple[float, float]:
        first = GROUPS_PER_STEP * self.steps
        seeds = range(first + mesh.replica_index(), first + GROUPS_PER_STEP, mesh.num_replicas())
        config = self.model.model_config
        batches = [
            Microbatch(pack_for_rank([_group(seed, config)], config, pad_to_multiple_of=self.model.token_multiple))
            for seed in seeds
        ]
        update = self.learner.update(batches, self._loss)
        self.learner.end_step()
        self.steps += 1
        return update.loss, update.grad_norm

    def _loss(self, batch: Microbatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return -self.model.log_probs(hidden, batch.packed.target_ids).sum() / TARGETS_PER_STEP, {}

    def save(self) -> None:
        state = {"steps": self.steps, "epoch": 0.1}
        learner = self.learner
        self.store.save(
            self.steps, learner.ddp_model, learner.optimizer, learner.scheduler, state, self.config.model.path
        )

    def resume(self) -> int | None:
        """Resume from the newest intact checkpoint; return its step, or None if there is none."""
        step = self.store.latest()
        if step is not None:
            state = self.store.load(step, self.learner.model, self.learner.optimizer, self.learner.scheduler)
            assert state == {"steps": step, "epoch": 0.1}
            self.steps = step
        return step

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def _group(seed: int, config: ModelConfig) -> Group:
    prompt = tiny.prompt(("i", "", "v")[seed % 3], seed, timestamps=config.media.timestamps_as_text)
    return Group(str(seed), prompt, tiny.responses(RESPONSE_LENGTHS, seed + 1000))


def train_until_killed(
    rank: int, port: int, model_dir: Path, directory: Path, settings: dict[str, dict[str, Any]], reports: Connection
) -> None:
    """Run one of two ranks that save every step until it is killed. Rank 0 sends (step, loss, gradient norm)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cpu.install()
    run = ToyRun(model_dir, directory, settings)
    run.resume()
    while True:
        ((loss, norm),) = run.train(1)
        if rank == 0:
            reports.send((run.steps, loss, norm))
        run.save()
