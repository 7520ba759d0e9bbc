#!/usr/bin/env python3
"""Time and memory of the kernels and of their peers: same inputs, same run, taking turns.

On a GPU each rate is also given as a share of the copy or matrix-product rate measured in the same run; on a CPU the
PyTorch path is compared with the plain computation. Needs torch (and triton on a GPU) alone.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from benchmarks.case import Case, is_installed  # noqa: E402

OPS = ("log_probs", "linear_log_probs", "linear_grpo_loss", "attention", "patches", "swiglu", "mrope")
OURS = "vcr1_kernels"


@dataclass(frozen=True)
class Result:
    """One provider of one case."""

    case: str
    shape: str
    provider: str
    milliseconds: float | None  # median; None: it failed
    peak_megabytes: float | None  # above what was allocated before the run
    gigabytes_per_s: float | None
    teraflops: float | None
    share_of_ceiling: float | None  # of the measured copy or matrix-product rate
    failure: str | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, help="only this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--rounds", type=int, help="runs of each provider (default: 20 on a GPU, 5 on a CPU)")
    parser.add_argument("--peak-memory-of", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if arguments.peak_memory_of:
        print(_peak_megabytes_of_this_process(arguments.op, *arguments.peak_memory_of))
        return 0
    rounds = arguments.rounds or (20 if device.type == "cuda" else 5)
    ceilings = _ceilings(device)
    print(f"{_device_name(device)}: copy {ceilings[0]:.0f} GB/s, matrix product {ceilings[1]:.2f} TFLOP/s")
    results = []
    for op in (arguments.op,) if arguments.op else OPS:
        for case in importlib.import_module(f"benchmarks.{op}").cases(device):
            results += _measure(op, case, rounds, ceilings, device)
            _print_case(results, case)
        gc.collect()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(_document(results, ceilings, rounds, device), indent=1) + "\n")
    return 1 if any(result.provider == OURS and result.failure for result in results) else 0


def _measure(op: str, case: Case, rounds: int, ceilings: tuple[float, float], device: torch.device) -> list[Result]:
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for provider, run in case.providers.items():
        try:
            for _ in range(2 if device.type == "cuda" else 1):  # compiles, allocates
                run()
            times[provider] = []
        except (RuntimeError, TypeError, ValueError, ImportError) as error:  # of a peer's version, or out of memory
            failures[provider] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for _ in range(rounds):
        for provider in times:
            times[provider].append(_seconds(case.providers[provider], device))
    results = []
    for provider, run in case.providers.items():
        if provider in failures:
            results.append(Result(case.name, case.shape, provider, *(None,) * 5, failure=failures[provider]))
            continue
        seconds = statistics.median(times[provider])
        bandwidth = case.least_bytes / seconds / 1e9 or None
        teraflops = case.flops / seconds / 1e12 or None
        share = max((bandwidth or 0) / ceilings[0], (teraflops or 0) / ceilings[1])
        memory = _peak_megabytes(op, case, provider, run, device)
        results.append(
            Result(case.name, case.shape, provider, seconds * 1e3, memory, bandwidth, teraflops, share_of_ceiling=share)
        )
    return results


def _seconds(run: Callable[[], object], device: torch.device) -> float:
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
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return None
    # A process of its own for each provider: what one left behind would count for the next.
    command = [sys.executable, __file__, "--op", op, "--peak-memory-of", case.name, provider]
    return float(subprocess.check_output(command, text=True))


def _peak_megabytes_of_this_process(op: str, name: str, provider: str) -> float:
    cases = importlib.import_module(f"benchmarks.{op}").cases(torch.device("cpu"))
    run = next(case for case in cases if case.name == name).providers[provider]
    gc.collect()
    before = _status_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the inputs
    run()
    return _status_megabytes("VmHWM") - before


def _status_megabytes(field: str) -> float:
    """Of this Linux process. (getrusage's peak would do elsewhere, but a process inherits its parent's.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def _ceilings(device: torch.device) -> tuple[float, float]:
    """Copy rate, GB/s read plus written, and matrix-product rate, TFLOP/s, of this machine on random data."""
    on_gpu = device.type == "cuda"
    source = torch.randint(256, (2**32 if on_gpu else 2**27,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)

    def best(run: Callable[[], object]) -> float:
        run()
        return statistics.median(_seconds(run, device) for _ in range(10))

    return 2 * len(source) / best(lambda: target.copy_(source)) / 1e9, 2 * size**3 / best(lambda: left @ right) / 1e12


def _print_case(results: list[Result], case: Case) -> None:
    mine = [result for result in results if result.case == case.name]
    print(f"\n{case.name}  {case.shape}")
    print(f"  {'':40} {'ms':>9} {'GB/s':>8} {'TFLOP/s':>8} {'ceiling':>8} {'peak MB':>9}")
    for result in mine:
        if result.failure:
            print(f"  {result.provider:40} failed: {result.failure}")
            continue
        rates = "".join(f" {rate or 0:8.2f}" for rate in (result.gigabytes_per_s, result.teraflops))
        share = f"{100 * (result.share_of_ceiling or 0):7.0f}%"
        memory = f"{result.peak_megabytes:9.0f}" if result.peak_megabytes is not None else f"{'?':>9}"
        print(f"  {result.provider:40} {result.milliseconds:9.2f}{rates} {share} {memory}", flush=True)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _document(
    results: list[Result], ceilings: tuple[float, float], rounds: int, device: torch.device
) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _device_name(device),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if is_installed("triton") else None,
        "rounds": rounds,
        "copy_gigabytes_per_s": ceilings[0],
        "matrix_product_teraflops": ceilings[1],
        "results": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    sys.exit(main())
