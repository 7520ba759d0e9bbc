"""The frozen reference policy: a second set of weights that the model uses for the reference's forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_vcr1.training.pinned_memory import pinned_memory


class Reference:
    """A copy of a model's trainable parameters. Frozen parameters never change, so they are not copied.

    With placement "host" the copy needs no GPU memory of its own: from the end of an update to the start of the next
    one, the gradient buffers hold nothing of value, and they are at least as large as the parameters. `prefetch` copies
    the reference there, and `swapped_in` points the parameters at it. The policy's weights do not move.
    """

    def __init__(self, ddp_model: DistributedDataParallel, placement: Literal["host", "resident"]) -> None:
        """Copy the parameters as they are now.

        Args:
            placement: "host" keeps the copy in host memory, pinned if the model is on a GPU; "resident" on the model's
                device.
        """
        weights = _HostWeights if placement == "host" else _ResidentWeights
        self._weights = [weights(buffer) for buffer in ddp_model.buffers]

    def prefetch(self) -> None:
        """Start to copy the weights to the device, in the order of the current CUDA stream; the host does not wait.

        Call it early in a step. It does nothing while the gradient buffers' memory is released, and `swapped_in` copies
        again if anything wrote to them meanwhile. The update that follows clears them; until then nothing else may use
        them.
        """
        for weights in self._weights:
            weights.prefetch()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the reference's weights within the with-block, in which nothing may change parameters."""
        self.prefetch()
        for weights in self._weights:
            weights.swap()
        try:
            yield
        finally:
            for weights in self._weights:
                weights.swap()
                weights.release()


class _ResidentWeights:
    """The reference's weights of the parameters in one buffer of megatron-core, on the model's device."""

    def __init__(self, buffer: Any) -> None:
        """
        Args:
            buffer: a `_ParamAndGradBuffer`: parameters of one dtype, and the memory of their gradients.
        """
        self._parameters = order_by_alignment(buffer.params)
        self._num_bytes = sum(parameter.nbytes for parameter in self._parameters)
        # bytes [num_bytes]: where the model reads the reference's weights
        self._flat = self._allocate(buffer)
        sizes = [parameter.nbytes for parameter in self._parameters]
        # The weights that are not in the model now: the reference's, or the policy's within `Reference.swapped_in`.
        self._stored = [
            values.view(parameter.dtype).view(parameter.shape)
            for values, parameter in zip(self._flat.split(sizes), self._parameters, strict=True)
        ]
        for stored, parameter in zip(self._stored, self._parameters, strict=True):
            stored.copy_(parameter.detach())

    def _allocate(self, buffer: Any) -> Tensor:
        return torch.empty(self._num_bytes, dtype=torch.uint8, device=buffer.grad_data.device)

    def prefetch(self) -> None:
        pass

    def release(self) -> None:
        pass

    def swap(self) -> None:
        """Swap storages instead of copying values.

        The optimizer and the distributed optimizer's buffer keep their views of the policy's storage, which comes back
        with the second swap.
        """
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._stored[index] = self._stored[index], parameter.data


class _HostWeights(_ResidentWeights):
    """The same in host memory; the gradient buffer holds them while the model uses them."""

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer)
        self._host = pinned_memory(self._num_bytes, self, "grpo.reference")
        self._host.copy_(self._flat)
        self._fetched_version: int | None = None  # torch's version of the flat memory after `prefetch`

    def _allocate(self, buffer: Any) -> Tensor:
        gradients = buffer.grad_data.view(torch.uint8)
        assert gradients.numel() >= self._num_bytes, "gradients have at least the parameters' precision"
        return gradients[: self._num_bytes]

    def prefetch(self) -> None:
        # In-place operators change the version: so does `restore_grad_buffers`, which fills released memory with zeros.
        is_released = self._flat.untyped_storage().nbytes() == 0
        if not is_released and self._flat._version != self._fetched_version:
            self._flat.copy_(self._host, non_blocking=True)
            self._fetched_version = self._flat._version

    def release(self) -> None:
        self._fetched_version = None


def order_by_alignment(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Order parameters so that, packed without gaps, each one starts at a multiple of the largest power of two that
    divides its size.

    Matrices thus keep the alignment that fast kernels need, and only parameters of an odd size start at odd addresses.
    """
    return sorted(parameters, key=lambda parameter: parameter.nbytes & -parameter.nbytes, reverse=True)
