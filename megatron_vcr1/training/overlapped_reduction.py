"""The reduction of gradients over the replicas while the backward pass still computes."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn


class OverlappedReduction:
    """Completes megatron-core's `overlap_grad_reduce` for models of which not every weight has a `grad`.

    megatron-core starts to reduce a bucket of gradients when each of its weights has had a `grad` in the backward pass
    of the last microbatch, and waits for all reductions at the end. Three things are missing:

    - Some weights have no `grad`, because their gradient is in the gradient buffer already: those that are saved in
      `layer_specs.recompute_in_backward`, and the head, whose gradient the fused loss adds.
    - Replicas may have their gradients in different orders: in text without vision, the gradients of the vision tower
      are zeros that come all at once. Collectives with different orders on two ranks would mix up their data. So
      buckets are reduced in one order, that of the parameters from the last to the first.
    - A replica without microbatches has no backward pass.
    """

    def __init__(self, ddp_model: DistributedDataParallel) -> None:
        self._groups = ddp_model.bucket_groups
        self._starts = [group.start_grad_sync for group in self._groups]
        self._num_started = 0
        self._ready: dict[int, dict[str, Any]] = {}  # arguments of `start_grad_sync` by index
        for index, group in enumerate(self._groups):
            group.start_grad_sync = partial(self._start_in_order, index)
        for parameter, accumulator in zip(ddp_model.params_with_grad, ddp_model.grad_accs, strict=True):
            accumulator.register_prehook(partial(_announce_gradient, parameter))
        ddp_model.config.no_sync_func = ddp_model.no_sync  # only the last microbatch's backward pass reduces

    def reset(self) -> None:
        """Forget the reductions of the last update. Call it before each backward pass."""
        self._num_started = 0
        self._ready.clear()

    def start_all(self) -> None:
        """Start all reductions, on a replica without microbatches."""
        for group in self._groups:
            if not group.is_first_batch:  # in its first update, megatron-core starts them at the end
                group.start_grad_sync()

    def _start_in_order(self, index: int, **arguments: Any) -> None:
        """Start the reduction of a bucket as soon as those before it are started, and of the ready ones after it."""
        self._ready[index] = arguments
        while self._num_started in self._ready:
            self._starts[self._num_started](**self._ready.pop(self._num_started))
            self._num_started += 1


def _announce_gradient(parameter: nn.Parameter, gradients: tuple[Tensor | None, ...]) -> None:
    """Give a weight zeros as its `grad` if it would get none; they take no memory, and megatron-core adds nothing."""
    if gradients[0] is None:
        parameter.grad = parameter.new_zeros(()).expand_as(parameter)
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
