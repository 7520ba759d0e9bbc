"""The kernel benchmark on a CPU, and the exit codes of the GPU check on a machine without a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import benchmark_kernels
import pytest
import torch

from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")


def _case(**providers: Callable[[], object]) -> benchmark_kernels.Case:
    return benchmark_kernels.Case("case", "shape", providers, min_bytes=10**6, flops=10**6)


@without_gpu
def test_benchmark_writes_results_of_one_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "mrope.json"
    assert benchmark_kernels.main(["--op", "mrope", "--rounds", "1", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["rounds"] == 1 and document["torch"] == torch.__version__
    assert document["copy_gigabytes_per_s"] > 0 and document["matmul_teraflops"] > 0
    assert [result["provider"] for result in document["results"]] == ["vcr1_kernels", "torch"] * 2
    for result in document["results"]:
        assert result["milliseconds"] > 0 and result["failure"] is None
        if sys.platform == "linux":
            assert result["peak_megabytes"] > 0
    assert "mrope forward" in capsys.readouterr().out


@without_gpu
@pytest.mark.parametrize("op", benchmark_kernels.OPS)
def test_every_provider_of_every_benchmark_runs(op: str) -> None:
    for case in importlib.import_module(f"benchmarks.{op}").cases(CPU):
        assert next(iter(case.providers)) == benchmark_kernels.OURS and len(case.providers) >= 2
        assert case.min_bytes > 0 or case.flops > 0
        for run in case.providers.values():
            run()


def test_failed_provider_is_reported_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory\nmore lines")

    monkeypatch.setattr(benchmark_kernels, "_peak_megabytes", lambda *args: 1.0)
    case = _case(vcr1_kernels=lambda: torch.ones(1000).sum(), other=fail)
    ours, other = benchmark_kernels._measure("op", case, 3, benchmark_kernels.PeakRates(10, 1), CPU)
    assert ours.failure is None and ours.milliseconds is not None and ours.milliseconds > 0
    assert other.failure == "RuntimeError: out of memory" and other.milliseconds is None
    benchmark_kernels._print_case([ours, other], case)
    assert "failed: RuntimeError: out of memory" in capsys.readouterr().out


def test_fraction_of_peak_is_that_of_the_limiting_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_kernels, "_peak_megabytes", lambda *args: None)
    monkeypatch.setattr(benchmark_kernels, "_seconds", lambda run, device: 1e-3)
    case = _case(vcr1_kernels=lambda: None)  # 1 MB and 1 MFLOP in 1 ms: 1 GB/s and 1 GFLOP/s
    (result,) = benchmark_kernels._measure("op", case, 1, benchmark_kernels.PeakRates(4, 0.002), CPU)
    assert result.gigabytes_per_s == pytest.approx(1) and result.teraflops == pytest.approx(0.001)
    assert result.fraction_of_peak == pytest.approx(0.5)


FAKE_PYTHON = """#!/bin/bash
# Stands in for a Python on a GPU machine: everything can be imported except xdist and transformer_engine.
case "$1 $2" in
    "-c "*xdist* | "-c "*transformer_engine*) echo "ModuleNotFoundError: missing" >&2; exit 1 ;;
    "-c "*) exit 0 ;;
    "- "*) cp "$2" "$3" ;;  # write_record: keep the table instead of JSON
    "-m pytest") echo "7 passed"; echo; exit 0 ;;
    *) echo "$1 failed"; exit 3 ;;
esac
"""


def test_gpu_check_records_passed_failed_and_skipped_sections(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {"PATH": "/usr/bin:/bin", "OUT": str(out), "PYTHON": str(python)}
    command = ["bash", str(ROOT / "tools/gpu_check.sh"), "kernels", "benchmark", "update_te"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1, process.stderr
    assert [
        (line.split()[0], line.split(maxsplit=2)[2]) for line in (out / "gpu_check.json").read_text().splitlines()
    ] == [
        ("kernels", "0 7 passed"),
        ("benchmark", "3 tools/benchmark_kernels.py failed"),
        ("update_te", "- skipped: ModuleNotFoundError: missing"),
    ]
    assert "7 passed" in (out / "log.txt").read_text()


@without_gpu
def test_gpu_check_exits_with_2_without_a_gpu_or_with_an_unknown_section(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "tools/gpu_check.sh")]
    environment = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    unknown = subprocess.run([*script, "kernel"], env=environment, capture_output=True, text=True)
    assert unknown.returncode == 2 and "unknown section 'kernel'; the sections are: kernels model" in unknown.stderr
    without = subprocess.run([*script, "kernels"], env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert without.returncode == 2 and "no GPU" in without.stderr
    usage = subprocess.run([*script, "--help"], env=environment, capture_output=True, text=True)
    assert usage.returncode == 0 and "update_plain" in usage.stdout and "set -u" not in usage.stdout
