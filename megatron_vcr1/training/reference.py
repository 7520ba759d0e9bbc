"""The frozen reference policy: its weights wait on the host or beside the policy's, and take their place when asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn


class Reference:
    """A copy of what a model's learning parameters are now; frozen ones stay equal by themselves."""

    def __init__(self, model: nn.Module, placement: Literal["swap", "resident"]) -> None:
        """Copies the parameters, to the host with "swap"."""
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._on_host = placement == "swap" and any(parameter.is_cuda for parameter in self._parameters)
        self._waiting = [self._copy(parameter) for parameter in self._parameters]

    def _copy(self, parameter: Tensor) -> Tensor:
        if not self._on_host:
            return parameter.detach().clone()
        return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True).copy_(parameter.detach())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference within the with-block; nobody may change its parameters there."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self._on_host:
            for parameter, waiting in zip(self._parameters, self._waiting, strict=True):
                away = parameter.clone()
                parameter.copy_(waiting)
                waiting.copy_(away)
            return
        for index, parameter in enumerate(self._parameters):
            # Pointers, not numbers: the optimizer's view of the parameter's memory waits with it.
            parameter.data, self._waiting[index] = self._waiting[index], parameter.data
