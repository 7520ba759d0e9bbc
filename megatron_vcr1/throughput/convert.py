"""Compare the import and export of a checkpoint with `cp`.

Each round copies a random Hugging Face checkpoint with `cp`, imports it and exports it, so that a slow phase of the
disk affects all of them. The files are read from the page cache. `cp` returns before its data is on the disk, but the
conversions do not; "cp + sync" also waits for the disk. The disk is the one that holds $TMPDIR.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.command_line import write_json
from megatron_vcr1.model.presets import raw_config
from megatron_vcr1.process_memory import peak_rss_bytes
from megatron_vcr1.throughput.arguments import add_repetition_arguments
from megatron_vcr1.throughput.measure import print_table, provenance, seconds
from megatron_vcr1.throughput.random_weights import num_weight_bytes, write_random_model

HELP = "import and export of a checkpoint, compared with cp"
CASES = ("cp", "cp + sync", "import", "export")

# Qwen2.5-VL-3B with fewer layers: the tensors have realistic sizes.
MODEL = raw_config("qwen2.5-vl-3b")
MODEL["vision_config"] = MODEL["vision_config"] | {"depth": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gigabytes",
        type=float,
        default=2.0,
        metavar="GB",
        help="size of the checkpoint; at least one layer, about 1.2 GB (default: %(default)s)",
    )
    add_repetition_arguments(parser, rounds=5, threads=False)


def run(args: argparse.Namespace) -> int:
    result = provenance(args) | measure_convert(args.gigabytes, args.rounds)
    write_json(args.json, result)
    print_table(
        f"{result['bytes'] / 1e9:.2f} GB, median of {args.rounds} rounds ({result['processor']})",
        ("", "GB/s", "relative to cp"),
        [
            (case, f"{row['bytes_per_second'] / 1e9:.2f}", f"{row['relative_to_cp']:.2f}")
            for case, row in result["cases"].items()
        ],
        f"Peak memory {result['peak_memory_mb']} MB, including {result['libraries_memory_mb']} MB of libraries",
    )
    return 0


def measure_convert(gigabytes: float, rounds: int, model: Mapping[str, Any] = MODEL) -> dict[str, Any]:
    """Measure all cases in turns.

    Returns:
        The seconds of every round, median bytes/s relative to `cp`, and the peak memory of this process.
    """
    times: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="benchmark-convert-") as folder:
        hf_dir, imported, out = (Path(folder) / name for name in ("hf", "imported", "out"))
        # Written by another process, whose memory does not count as memory of the conversions.
        with ProcessPoolExecutor(1, get_context("spawn")) as writer:
            num_bytes = writer.submit(write_checkpoint, hf_dir, round(gigabytes * 1e9), model).result()
        libraries_bytes = peak_rss_bytes()  # conversions need no GPU: their memory is that of the process
        runs: dict[str, tuple[Path, Path, Callable[[], object]]] = {
            "cp": (hf_dir, out, lambda: _copy(hf_dir, out)),
            "cp + sync": (hf_dir, out, lambda: _copy(hf_dir, out, sync=True)),
            "import": (hf_dir, imported, lambda: import_checkpoint(hf_dir, imported)),
            "export": (imported, out, lambda: export_checkpoint(imported, out)),
        }
        for _ in tqdm(range(rounds), desc="rounds"):
            for case, (source, target, convert) in runs.items():
                shutil.rmtree(target, ignore_errors=True)
                os.sync()  # pending writes of the previous case must not slow this one down
                subprocess.run(["grep", "-rq", "no such words", source])  # read the source into the page cache
                times[case].append(round(seconds(convert), 3))
        subprocess.run(["diff", "-rq", hf_dir, out], check=True)  # the export is identical to what was imported
    medians = {case: statistics.median(values) for case, values in times.items()}
    return {
        "bytes": num_bytes,
        "peak_memory_mb": round(peak_rss_bytes() / 1e6),
        "libraries_memory_mb": round(libraries_bytes / 1e6),
        "cases": {
            case: {
                "bytes_per_second": round(num_bytes / medians[case]),
                "relative_to_cp": round(medians["cp"] / medians[case], 3),
                "seconds": times[case],
            }
            for case in CASES
        },
    }


def write_checkpoint(directory: Path, num_bytes: int, model: Mapping[str, Any] = MODEL) -> int:
    """Write a random bfloat16 checkpoint of about `num_bytes` into a new directory; return its actual size."""
    sizes = [num_weight_bytes({**model, "num_hidden_layers": layers}) for layers in (1, 2)]
    num_layers = max(1, round((num_bytes - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    return write_random_model(directory, {**model, "num_hidden_layers": num_layers})


def _copy(source: Path, destination: Path, *, sync: bool = False) -> None:
    """Copy with `cp`; with `sync`, also wait until the data is on the disk."""
    subprocess.run(["cp", "-r", source, destination], check=True)
    if sync:
        subprocess.run(["sync", *destination.iterdir()], check=True)
