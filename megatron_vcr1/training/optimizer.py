"""The optimizer's side of a step: gradients summed over the copies of the model, clipped, checked and applied."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_vcr1.config.training_sections import OptimizerSection
from megatron_vcr1.model.cpu import adam
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.parallel import collectives, mesh, schedule

logger = logging.getLogger(__name__)

Loss = Callable[[PackedBatch, Tensor], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step.

    Attributes:
        loss: over all ranks.
        grad_norm: of the whole model, before clipping.
        applied: False: the loss or the gradient is not finite, and no weight has changed.
        metrics: what the loss function said of each microbatch, on the last stage; empty on the others.
    """

    loss: float
    grad_norm: float
    applied: bool
    metrics: list[dict[str, Any]]


class Learner:
    """A model with what makes it learn. The ranks of the job call its methods together."""

    def __init__(self, model: QwenVLModel, section: OptimizerSection, num_steps: int) -> None:
        """Call it before anything keeps the parameters' memory: the distributed optimizer moves them into one buffer.

        Args:
            num_steps: of the run, where the learning rate's decay ends; more than those of the warm-up.
        """
        logger.info("optimizer: %s", adam.adam_in_use())
        model.config.finalize_model_grads_func = _finalize_gradients
        self.model = model
        self.max_grad_norm = section.max_grad_norm
        # With one copy there is nothing to divide, and megatron-core would still copy all weights and gradients.
        divided = section.distributed and mesh.num_replicas() > 1
        self.parallel = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(use_distributed_optimizer=divided, grad_reduce_in_fp32=True),
            model,
        )
        _fuse_gradient_accumulation(model)
        self.optimizer = _optimizer(self.parallel, section, divided=divided)
        self.scheduler = _scheduler(self.optimizer, section, num_steps)

    def update(self, batches: Sequence[PackedBatch], loss: Loss) -> Update:
        """One optimizer step on the sum of the losses of all microbatches of all copies of the model.

        Args:
            batches: this copy's microbatches; may be none where other copies have some.
            loss: of a microbatch and the hidden states of its targets: a scalar, normalised by counts over all copies,
                and metrics.
        """
        self.parallel.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model.train()
        results = self._forward_backward(batches, loss)
        mine = sum(float(value) for value, _ in results) if mesh.is_output_rank() else 0.0
        (total,) = collectives.sum_over_ranks([mine])
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        applied = math.isfinite(total) and math.isfinite(grad_norm)
        if applied:
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        return Update(total, grad_norm, applied, [metrics for _, metrics in results])

    def _forward_backward(self, batches: Sequence[PackedBatch], loss: Loss) -> list[tuple[Tensor, dict[str, Any]]]:
        """Leaves the gradients in the buffers; the loss and metrics of each microbatch, on the last stage."""

        def with_value(batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Any]]]:
            value, metrics = loss(batch, hidden)
            return value, (value.detach(), metrics)

        if batches:
            return schedule.forward_backward(self.parallel, batches, with_value)
        _finalize_gradients([self.parallel])
        return []

    def _clip(self, grad_norm: float) -> None:
        if 0 < self.max_grad_norm < grad_norm:  # a pass over all gradients, which changes nothing below
            for one in self.optimizer.chained_optimizers:
                torch.nn.utils.clip_grads_with_norm_(one.get_parameters(), self.max_grad_norm, torch.tensor(grad_norm))

    def end_step(self) -> float:
        """Move the learning rate on, after the updates of a step; returns the one that they had."""
        learning_rate = float(self.scheduler.get_lr({}))
        self.scheduler.step(1)
        return learning_rate


def _finalize_gradients(models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """megatron-core's sums over ranks; it would divide by the number of tokens, by which the losses are already."""
    finalize_model_grads(models, None, **kwargs)


def _fuse_gradient_accumulation(model: QwenVLModel) -> None:
    """Have linear layers add their weights' gradients to the buffers themselves, which spares a tensor and a pass each.

    megatron-core's own do with Apex's extension, or on a CPU (`model.cpu`); TransformerEngine's always.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        elif hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = layers._grad_accum_fusion_available
    if not layers._grad_accum_fusion_available:
        logger.info("gradients: megatron-core's linear layers add theirs in a second pass, without Apex's extension")


def _optimizer(parallel: DistributedDataParallel, section: OptimizerSection, *, divided: bool) -> ChainedOptimizer:
    dtype = next(parallel.module.parameters()).dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.epsilon,
        clip_grad=section.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=divided,
    )
    return get_megatron_optimizer(config, [parallel])


def _scheduler(optimizer: ChainedOptimizer, section: OptimizerSection, num_steps: int) -> OptimizerParamScheduler:
    """megatron-core's; it also keeps weight decay away from biases and norms, which nothing else does."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style=section.decay,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,  # the settings count, also when a run is resumed with others
        override_opt_param_scheduler=True,
    )
