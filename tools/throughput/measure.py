"""What every measurement shares: spread over rounds, memory, the machine's name, JSON and tables."""

from __future__ import annotations

import argparse
import json
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
from rich.console import Console
from tables import frameless

PACKAGES = ("torch", "transformers", "megatron-core", "triton", "transformer-engine", "flash-attn", "sglang", "trl")
TOOL = Path(__file__).parents[1] / "benchmark_throughput.py"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of what was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"


def prompt_tokens(text: str) -> int:
    """An argument: the tokens of a prompt with a video."""
    if int(text) < 128:
        raise argparse.ArgumentTypeError(f"{text} have no room for a video; take at least 128")
    return int(text)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")


def command_line(args: argparse.Namespace) -> str:
    """What was asked for, without where it was written."""
    words = list(args.arguments)
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return " ".join(["benchmark_throughput.py", *words])


def write_json(path: Path | None, result: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Date, processor, device and versions: what a figure is worth nothing without."""
    on_gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def synchronize() -> None:
    """Wait for the device, where work is queued on one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, device work included."""
    return timed(run)[0]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, device work included, and seconds of processor time that all its threads took.

    On a CPU that others use, too, the second one is the steadier.
    """
    synchronize()
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - start_s, time.process_time() - cpu_start_s


def status_bytes(field: str) -> int:
    """A field of this Linux process, "VmRSS" (now) or "VmHWM" (peak), in bytes.

    getrusage's peak would do elsewhere, but a process inherits its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


def reset_peak_memory() -> None:
    """Forget the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Of the device's allocator, or of this process where the CPU is the device."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM")


def memory_bytes() -> int:
    """In use now; see `peak_memory_bytes`."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else status_bytes("VmRSS")


def matrix_product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of large square matrix products on random data, median of ten; on the CPU, by processor time."""
    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 1024
    device = "cuda" if on_gpu else "cpu"
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(left, right)

    for _ in range(3):
        product()
    return 2 * size**3 / statistics.median(timed(product)[0 if on_gpu else 1] for _ in range(10))


def run_again(
    arguments: Sequence[str],
    *,
    num_processes: int = 1,
    threads: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run this tool in a process of its own, or in several under torchrun; if one fails, its last messages are shown.

    A process of its own for each candidate: what one left behind in memory would count for the next.
    """
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads()), **environment}
    finished = subprocess.run(
        [*launcher, str(TOOL), *arguments], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        sys.exit("\n".join(["benchmark_throughput: a process failed:", *lines[-20:]]))
    return finished


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    table = frameless(title, caption)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
