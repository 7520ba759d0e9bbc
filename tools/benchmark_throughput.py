#!/usr/bin/env python3
"""Measure throughput on this machine.

    python tools/benchmark_throughput.py convert [--gigabytes 2] [--rounds 5] [--directory DIR] [--json FILE]

convert: `cp` of a random Hugging Face checkpoint, its import and its export, in turns: a slow phase of the disk then
hits all three. Reads come from the page cache. `cp` returns before its bytes are on the disk; the conversions do not,
and "cp + sync" waits for them too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import hf_shapes, model_layout

CASES = ("cp", "cp + sync", "import", "export")
FILE_BYTES = 500_000_000

# Qwen2.5-VL-3B with fewer layers: tensors of real sizes.
MODEL = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": True,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 8, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
}


def write_random_checkpoint(directory: Path, num_bytes: int) -> int:
    """Write a bfloat16 checkpoint of about `num_bytes` into a new directory; returns the size of its tensors."""
    sizes = [_num_bytes({**MODEL, "num_hidden_layers": layers}) for layers in (1, 2)]
    num_layers = max(1, round((num_bytes - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    config = {**MODEL, "num_hidden_layers": num_layers}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shards: list[list[str]] = [[]]
    shapes = hf_shapes(model_layout(ModelConfig.from_dict(config)))
    used = 0
    for name, shape in shapes.items():
        if used > FILE_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += 2 * math.prod(shape)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.randint(-(2**15), 2**15, shapes[name], dtype=torch.int16) for name in names}
        tensors = {name: tensor.view(torch.bfloat16) for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_size = _num_bytes(config)
    index_json = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json))
    return total_size


def _num_bytes(config: dict[str, Any]) -> int:
    shapes = hf_shapes(model_layout(ModelConfig.from_dict(config)))
    return 2 * sum(math.prod(shape) for shape in shapes.values())


def measure_convert(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every round by case; medians as bytes a second and relative to cp's; and this process's memory."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-convert-") as folder:
        hf_dir, imported, out = (Path(folder) / name for name in ("hf", "imported", "out"))
        with ProcessPoolExecutor(1, get_context("spawn")) as writer:  # its memory is not the conversions'
            num_bytes = writer.submit(write_random_checkpoint, hf_dir, round(args.gigabytes * 1e9)).result()
        libraries_mb = _peak_memory_mb()
        runs: dict[str, tuple[Path, Path, Callable[[], object]]] = {
            "cp": (hf_dir, out, lambda: _copy(hf_dir, out)),
            "cp + sync": (hf_dir, out, lambda: _copy(hf_dir, out, sync=True)),
            "import": (hf_dir, imported, lambda: import_checkpoint(hf_dir, imported)),
            "export": (imported, out, lambda: export_checkpoint(imported, out)),
        }
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for case, (source, target, run) in runs.items():
                shutil.rmtree(target, ignore_errors=True)
                os.sync()  # what was written before is not this case's to wait for
                subprocess.run(["grep", "-rq", "no such words", source])  # into the page cache
                start_s = time.perf_counter()
                run()
                seconds[case].append(round(time.perf_counter() - start_s, 3))
        subprocess.run(["diff", "-rq", hf_dir, out], check=True)
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "bytes": num_bytes,
        "peak_memory_mb": round(_peak_memory_mb()),
        "libraries_memory_mb": round(libraries_mb),
        "cases": {
            case: {
                "bytes_per_second": round(num_bytes / medians[case]),
                "relative_to_cp": round(medians["cp"] / medians[case], 3),
                "seconds": seconds[case],
            }
            for case in CASES
        },
    }


def _copy(source: Path, destination: Path, *, sync: bool = False) -> None:
    """`cp`, and with `sync`, until the copy is on the disk."""
    subprocess.run(["cp", "-r", source, destination], check=True)
    if sync:
        subprocess.run(["sync", *destination.iterdir()], check=True)


def _peak_memory_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024 / 1e6


def print_table(result: dict[str, Any]) -> None:
    memory = f"peak memory {result['peak_memory_mb']} MB, of it libraries {result['libraries_memory_mb']} MB"
    table = Table(title=f"{result['bytes'] / 1e9:.2f} GB, medians ({result['machine']})", caption=memory)
    for column in ("", "GB/s", "relative to cp"):
        table.add_column(column, justify="right" if column else "left")
    for case, row in result["cases"].items():
        table.add_row(case, f"{row['bytes_per_second'] / 1e9:.2f}", f"{row['relative_to_cp']:.2f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    convert = commands.add_parser("convert", help="conversion of a checkpoint against cp", allow_abbrev=False)
    convert.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of the checkpoint, at least one layer: about 1.2 (default 2)"
    )
    convert.add_argument("--rounds", type=int, default=5, help="how often each case runs (default 5)")
    convert.add_argument("--directory", type=Path, help="on the disk to be measured (default: for temporary files)")
    convert.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    convert.set_defaults(measure=measure_convert)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = args.measure(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
