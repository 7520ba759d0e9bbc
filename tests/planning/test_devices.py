"""Plausibility of the device table."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vcr1.model.flops import bf16_peak
from megatron_vcr1.planning.devices import DEVICES


@pytest.mark.parametrize("name", DEVICES)
def test_efficiencies_are_fractions(name: str) -> None:
    assert all(0 < value <= 1 for value in dataclasses.asdict(DEVICES[name].efficiency).values())


@pytest.mark.parametrize("name", ["h100", "h200", "a100"])
def test_peaks_equal_those_of_the_training_metrics(name: str) -> None:
    assert DEVICES[name].flops_per_s == bf16_peak(f"NVIDIA {DEVICES[name].name}")
