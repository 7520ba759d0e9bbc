"""The simulation of the attention kernels' launch order: a GRPO group must keep the SMs of a GPU busy."""

from __future__ import annotations

import pytest
from vcr1_kernels import SegmentLayout

pytest.importorskip("triton")
from benchmarks.occupancy import simulate


def group(prompt: int) -> SegmentLayout:
    return SegmentLayout((prompt, *[256] * 8), (-1, *[0] * 8))


@pytest.mark.parametrize("num_heads", [28, 14, 7], ids=["tp1", "tp2", "tp4"])
def test_long_group_keeps_the_gpu_busy(num_heads: int) -> None:
    busy = {result.kernel: result.busy for result in simulate(group(6000), num_heads)}
    assert min(busy.values()) >= 0.9, busy


@pytest.mark.parametrize("prompt", [2000, 3000, 4000, 8000])
def test_few_heads_get_smaller_tiles_instead_of_idle_sms(prompt: int) -> None:
    busy = {result.kernel: result.busy for result in simulate(group(prompt), 7)}
    assert min(busy.values()) >= 0.88, busy


def test_sms_are_idle_if_there_are_fewer_programs() -> None:
    for result in simulate(SegmentLayout.packed((64,)), num_heads=6):
        assert (result.num_programs, result.busy) == (6, pytest.approx(6 / 132))
