"""Defines the arguments of `vcr1 convert`; `megatron_vcr1.checkpoint` does the work."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vcr1.cli.arguments import path_argument
from megatron_vcr1.errors import UserError
from megatron_vcr1.process_memory import peak_rss_bytes

Progress = Callable[[int, int], None]  # called with a number of new bytes and the total number
_HF_HELP = "Hugging Face directory with safetensors weights"
_CHECKPOINT_HELP = "directory written by import or by training"
_OUT_HELP = "new directory; must not exist, or must be empty"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `convert` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "convert",
        help="convert between Hugging Face directories and Megatron checkpoints, or compare them",
        description="Convert between Hugging Face directories and Megatron checkpoints, or compare them. No GPU is "
        "needed. The memory is that of the libraries plus some tens of megabytes, whatever the size of the model; only "
        "the log-probs of verify load the whole model in float32. An imported directory can be loaded at any tensor- "
        "and pipeline-parallel size.",
        epilog="Several processes share an import or export, also across nodes: torchrun --nproc-per-node 8 "
        "--no-python vcr1 convert import ..., or srun. Exit code 1: the conversion failed, or verify found a different "
        "tensor.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    command = actions.add_parser(
        "import",
        help="Hugging Face to Megatron",
        description="Write a Megatron checkpoint beside the configuration and tokenizer of a Hugging Face directory.",
        allow_abbrev=False,
    )
    _add_directory(command, "--hf", _HF_HELP)
    _add_directory(command, "--out", _OUT_HELP)
    command.set_defaults(convert=run_import)

    command = actions.add_parser(
        "export",
        help="Megatron to Hugging Face",
        description="Write the Hugging Face directory of an imported model or of a run's checkpoint.",
        allow_abbrev=False,
    )
    _add_directory(command, "--checkpoint", _CHECKPOINT_HELP)
    _add_directory(command, "--out", _OUT_HELP)
    command.set_defaults(convert=run_export)

    command = actions.add_parser(
        "verify",
        help="compare both; prints JSON",
        description="Compare all tensors, and the log-probs of a fixed random prompt with an image in float32.",
        allow_abbrev=False,
    )
    _add_directory(command, "--hf", _HF_HELP)
    _add_directory(command, "--checkpoint", _CHECKPOINT_HELP)
    command.add_argument("--no-log-probs", action="store_true", help="compare only the tensors")
    command.set_defaults(convert=run_verify)

    for command in actions.choices.values():
        command.add_argument("--json", action="store_true", help="print a JSON object (verify always does)")
        command.set_defaults(run=run)


def _add_directory(parser: argparse.ArgumentParser, option: str, description: str) -> None:
    parser.add_argument(option, type=path_argument, required=True, metavar="DIR", help=description)


def run(args: argparse.Namespace) -> int:
    """Convert or compare, on every rank of the job. Raises UserError for an invalid directory."""
    import torch

    from megatron_vcr1.model import cpu
    from megatron_vcr1.parallel import mesh

    warnings.filterwarnings("ignore", message=".*load_state_dict.* is deprecated")  # a call inside megatron-core
    torch.set_num_threads(1)  # the disk is the bottleneck
    cpu.install()
    with mesh.host_world():
        return _convert(args)


def run_import(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], bool]:
    """Import a Hugging Face directory. Returns the report, and whether the command succeeded."""
    from megatron_vcr1.checkpoint.hf_import import import_checkpoint

    return {"bytes": import_checkpoint(args.hf, args.out, progress=progress)}, True


def run_export(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], bool]:
    """Export a checkpoint. Returns the report, and whether the command succeeded."""
    from megatron_vcr1.checkpoint.hf_export import export_checkpoint

    result = export_checkpoint(args.checkpoint, args.out, progress=progress)
    return {"bytes": result.num_bytes, "casts": result.casts}, True


def run_verify(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], bool]:
    """Compare both. Returns the report, and whether all tensors are equal."""
    from megatron_vcr1.checkpoint.verify import compare_weights
    from megatron_vcr1.parallel import mesh

    if mesh.num_ranks() > 1:
        raise UserError("verify runs in one process; start it without torchrun, or with srun --ntasks 1")
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


def _convert(args: argparse.Namespace) -> int:
    """Run the command on this rank, and print the report on the first rank. Return the exit code."""
    # Imported before the clock starts: time and memory of the libraries do not count as those of the conversion.
    from megatron_vcr1.checkpoint import torch_dist  # noqa: F401
    from megatron_vcr1.parallel import mesh
    from megatron_vcr1.parallel.collectives import run_on_every_rank

    libraries_bytes = peak_rss_bytes()
    start_s = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, disable=mesh.rank() != 0 or not sys.stderr.isatty()) as bar:

        def progress(num_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(num_bytes)

        report, succeeded = args.convert(args, progress)
    seconds = time.perf_counter() - start_s
    report |= {
        "seconds": round(seconds, 3),
        "bytes_per_second": round(report["bytes"] / seconds),
        "peak_memory_mb": round(max(run_on_every_rank(peak_rss_bytes)) / 1e6),
        "libraries_memory_mb": round(libraries_bytes / 1e6),
    }
    if mesh.rank() == 0:
        _print(report, as_json=args.json or args.convert is run_verify, out=getattr(args, "out", None))
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
