"""The conversion benchmark."""

from __future__ import annotations

from megatron_vcr1.model.presets import PRESETS
from megatron_vcr1.throughput.convert import CASES, measure_convert


def test_conversions_are_compared_with_cp() -> None:
    """The benchmark itself checks that the export is identical to what was imported."""
    result = measure_convert(gigabytes=0.004, rounds=1, model=PRESETS["tiny"])
    assert 2e6 < result["bytes"] < 6e6
    assert set(result["cases"]) == set(CASES)
    assert result["cases"]["cp"]["relative_to_cp"] == 1.0
    assert 0 < result["libraries_memory_mb"] <= result["peak_memory_mb"] + 1  # exact to 1 MB
    assert all(len(case["seconds"]) == 1 for case in result["cases"].values())
