"""convert: import and export of a checkpoint against `cp`.

`cp` of a random Hugging Face checkpoint, its import and its export, in turns: a slow phase of the disk then hits all
three. Reads come from the page cache. `cp` returns before its bytes are on the disk; the conversions do not, and
"cp + sync" waits for them too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from throughput.measure import add_json_argument, machine, peak_memory_bytes, print_table, write_json
from throughput.random_weights import num_weight_bytes, write_random_model

CASES = ("cp", "cp + sync", "import", "export")

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


def write_checkpoint(directory: Path, num_bytes: int) -> int:
    """Write a bfloat16 checkpoint of about `num_bytes` into a new directory; returns the size of its tensors."""
    sizes = [num_weight_bytes({**MODEL, "num_hidden_layers": layers}) for layers in (1, 2)]
    num_layers = max(1, round((num_bytes - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    return write_random_model(directory, {**MODEL, "num_hidden_layers": num_layers})


def measure_convert(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every round by case; medians as bytes a second and relative to cp's; and this process's memory."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-convert-") as folder:
        hf_dir, imported, out = (Path(folder) / name for name in ("hf", "imported", "out"))
        with ProcessPoolExecutor(1, get_context("spawn")) as writer:  # its memory is not the conversions'
            num_bytes = writer.submit(write_checkpoint, hf_dir, round(args.gigabytes * 1e9)).result()
        libraries_mb = peak_memory_bytes() / 1e6
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
    return machine() | {
        "bytes": num_bytes,
        "peak_memory_mb": round(peak_memory_bytes() / 1e6),
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


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert", help="conversion of a checkpoint against cp", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--gigabytes",
        type=float,
        default=2.0,
        help="size of the checkpoint, at least one layer: about 1.2 (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each case runs (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured (default: for temporary files)")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    result = measure_convert(args)
    write_json(args.json, result)
    print_table(
        f"{result['bytes'] / 1e9:.2f} GB, medians ({result['processor']})",
        ("", "GB/s", "relative to cp"),
        [
            (case, f"{row['bytes_per_second'] / 1e9:.2f}", f"{row['relative_to_cp']:.2f}")
            for case, row in result["cases"].items()
        ],
        f"peak memory {result['peak_memory_mb']} MB, of it libraries {result['libraries_memory_mb']} MB",
    )
    return 0
