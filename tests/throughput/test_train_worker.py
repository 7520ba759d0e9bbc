"""One process of the update benchmark."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.throughput.train_worker import OURS, PLAIN, run_side
from megatron_vcr1.throughput.update_case import UpdateCase

pytestmark = pytest.mark.xdist_group("gloo")


def test_our_side_is_measured_and_profiled(case: UpdateCase, ours: tuple[float, Path], tmp_path: Path) -> None:
    gradients, profile = tmp_path / "gradients.safetensors", tmp_path / "profile"
    result = run_side(OURS, dataclasses.replace(case, num_updates=2), gradients, profile)
    assert result is not None
    assert len(result["seconds"]) == len(result["cpu_seconds"]) == 2
    assert result["loss"] == pytest.approx(ours[0], abs=1e-6)
    assert result["peak_bytes_by_rank"] == [result["peak_bytes"]]
    assert gradients.is_file() and any(profile.iterdir())


class MeasuredUpdate:
    """An update of known memory: 80 MB of weights, and 80 MB more while it runs.

    Its pages are new. A small model would get pages that earlier tests have freed, and the process would not grow.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._weights = _new_pages()

    def run(self) -> float:
        _new_pages().close()
        return 0.5


def _new_pages() -> mmap.mmap:
    pages = mmap.mmap(-1, 80_000_000)
    pages.write(bytes(len(pages)))
    return pages


def test_memory_of_libraries_at_rest_and_at_the_peak_is_told_apart(
    case: UpdateCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vcr1.throughput.update_plain.PlainUpdate", MeasuredUpdate)
    result = run_side(PLAIN, case, None, None)
    assert result is not None and result["loss"] == 0.5
    assert result["at_rest_bytes"] - result["libraries_bytes"] == pytest.approx(80e6, abs=20e6)
    assert result["peak_bytes"] - result["at_rest_bytes"] == pytest.approx(80e6, abs=20e6)
