"""The frozen reference policy: a second set of weights that is swapped into the model when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class Reference:
    """A copy of a model's trainable parameters. Frozen parameters never change, so they are not copied."""

    def __init__(self, model: nn.Module, placement: Literal["swap", "resident"]) -> None:
        """Copy the parameters as they are now.

        Args:
            placement: "swap" keeps the copy in pinned host memory while it is not in use, "resident" on the model's
                device. On a CPU there is no difference.
        """
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._on_host = placement == "swap" and any(parameter.is_cuda for parameter in self._parameters)
        # The weights that are not in the model now: the reference's, or the policy's within `swapped_in`.
        self._stored = [self._copy(parameter) for parameter in self._parameters]

    def _copy(self, parameter: Tensor) -> Tensor:
        if not self._on_host:
            return parameter.detach().clone()
        return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True).copy_(parameter.detach())

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the reference's weights within the with-block, in which nothing may change parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self._on_host:
            for parameter, stored in zip(self._parameters, self._stored, strict=True):
                # One parameter at a time: the temporary copy is on the GPU.
                current = parameter.clone()
                parameter.copy_(stored)
                stored.copy_(current)
            return
        for index, parameter in enumerate(self._parameters):
            # Swap the storages instead of copying values. The optimizer and the distributed optimizer's buffer keep
            # their views of the policy's storage, which comes back with the second swap.
            parameter.data, self._stored[index] = self._stored[index], parameter.data
