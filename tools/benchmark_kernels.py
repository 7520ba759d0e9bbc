#!/usr/bin/env python3
"""Measure time and memory of the kernels and of alternative implementations, on the same inputs and in turns.

Each rate is also given as a fraction of the copy or matmul rate that was measured in the same run. On a GPU the Triton
kernels are compared with torch, torch.compile and installed libraries, on a CPU the PyTorch path with the plain
computation. Needs only torch, and triton on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

# The benchmarks are not installed; they are imported from the folder kernels/ of the repository.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from benchmarks.case import Case, is_installed  # noqa: E402

OPS = ("log_probs", "linear_log_probs", "linear_grpo_loss", "attention", "patches", "swiglu", "mrope")
OURS = "vcr1_kernels"


@dataclass(frozen=True)
class Result:
    """The measurement of one provider of one case."""

    case: str
    shape: str
    provider: str
    milliseconds: float | None  # median over the rounds; None: the provider failed
    peak_megabytes: float | None  # peak during a run minus what was allocated before it
    gigabytes_per_s: float | None
    teraflops: float | None
    fraction_of_peak: float | None  # of the measured copy or matmul rate, whichever is the larger fraction
    failure: str | None = None  # type and first line of the exception


class PeakRates(NamedTuple):
    """Rates that this machine reaches with large random inputs."""

    copy_gigabytes_per_s: float  # bytes read plus bytes written
    matmul_teraflops: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return 1 if vcr1_kernels failed in any of them, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, help="measure only this op (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--rounds", type=int, help="runs per provider (default: 20 on a GPU, 5 on a CPU)")
    # Used by this script itself: measures memory in a new process, see _peak_megabytes.
    parser.add_argument("--peak-memory-of", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if arguments.peak_memory_of:
        print(_peak_megabytes_of_this_process(arguments.op, *arguments.peak_memory_of))
        return 0
    rounds = arguments.rounds or (20 if device.type == "cuda" else 5)
    peak = _peak_rates(device)
    print(
        f"{_device_name(device)}: copy {peak.copy_gigabytes_per_s:.0f} GB/s, matmul {peak.matmul_teraflops:.2f} TFLOP/s"
    )
    results: list[Result] = []

    def write() -> None:
        """Write the results so far, so that an interrupted call keeps them."""
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(_document(results, peak, rounds, device), indent=1) + "\n")

    for op in (arguments.op,) if arguments.op else OPS:
        try:
            cases = importlib.import_module(f"benchmarks.{op}").cases(device)
        except Exception as error:  # for example out of memory: the other ops are still measured
            results.append(Result(op, "set-up", OURS, *(None,) * 5, failure=_describe(error)))
            print(f"\n{op}  set-up failed: {results[-1].failure}")
            cases = []
        write()
        for case in cases:
            results += _measure(op, case, rounds, peak, device)
            _print_case(results, case)
            write()
        del cases
        gc.collect()
    return 1 if any(result.provider == OURS and result.failure for result in results) else 0


def _describe(error: Exception) -> str:
    """Return the type and the first line of an exception."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _measure(op: str, case: Case, rounds: int, peak: PeakRates, device: torch.device) -> list[Result]:
    """Measure all providers of a case. They take turns, so that a change of the clock rate affects all of them."""
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for provider, run in case.providers.items():
        try:
            for _ in range(2 if device.type == "cuda" else 1):  # warm-up: compiles and allocates
                run()
            times[provider] = []
        # For example out of memory, a tile that does not fit into shared memory, which Triton reports with an exception
        # of its own, or a version of a library with another interface: report it and go on.
        except Exception as error:
            failures[provider] = _describe(error)
    for _ in range(rounds):
        for provider in times:
            times[provider].append(_seconds(case.providers[provider], device))
    results = []
    for provider, run in case.providers.items():
        if provider in failures:
            results.append(Result(case.name, case.shape, provider, *(None,) * 5, failure=failures[provider]))
            continue
        seconds = statistics.median(times[provider])
        bandwidth = case.min_bytes / seconds / 1e9 or None
        teraflops = case.flops / seconds / 1e12 or None
        fraction = max((bandwidth or 0) / peak.copy_gigabytes_per_s, (teraflops or 0) / peak.matmul_teraflops)
        memory = _peak_megabytes(op, case, provider, run, device)
        results.append(Result(case.name, case.shape, provider, seconds * 1e3, memory, bandwidth, teraflops, fraction))
    return results


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the duration of one run; on a GPU, the time between two events in the stream."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_megabytes(
    op: str, case: Case, provider: str, run: Callable[[], object], device: torch.device
) -> float | None:
    """Return the peak memory of one run above what was allocated before, in MiB; None if it cannot be measured."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return None
    # Each provider gets its own process: memory that the allocator keeps after one provider would count for the next.
    command = [sys.executable, __file__, "--op", op, "--peak-memory-of", case.name, provider]
    return float(subprocess.check_output(command, text=True))


def _peak_megabytes_of_this_process(op: str, name: str, provider: str) -> float:
    """Run one provider once and return the peak of this process's memory above the memory before the run, in MiB."""
    cases = importlib.import_module(f"benchmarks.{op}").cases(torch.device("cpu"))
    run = next(case for case in cases if case.name == name).providers[provider]
    gc.collect()
    before = _status_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which was reached while creating the inputs
    run()
    return _status_megabytes("VmHWM") - before


def _status_megabytes(field: str) -> float:
    """Read a memory field of this process from /proc (Linux), in MiB.

    getrusage is not an alternative: a process inherits the peak of its parent.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def _peak_rates(device: torch.device) -> PeakRates:
    """Measure the copy rate and the matmul rate (bfloat16 on a GPU, float32 on a CPU) of this machine."""
    on_gpu = device.type == "cuda"
    source = torch.randint(256, (2**32 if on_gpu else 2**27,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)

    def median_seconds(run: Callable[[], object]) -> float:
        run()  # warm-up
        return statistics.median(_seconds(run, device) for _ in range(10))

    return PeakRates(
        2 * len(source) / median_seconds(lambda: target.copy_(source)) / 1e9,
        2 * size**3 / median_seconds(lambda: left @ right) / 1e12,
    )


def _print_case(results: list[Result], case: Case) -> None:
    """Print a table of the providers of one case."""
    case_results = [result for result in results if result.case == case.name]
    print(f"\n{case.name}  {case.shape}")
    print(f"  {'':40} {'ms':>9} {'GB/s':>8} {'TFLOP/s':>8} {'of peak':>8} {'peak MB':>9}")
    for result in case_results:
        if result.failure:
            print(f"  {result.provider:40} failed: {result.failure}")
            continue
        rates = "".join(f" {rate or 0:8.2f}" for rate in (result.gigabytes_per_s, result.teraflops))
        fraction = f"{100 * (result.fraction_of_peak or 0):7.0f}%"
        memory = f"{result.peak_megabytes:9.0f}" if result.peak_megabytes is not None else f"{'?':>9}"
        print(f"  {result.provider:40} {result.milliseconds:9.2f}{rates} {fraction} {memory}", flush=True)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _document(results: list[Result], peak: PeakRates, rounds: int, device: torch.device) -> dict[str, object]:
    """Return the contents of the JSON file: the machine, the versions and all results."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _device_name(device),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if is_installed("triton") else None,
        "rounds": rounds,
        **peak._asdict(),
        "results": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    sys.exit(main())
