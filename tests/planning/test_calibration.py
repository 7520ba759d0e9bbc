"""Predicted seconds and bytes against measured updates of small models on a CPU.

The files in measured/ are results of `benchmark_throughput.py train --sides ours --rounds 1 --updates 2 --json`,
measured on 2026-11-24 on two cores of an x86-64 machine. Their seconds are CPU time, because other programs used the
machine too. CPU time does not include waiting: for a pipeline it is the time of the busiest stage.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.planning.calibration import Measured, calibrate, predicted_bytes, predicted_seconds
from megatron_vcr1.planning.devices import DEVICES

FILES = sorted((Path(__file__).parent / "measured").glob("*.json"))
SINGLE = [path for path in FILES if Measured.from_file(path).layout.num_gpus == 1]


def _runs(paths: list[Path]) -> list[Measured]:
    return [Measured.from_file(path) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_predicted_memory_is_within_10_percent(path: Path) -> None:
    """Compare without the memory of the libraries, which is measured and would make the error look smaller."""
    run = Measured.from_file(path)
    device = replace(DEVICES["cpu"], fixed_bytes=0.0)
    assert predicted_bytes(run, device) == pytest.approx(run.peak_bytes - run.fixed_bytes, rel=0.10)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_predicted_time_is_within_25_percent_on_held_out_runs(path: Path) -> None:
    run = Measured.from_file(path)
    device = calibrate(DEVICES["cpu"], _runs([other for other in SINGLE if other != path]))
    assert predicted_seconds(run, device) == pytest.approx(run.seconds, rel=0.25)


def test_calibration_recovers_known_efficiencies() -> None:
    """The runs take exactly the time that a device with known efficiencies predicts."""
    known = replace(DEVICES["cpu"].efficiency, text=0.9, vision=0.4, attention=0.2, head=0.6)
    device = replace(DEVICES["cpu"], efficiency=known, flops_per_s=1e11)
    runs = [replace(run, seconds=predicted_seconds(run, device), matmul_flops_per_s=1e11) for run in _runs(SINGLE)]
    found = calibrate(DEVICES["cpu"], runs)
    assert found.efficiency.text == pytest.approx(0.9, rel=0.05)
    assert found.efficiency.vision == pytest.approx(0.4, rel=0.05)
    assert [predicted_seconds(run, found) for run in runs] == pytest.approx([run.seconds for run in runs], rel=0.01)


def test_calibration_needs_a_run_on_a_single_rank() -> None:
    with pytest.raises(UserError, match="one GPU"):
        calibrate(DEVICES["cpu"], _runs([path for path in FILES if path not in SINGLE]))


def test_results_of_another_device_are_refused() -> None:
    runs = _runs(SINGLE)
    with pytest.raises(UserError, match="measured on cpu, not on H100 SXM: set --gpu"):
        calibrate(DEVICES["h100"], runs)
    for gpu, name in [("h100", "NVIDIA H200"), ("h100", "NVIDIA H100 PCIe"), ("b200", "NVIDIA GB200"), ("cpu", "A100")]:
        with pytest.raises(UserError, match=f"measured on {name}, not on"):
            calibrate(DEVICES[gpu], [replace(runs[0], device=name)])


@pytest.mark.parametrize("gpu, name", [("h100", "NVIDIA H100 80GB HBM3"), ("a100", "NVIDIA A100-SXM4-80GB")])
def test_a_gpu_keeps_its_published_peak(gpu: str, name: str) -> None:
    found = calibrate(DEVICES[gpu], [replace(run, device=name, matmul_flops_per_s=1.0) for run in _runs(SINGLE)])
    assert found.flops_per_s == DEVICES[gpu].flops_per_s


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: not a result of vcr1 benchmark"):
        Measured.from_file(file)
