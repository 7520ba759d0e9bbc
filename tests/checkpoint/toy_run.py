"""Training of the tiny model on random groups, with everything that a checkpoint has to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import groups, schedule
from tests.model import tiny

NUM_GROUPS = 4  # a step
LENGTHS = (5, 3)
NUM_TARGETS = NUM_GROUPS * sum(LENGTHS)


class ToyRun:
    """A run as the trainer would have it: model, optimizer and schedule at a layout, and its checkpoints."""

    def __init__(self, model_dir: Path, directory: Path, **settings: Any) -> None:
        values: dict[str, Any] = {"model": {"path": model_dir, "dtype": "float32"}}
        for section, keys in settings.items():
            values[section] = {**values.get(section, {}), **keys}
        self.config = RunConfig.model_validate(values)
        groups.initialize(self.config.parallel)
        self.model = build_model(ModelConfig.from_pretrained(model_dir), self.config)
        load_model_weights(self.model, model_dir)
        distributed, dtype = self.config.optimizer.distributed, getattr(torch, self.config.model.dtype)
        self.parallel = DistributedDataParallel(
            self.model.config,
            DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True),
            self.model,
        )
        adam = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=0.0,
            clip_grad=1.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        )
        self.optimizer = get_megatron_optimizer(adam, [self.parallel])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-3,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=8,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=8,
            wd_incr_style="constant",
        )
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.store = RunStore(directory, self.config.checkpoint)
        self.steps = 0

    def train(self, num_steps: int) -> list[tuple[float, float]]:
        """Steps on from here; the loss and the gradient's norm of each, the same on every rank."""
        return [self._step() for _ in range(num_steps)]

    def _step(self) -> tuple[float, float]:
        seeds = range(NUM_GROUPS * self.steps + groups.copy_index(), NUM_GROUPS * (self.steps + 1), groups.num_copies())
        config = self.model.config
        rows_multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        batches = [pack([_group(seed)], self.model.model_config, rows_multiple_of=rows_multiple) for seed in seeds]
        self.parallel.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = schedule.forward_backward(self.parallel, batches, self._loss)
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        self.steps += 1
        speaks = groups.speaks_for_copy()
        loss = torch.tensor(sum(one["loss"] for one in metrics) if speaks else 0.0, dtype=torch.float64)
        dist.all_reduce(loss)
        return loss.item(), float(norm)

    def _loss(self, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        loss = -self.model.log_probs(hidden, batch.target_ids).sum() / NUM_TARGETS
        return loss * groups.num_copies(), {"loss": loss.item()}  # megatron-core averages gradients over the copies

    def save(self) -> None:
        state = {"steps": self.steps, "epoch": 0.1}
        self.store.save(self.steps, self.parallel, self.optimizer, self.scheduler, state, self.config.model.path)

    def resume(self) -> int | None:
        step = self.store.latest()
        if step is not None:
            state = self.store.load(step, self.parallel, self.optimizer, self.scheduler)
            assert state == {"steps": step, "epoch": 0.1}
            self.steps = step
        return step


def _group(seed: int) -> Group:
    return Group(str(seed), tiny.prompt(("i", "", "v")[seed % 3], seed), tiny.responses(LENGTHS, seed + 1000))
