"""What a benchmark is: one computation, done by us and by every peer that is importable, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One line of the result for each provider; the first provider is vcr1_kernels."""

    name: str
    shape: str
    providers: Mapping[str, Callable[[], object]]  # a call is one run
    least_bytes: int = 0  # each input read once, each output written once
    flops: int = 0  # of the matrix products that the computation cannot avoid


def is_installed(package: str) -> bool:
    """Whether there is a module, not only a folder that packages below it share (flash_attn of flash-attn-4)."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """A run of `loss` forward and backward, from clean gradients."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return run


def without_grad(function: Callable[[], object]) -> Callable[[], object]:
    """A forward-only run."""

    def run() -> None:
        with torch.no_grad():
            function()

    return run
