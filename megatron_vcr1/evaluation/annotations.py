"""Reads the samples of a benchmark from a manifest or from annotations as published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import Benchmark
from megatron_vcr1.text_files import parse_json, read_lines
from megatron_vcr1.types import Sample


def read_annotations(benchmark: Benchmark, annotations: Sequence[Path]) -> list[Sample]:
    """Read a benchmark's samples from one manifest or from the published files.

    Spans in published files that end after the video are kept as they are, as published scores count them.

    Raises:
        UserError: a file is missing, is neither a manifest nor a published file, or holds no sample of the benchmark.
    """
    for path in annotations:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if len(annotations) == 1 and _is_manifest(annotations[0]):
        return benchmark.select(read_manifest(annotations[0]), annotations[0])
    if benchmark.format is None:
        raise UserError(
            f"{annotations[0]}: not a manifest; benchmark {benchmark.name} needs one (`vcr1 data import` makes it)"
        )
    # Imported here: the importers import torch, which takes seconds and which a manifest does not need.
    from megatron_vcr1.data.importers.cleaning import VideoFolder
    from megatron_vcr1.data.importers.formats import import_dataset

    samples, report = import_dataset(benchmark.format, tuple(annotations), VideoFolder(), keep_overruns=True)
    for problem, number in report.issue_counts().items():
        print(f"{number} published rows: {problem}")
    return benchmark.select(samples, annotations[0])


def _is_manifest(path: Path) -> bool:
    """Decide by the first line whether a file is a manifest: a published file may be JSON lines, too."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = next((line for line in read_lines(path, errors="replace") if line.strip()), "")
    try:
        row = parse_json(first, path)
    except UserError:
        return True  # the manifest's reader explains what is wrong with it
    return isinstance(row, dict) and {"id", "task", "target"} <= row.keys()
