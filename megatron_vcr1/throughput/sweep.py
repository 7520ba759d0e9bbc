"""Measure our update with every combination of layouts, recomputation and microbatch sizes, fastest first.

    vcr1 benchmark sweep --tensor 1 2 --recompute none full \\
        -- --model qwen2.5-vl-7b --prompts 4

Options after `--` are passed to every run of `train`. Combinations that cannot run are listed with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vcr1.command_line import positive, write_json
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import bf16_peak
from megatron_vcr1.planning.job import RECOMPUTES
from megatron_vcr1.throughput.measure import TOOL, Spread, print_table, provenance

HELP = "the update over layouts, recomputation and microbatches"
# What is varied, and the title of its column.
AXES = {
    "tensor": "TP",
    "context": "CP",
    "pipeline": "PP",
    "replicas": "DP",
    "recompute": "recompute",
    "microbatch_tokens": "microbatch\ntokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for axis in ("tensor", "context", "pipeline", "replicas"):
        parser.add_argument(f"--{axis}", nargs="+", type=positive, default=[1], metavar="N", help="(default: 1)")
    parser.add_argument(
        "--recompute", nargs="+", choices=RECOMPUTES, default=["none"], metavar="WHAT", help="none, mlp, full"
    )
    parser.add_argument(
        "--microbatch-tokens", nargs="+", type=positive, default=[16384], metavar="N", help="(default: 16384)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also plot seconds and memory (needs matplotlib)")
    parser.add_argument("train", nargs="*", metavar="-- TRAIN OPTIONS", help="see `train --help`")


def run(args: argparse.Namespace) -> int:
    points = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*(getattr(args, a) for a in AXES))]
    results, failures = [], []
    for point in tqdm(points, desc="combinations"):
        found = _measure(point, args.train)
        if isinstance(found, dict):
            results.append({"point": point, **found})
        else:
            failures.append({"point": point, "reason": found})
    results.sort(key=lambda result: _seconds(result).median)
    write_json(args.json, provenance(args) | {"results": results, "failed": failures})
    if results:
        print_table(
            f"{results[0]['model']}, {results[0]['device']}, {results[0]['date']}",
            (*AXES.values(), "seconds", "peak\nGB", "tokens/s\nper device", "MFU"),
            [_row(result) for result in results],
            "Median (range). MFU is relative to the published bfloat16 peak, on a CPU to the measured matmul rate.",
        )
    if failures:
        print_table(
            "Not possible", ("", "reason"), [(_name(failure["point"]), failure["reason"]) for failure in failures]
        )
    if args.plot and results:
        plot(results, args.plot)
    return 0 if results else 1


def _measure(point: dict[str, Any], train_options: Sequence[str]) -> dict[str, Any] | str:
    """Return the result of `train` at one point, or its last message if it fails."""
    with tempfile.TemporaryDirectory(prefix="benchmark-sweep-") as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, *TOOL, "train", "--sides", "ours", "--json", str(file), *_options(point)]
        finished = subprocess.run([*command, *train_options], capture_output=True, text=True)
        if finished.returncode == 0:
            return json.loads(file.read_text())
        last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        return last_line.removeprefix("vcr1: error: ")


def _options(point: dict[str, Any]) -> Iterator[str]:
    for axis, value in point.items():
        yield from (f"--{axis.replace('_', '-')}", str(value))
    if point["tensor"] > 1:
        yield "--sequence-parallel"


def _seconds(result: dict[str, Any]) -> Spread:
    return Spread.of(result["sides"]["ours"]["seconds"])


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    ours, case, point = result["sides"]["ours"], result["case"], result["point"]
    seconds = _seconds(result)
    num_devices = point["tensor"] * point["context"] * point["pipeline"] * point["replicas"]
    tokens = case["num_prompts"] * (case["prompt_tokens"] + case["group_size"] * (case["response_tokens"] - 1))
    peak = bf16_peak(result["device"]) or ours["matmul_flops_per_s"]
    mfu = result["flops"]["ours"]["total"] / seconds.median / num_devices / peak
    speed = f"{tokens / seconds.median / num_devices:.0f}"
    return (
        *(str(point[axis]) for axis in AXES),
        seconds.text(),
        f"{ours['peak_bytes'] / 1e9:.2f}",
        speed,
        f"{100 * mfu:.1f} %",
    )


def _name(point: dict[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in point.items())


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a bar chart of seconds and memory.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(results)), layout="constrained")
    seconds, memory = figure.subplots(1, 2, sharey=True)
    varied = [axis for axis in AXES if len({result["point"][axis] for result in results}) > 1]
    fixed = {axis: results[0]["point"][axis] for axis in AXES if axis not in varied}
    names = [_name({axis: result["point"][axis] for axis in varied}) for result in results]
    figure.suptitle(f"{results[0]['model']}, {_name(fixed)}", fontsize="medium")
    spreads = [_seconds(result) for result in results]
    errors = [[spread.median - spread.low for spread in spreads], [spread.high - spread.median for spread in spreads]]
    seconds.barh(names, [spread.median for spread in spreads], xerr=errors)
    seconds.set(xlabel="seconds per update")
    memory.barh(names, [result["sides"]["ours"]["peak_bytes"] / 1e9 for result in results], color="tab:orange")
    memory.set(xlabel="peak GB")
    seconds.invert_yaxis()
    figure.savefig(path, dpi=150)
