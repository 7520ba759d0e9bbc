"""Optimizer steps: gradients are reduced over the replicas, checked, clipped and applied."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_vcr1.config.training_sections import OptimizerSection
from megatron_vcr1.model.cpu import adam
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import collectives, mesh, schedule
from megatron_vcr1.training.host_state import HostState
from megatron_vcr1.training.microbatches import Microbatch
from megatron_vcr1.training.overlapped_gather import OverlappedGather
from megatron_vcr1.training.overlapped_reduction import OverlappedReduction

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=Microbatch)
Loss = Callable[[Batch, Tensor], tuple[Tensor, dict[str, Any]]]
"""Maps a microbatch and the last stage's hidden states of its targets to a scalar loss and metrics."""


@dataclass(frozen=True, slots=True)
class Update:
    """The outcome of one optimizer step.

    Attributes:
        loss: sum over the microbatches of all replicas.
        grad_norm: norm of the whole model's gradient before clipping.
        applied: False if the loss or the gradient norm is not finite; no weight has changed then.
        metrics: the loss function's metrics for each microbatch, on the last stage; empty on other stages.
    """

    loss: float
    grad_norm: float
    applied: bool
    metrics: list[dict[str, Any]]


class Learner:
    """The trained model with its gradient buffers, optimizer and learning-rate schedule.

    All ranks of the job must call the methods together.
    """

    def __init__(self, model: VideoLanguageModel, section: OptimizerSection, num_steps: int) -> None:
        """Wrap the model in megatron-core's data parallelism and build its optimizer.

        The distributed optimizer moves the parameters into one buffer: build the learner before anything keeps a
        reference to the parameters' memory.

        Args:
            num_steps: length of the run, at which the learning rate's decay ends; greater than the warm-up.
        """
        model.config.finalize_model_grads_func = finalize_gradients
        self.model = model
        self.max_grad_norm = section.max_grad_norm
        # If no other rank holds the same weights, there is nothing to shard the optimizer state over, but
        # megatron-core's distributed optimizer would still copy all weights and gradients at every step.
        is_distributed = section.distributed and mesh.num_weight_holders() > 1
        overlaps_gather = section.overlap_param_gather and is_distributed
        if section.overlap_param_gather and not is_distributed:
            logger.info("optimizer.overlap_param_gather has no effect: no other rank holds the same weights")
        self.ddp_model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=is_distributed,
                grad_reduce_in_fp32=section.grad_dtype == "float32",
                overlap_grad_reduce=section.overlap_grad_reduce,
                overlap_param_gather=overlaps_gather,
                align_param_gather=overlaps_gather,  # modules only wait for their parameters
            ),
            model,
        )
        self._reduction = OverlappedReduction(self.ddp_model) if section.overlap_grad_reduce else None
        self._gather = OverlappedGather(self.ddp_model) if overlaps_gather else None
        _fuse_gradient_accumulation(model)
        self.optimizer = _build_optimizer(self.ddp_model, section, is_distributed=is_distributed)
        self._host_state = HostState(self.optimizer) if section.state == "host" else None
        self.scheduler = _build_scheduler(self.optimizer, section, num_steps)

    def update(self, batches: Sequence[Batch], loss: Loss[Batch]) -> Update:
        """Do one optimizer step on the sum of the losses of all microbatches of all replicas.

        Args:
            batches: this replica's microbatches. May be empty if other replicas have microbatches: this replica still
                takes part in the gradient reduction.
            loss: its scalar must be normalized by counts over all replicas (see `schedule.forward_backward`).
        """
        self.ddp_model.zero_grad_buffer()
        if self._reduction is not None:
            self._reduction.reset()
        self.model.train()
        results = self._forward_backward(batches, loss)
        local_loss = sum(float(value) for value, _ in results) if mesh.is_loss_rank() else 0.0
        (total_loss,) = collectives.sum_over_ranks([local_loss])
        with nullcontext() if self._host_state is None else self._host_state.on_device():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            # Loss and norm are the same on every rank, so all ranks take the same decision here.
            applied = math.isfinite(total_loss) and math.isfinite(grad_norm)
            if applied:
                self._clip_gradients(grad_norm)
                self.optimizer.step_with_ready_grads()
            self.optimizer.zero_grad()  # frees the optimizer's float32 copies of bfloat16 gradients
        if self._gather is not None:
            self._gather.start()
        return Update(total_loss, grad_norm, applied, [metrics for _, metrics in results])

    def _forward_backward(self, batches: Sequence[Batch], loss: Loss[Batch]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Compute the gradients into the buffers and reduce them over the replicas.

        Returns:
            The loss and metrics of each microbatch on the last stage; an empty list on other stages.
        """

        def loss_and_results(batch: Batch, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Any]]]:
            value, metrics = loss(batch, hidden)
            return value, (value.detach(), metrics)

        if batches:
            return schedule.forward_backward(
                self.ddp_model, batches, loss_and_results, model_input=lambda batch: batch.packed
            )
        self.wait_for_parameters()  # as a forward pass would have done
        # The schedule calls this at its end. A replica without microbatches must call it, too: otherwise the gradient
        # reduction of the other replicas would hang.
        if self._reduction is not None:
            self._reduction.start_all()
        finalize_gradients([self.ddp_model])
        return []

    def _clip_gradients(self, grad_norm: float) -> None:
        if 0 < self.max_grad_norm < grad_norm:  # below the limit, clipping would be a useless pass over all gradients
            for optimizer in self.optimizer.chained_optimizers:
                torch.nn.utils.clip_grads_with_norm_(
                    optimizer.get_parameters(), self.max_grad_norm, torch.tensor(grad_norm)
                )

    def wait_for_parameters(self) -> None:
        """Wait until all parameters have the values of the last update. Call it before reading them.

        Not needed before a forward pass of the model. Without optimizer.overlap_param_gather it does nothing.
        """
        if self._gather is not None:
            self._gather.wait()

    def release_gradients(self) -> None:
        """Free the memory of the gradient buffers until `restore_gradients`, for servers that share the GPU."""
        self.ddp_model.offload_grad_buffers()

    def restore_gradients(self) -> None:
        """Allocate the gradient buffers again, as zeros, if `release_gradients` has freed them."""
        self.ddp_model.restore_grad_buffers(synchronize=False)

    def end_step(self) -> float:
        """Advance the learning rate after the updates of a step, and return the rate that they used."""
        learning_rate = float(self.scheduler.get_lr({}))
        self.scheduler.step(1)
        return learning_rate


def finalize_gradients(models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce the gradients over ranks with megatron-core, without its division by the number of tokens.

    The losses are already normalized by counts over all replicas.
    """
    finalize_model_grads(models, None, **kwargs)
    for model in models:
        if model.module.vision_tower is not None:
            model.module.vision_tower.sum_gradients()


def _fuse_gradient_accumulation(model: VideoLanguageModel) -> None:
    """Let linear layers add their weight gradients directly to the gradient buffers.

    This saves a temporary tensor and a pass per weight. megatron-core's layers can do it with Apex's extension or with
    `model.cpu.weight_gradients`; TransformerEngine's layers always can.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine
            module.fuse_wgrad_accumulation = True
        elif hasattr(module, "gradient_accumulation_fusion"):  # megatron-core
            assert layers._grad_accum_fusion_available, "call model.cpu.install first"
            module.gradient_accumulation_fusion = True


def _build_optimizer(
    ddp_model: DistributedDataParallel, section: OptimizerSection, *, is_distributed: bool
) -> ChainedOptimizer:
    dtype = next(ddp_model.module.parameters()).dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.epsilon,
        clip_grad=section.max_grad_norm,
        bf16=dtype == torch.bfloat16,  # float32 master weights and optimizer state
        params_dtype=dtype,
        use_distributed_optimizer=is_distributed,
    )
    optimizer = get_megatron_optimizer(config, [ddp_model])
    _store_moments_as(
        optimizer, getattr(torch, section.first_moment_dtype), getattr(torch, section.second_moment_dtype)
    )
    return optimizer


def _store_moments_as(optimizer: ChainedOptimizer, first: torch.dtype, second: torch.dtype) -> None:
    """Replace megatron-core's Adams by ours if moments are not float32.

    TransformerEngine's Adam can store such moments as well, but not every machine has it, and a run must be able to
    resume on one that has not.
    """
    if first == second == torch.float32:
        logger.info("optimizer: %s", adam.adam_in_use())
        return
    logger.info("optimizer: torch's fused AdamW, with moments in %s and %s", first, second)
    for single in optimizer.chained_optimizers:
        if not single.is_stub_optimizer:
            groups = single.optimizer.param_groups  # they have their own learning rates, and so on
            single.optimizer = adam.Adam(groups, lr=0.0, exp_avg_dtype=first, exp_avg_sq_dtype=second)


def _build_scheduler(optimizer: ChainedOptimizer, section: OptimizerSection, num_steps: int) -> OptimizerParamScheduler:
    """Build megatron-core's schedule of the learning rate. It also exempts biases and norms from weight decay."""
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
        use_checkpoint_opt_param_scheduler=False,  # a resumed run uses its current settings, not the checkpoint's
        override_opt_param_scheduler=True,
    )
