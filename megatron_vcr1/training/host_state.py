"""The optimizer's state in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_vcr1.checkpoint.optimizer_state import MainParameter, main_parameters
from megatron_vcr1.training.pinned_memory import pinned_memory

_PARAMETER = "param"
_ALIGNMENT = 64  # bytes


class HostState:
    """Keeps Adam's moments and float32 master weights in host memory, except during an optimizer step.

    At the time of the step, the activations' memory is free. Between steps the optimizer holds tensors in host memory,
    which checkpoints save and load like any others. The update itself is computed on the GPU, so its results do not
    change. megatron-core's own offload computes it on the host, and its `offload_to_cpu` would move parameters of a
    float32 model, which are their own master weights.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        """Create the moments, and move the state to host memory.

        The optimizer must not be used without this object: the memory is pinned as long as it lives.
        """
        self._tensors = [
            _StateTensor(main, name)
            for main in main_parameters(optimizer)
            for name in (*main.moments(), *((_PARAMETER,) if main.is_copy else ()))
        ]
        sizes = [-(-tensor.get().nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors]
        memory = pinned_memory(sum(sizes), self, "optimizer.state").split(sizes)
        self._host = [
            flat[: values.nbytes].view(values.dtype).view(values.shape)
            for flat, values in zip(memory, (tensor.get() for tensor in self._tensors), strict=True)
        ]
        self._release()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold the state in the memory of the model's device within the with-block."""
        for tensor, host in zip(self._tensors, self._host, strict=True):
            tensor.set(host.to(tensor.main.parameter.device, non_blocking=True))
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for tensor, host in zip(self._tensors, self._host, strict=True):
            host.copy_(tensor.get(), non_blocking=True)
            tensor.set(host)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # a checkpoint may read the copies at once


@dataclass(frozen=True, slots=True)
class _StateTensor:
    """A tensor of the optimizer's state: a moment, or the master weights of a parameter."""

    main: MainParameter
    name: str

    def get(self) -> Tensor:
        if self.name == _PARAMETER:
            return self.main.values.detach()
        return self.main.moments()[self.name]

    def set(self, values: Tensor) -> None:
        if self.name == _PARAMETER:
            self.main.values.data = values
        else:
            self.main.inner.state[self.main.values][self.name] = values
