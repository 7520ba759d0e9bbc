"""Compares a side's update with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


def check_agreement(update: Any, ours: tuple[float, Path], folder: Path) -> None:
    """Run an update, and compare its loss and all its gradients with ours."""
    loss, path = ours
    assert update.run() == pytest.approx(loss, abs=1e-6)
    update.save_gradients(folder / "gradients.safetensors")
    expected, gradients = load_file(folder / "gradients.safetensors"), load_file(path)
    assert gradients.keys() == expected.keys()
    worst = max(float((gradients[name] - expected[name]).abs().max()) for name in expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert worst < 1e-6 < 1e-3 < largest
