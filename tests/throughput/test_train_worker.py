"""One process of the update benchmark."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_vcr1.throughput.train_worker import OURS, run_side
from megatron_vcr1.throughput.update_case import UpdateCase

pytestmark = pytest.mark.xdist_group("gloo")


def test_our_side_is_measured_and_profiled(case: UpdateCase, ours: tuple[float, Path], tmp_path: Path) -> None:
    gradients, profile = tmp_path / "gradients.safetensors", tmp_path / "profile"
    result = run_side(OURS, dataclasses.replace(case, num_updates=2), gradients, profile)
    assert result is not None
    assert len(result["seconds"]) == len(result["cpu_seconds"]) == 2
    assert result["loss"] == pytest.approx(ours[0], abs=1e-6)
    assert result["peak_bytes"] >= result["at_rest_bytes"] >= result["libraries_bytes"]
    assert result["peak_bytes_by_rank"] == [result["peak_bytes"]]
    assert gradients.is_file() and any(profile.iterdir())
