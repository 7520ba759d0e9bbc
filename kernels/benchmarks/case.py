"""The record of a benchmark: one computation with several implementations that run on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A computation to measure.

    Attributes:
        name: op and direction, for example "swiglu forward+backward".
        shape: sizes and dtype of the inputs, as text.
        providers: implementations by name; calling one is one run. The first one is vcr1_kernels.
        min_bytes: memory traffic that is unavoidable: each input is read once and each output is written once.
        flops: operations of the unavoidable matmuls.
    """

    name: str
    shape: str
    providers: Mapping[str, Callable[[], object]]
    min_bytes: int = 0
    flops: int = 0


def is_installed(package: str) -> bool:
    """Return whether a package can be imported. A folder without `__init__.py` (flash_attn of flash-attn-4) cannot."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """Return a run of `loss` forward and backward that starts without gradients."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return run


def without_grad(function: Callable[[], object]) -> Callable[[], object]:
    """Return a forward-only run of `function`."""

    def run() -> None:
        with torch.no_grad():
            function()

    return run
