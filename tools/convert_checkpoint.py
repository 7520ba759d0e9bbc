#!/usr/bin/env python3
"""Convert between Hugging Face directories and Megatron checkpoints, or compare them.

    python tools/convert_checkpoint.py import --hf HF_DIR --out DIR
    python tools/convert_checkpoint.py export --checkpoint DIR --out HF_DIR
    python tools/convert_checkpoint.py verify --hf HF_DIR --checkpoint DIR
    torchrun --nproc-per-node 8 tools/convert_checkpoint.py import ...    # shared by all ranks, also across nodes

No GPU is needed. The memory is that of the libraries plus some tens of megabytes, whatever the size of the model; only
the log-probs of verify load the whole model in float32. An imported directory can be loaded at any tensor- and
pipeline-parallel size.

Exit codes: 0; 1 if the conversion failed or verify found a different tensor; 2 for wrong usage or input.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from command_line import run_tool, tool_parser
from tqdm import tqdm

from megatron_vcr1.checkpoint.new_directory import Progress
from megatron_vcr1.errors import UserError
from megatron_vcr1.model import cpu
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank

_HF_HELP = "Hugging Face directory with safetensors weights"
_CHECKPOINT_HELP = "directory written by import or by training"
_OUT_HELP = "new directory; must not exist, or must be empty"


# The functions below import what they need themselves: megatron-core takes a second, which --help should not wait for.
def run_import(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], bool]:
    from megatron_vcr1.checkpoint.hf_import import import_checkpoint

    return {"bytes": import_checkpoint(args.hf, args.out, progress=progress)}, True


def run_export(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], bool]:
    from megatron_vcr1.checkpoint.hf_export import export_checkpoint

    result = export_checkpoint(args.checkpoint, args.out, progress=progress)
    return {"bytes": result.num_bytes, "casts": result.casts}, True


def run_verify(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], bool]:
    from megatron_vcr1.checkpoint.verify import compare_weights

    if mesh.num_ranks() > 1:
        raise UserError("verify runs in one process; start it without torchrun")
    weights = compare_weights(args.hf, args.checkpoint, progress=progress)
    report: dict[str, Any] = {
        "bytes": weights.num_bytes,
        "num_tensors": weights.num_tensors,
        "num_identical": weights.num_identical,
        "max_abs_difference": _finite(max(weights.max_abs_differences.values())),
        "tensors": {name: _finite(value) for name, value in weights.max_abs_differences.items()},
    }
    if not args.no_log_probs:
        report["log_probs"] = _log_prob_report(args.hf, args.checkpoint)
    return report, weights.num_identical == weights.num_tensors


def _log_prob_report(hf_dir: Path, model_dir: Path) -> dict[str, Any]:
    from megatron_vcr1.checkpoint.verify_log_probs import log_prob_differences

    differences = log_prob_differences(hf_dir, model_dir).abs()
    return {
        "num_tokens": differences.numel(),
        "max_abs_difference": _finite(float(differences.max())),
        "mean_abs_difference": _finite(float(differences.mean())),
    }


def _finite(value: float) -> float | None:
    """Return None for infinity and NaN, which JSON does not have."""
    return value if abs(value) < float("inf") else None


def build_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("import", help="Hugging Face to Megatron", allow_abbrev=False)
    _add_directory(command, "--hf", _HF_HELP)
    _add_directory(command, "--out", _OUT_HELP)
    command.set_defaults(run=run_import)

    command = commands.add_parser("export", help="Megatron to Hugging Face", allow_abbrev=False)
    _add_directory(command, "--checkpoint", _CHECKPOINT_HELP)
    _add_directory(command, "--out", _OUT_HELP)
    command.set_defaults(run=run_export)

    command = commands.add_parser(
        "verify",
        help="compare both; prints JSON",
        description="Compare all tensors, and the log-probs of a fixed random prompt with an image in float32.",
        allow_abbrev=False,
    )
    _add_directory(command, "--hf", _HF_HELP)
    _add_directory(command, "--checkpoint", _CHECKPOINT_HELP)
    command.add_argument("--no-log-probs", action="store_true", help="compare only the tensors")
    command.set_defaults(run=run_verify)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print a JSON object (verify always does)")
    return parser


def _add_directory(parser: argparse.ArgumentParser, option: str, description: str) -> None:
    parser.add_argument(option, type=Path, required=True, metavar="DIR", help=description)


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB. Unlike getrusage, it does not include the parent process's."""
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024 / 1e6


def convert(args: argparse.Namespace) -> int:
    """Run the command on this rank, and print the report on the first rank. Return the exit code."""
    # Imported before the clock starts: time and memory of the libraries do not count as those of the conversion.
    from megatron_vcr1.checkpoint import torch_dist  # noqa: F401

    libraries_mb = peak_memory_mb()
    start_s = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, disable=mesh.rank() != 0 or not sys.stderr.isatty()) as bar:

        def progress(num_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(num_bytes)

        report, succeeded = args.run(args, progress)
    seconds = time.perf_counter() - start_s
    report |= {
        "seconds": round(seconds, 3),
        "bytes_per_second": round(report["bytes"] / seconds),
        "peak_memory_mb": round(max(run_on_every_rank(peak_memory_mb))),
        "libraries_memory_mb": round(libraries_mb),
    }
    if mesh.rank() == 0:
        _print(report, as_json=args.json or args.run is run_verify, out=getattr(args, "out", None))
    return 0 if succeeded else 1


def _print(report: dict[str, Any], *, as_json: bool, out: Path | None) -> None:
    if as_json:
        print(json.dumps(report, indent=1))
        return
    size, speed = report["bytes"] / 1e9, report["bytes_per_second"] / 1e9
    memory = f"peak memory {report['peak_memory_mb']} MB, including {report['libraries_memory_mb']} MB of libraries"
    print(f"{out}: {size:.2f} GB in {report['seconds']:.1f} s ({speed:.2f} GB/s), {memory}")
    for cast, count in report.get("casts", {}).items():
        print(f"{out}: rounded from {cast}: {count} parts of tensors")


def run(args: argparse.Namespace) -> int:
    try:
        return convert(args)
    except OSError as error:
        print(f"convert_checkpoint: failed: {error}", file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")  # as in the vcr1 command
    warnings.filterwarnings("ignore", message=".*load_state_dict.* is deprecated")  # a call inside megatron-core
    torch.set_num_threads(1)  # the disk is the bottleneck
    cpu.install()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    try:
        return run_tool("convert_checkpoint", lambda: run(args))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
