"""The kernel benchmark on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import benchmark_kernels
import pytest
import torch

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


@without_gpu
@pytest.mark.parametrize("ops", [("swiglu", "mrope"), ("mrope", "swiglu")])
def test_failed_set_up_is_reported_and_the_other_ops_are_measured(
    ops: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(device: torch.device) -> list[benchmark_kernels.Case]:
        raise AssertionError

    file = tmp_path / "results.json"
    monkeypatch.setattr(benchmark_kernels, "OPS", ops)
    monkeypatch.setattr(benchmark_kernels, "_peak_megabytes", lambda *args: None)
    monkeypatch.setattr(importlib.import_module("benchmarks.swiglu"), "cases", fail)
    assert benchmark_kernels.main(["--rounds", "1", "--json", str(file)]) == 1
    results = json.loads(file.read_text())["results"]
    failed, *others = results if ops[0] == "swiglu" else reversed(results)
    assert (failed["case"], failed["failure"]) == ("swiglu", "AssertionError: ")
    assert len(others) == 4 and not any(result["failure"] for result in others)
    assert "swiglu  set-up failed: AssertionError" in capsys.readouterr().out


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
