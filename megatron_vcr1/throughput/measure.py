"""Measurements that all commands share: clocks, memory, the machine's description, subprocesses, tables."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_vcr1.command_line import console, text_table
from megatron_vcr1.process_memory import peak_rss_bytes, reset_peak_rss, rss_bytes

TOOL = ("-m", "megatron_vcr1", "benchmark")
"""Arguments of Python that run this command again."""
PACKAGES = (
    "torch",
    "transformers",
    "megatron-core",
    "triton",
    "transformer-engine",
    "flash-attn",
    "sglang",
    "trl",
    "av",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "decord2",
    "torchcodec",
    "qwen-vl-utils",
)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"


def command_line(args: argparse.Namespace) -> str:
    """Return the command line without --json."""
    words = [word for word in args.arguments if not word.startswith("--json=")]
    if "--json" in words:
        index = words.index("--json")
        del words[index : index + 2]
    return " ".join(["vcr1 benchmark", *words])


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Return the command line, date, processor, device and package versions, which every result records."""
    return {
        "command": command_line(args),
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def seconds(run: Callable[[], object]) -> float:
    """Return the wall-clock time of one call, including queued GPU work."""
    return timed(run)[0]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock time of one call, including queued GPU work, and the CPU time of all threads.

    On a CPU that other programs use too, CPU time varies less.
    """
    _synchronize()
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    run()
    _synchronize()
    return time.perf_counter() - start_s, time.process_time() - cpu_start_s


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_bytes() -> int:
    """Return the memory in use: allocated by torch on a GPU, otherwise resident memory of this process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else rss_bytes()


def peak_memory_bytes() -> int:
    """Return the peak of `memory_bytes` since the last reset."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_rss()


def matmul_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matmul, median of ten; on the CPU per second of CPU time."""
    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 1024
    left, right = torch.randn(2, size, size, device="cuda" if on_gpu else "cpu", dtype=dtype)
    times = [timed(lambda: torch.mm(left, right))[0 if on_gpu else 1] for _ in range(13)]
    return 2 * size**3 / statistics.median(times[3:])  # the first three warm up


def run_again(
    arguments: Sequence[str],
    *,
    num_processes: int = 1,
    threads: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run this command in a new process, or under torchrun in several; exit with its last messages if it fails.

    Each candidate gets a new process: memory that an earlier candidate did not free would count for the next one.
    """
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads()), **environment}
    finished = subprocess.run(
        [*launcher, *TOOL, *arguments], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        sys.exit("\n".join(["vcr1 benchmark: a process failed:", *lines[-20:]]))
    return finished


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    console().print(text_table(title, columns, rows, caption, wrap=True))
