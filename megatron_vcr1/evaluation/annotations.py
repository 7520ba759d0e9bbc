"""A benchmark's samples, from a manifest or as published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import Benchmark
from megatron_vcr1.types import VideoSample


def read_annotations(benchmark: Benchmark, annotations: Sequence[Path]) -> list[VideoSample]:
    """A benchmark's samples, from a manifest or from the files as published.

    Of published files, spans that end after the video stay as they are, as published scores count them.

    Raises:
        UserError: they are missing or neither, or hold no samples of the benchmark.
    """
    for path in annotations:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if len(annotations) == 1 and _is_manifest(annotations[0]):
        return benchmark.select(read_manifest(annotations[0]), annotations[0])
    if benchmark.format is None:
        raise UserError(f"{annotations[0]}: no manifest; benchmark {benchmark.name} needs one (`vcr1 data import`)")
    # They need torch; with a manifest, scoring starts at once.
    from megatron_vcr1.data.importers.cleaning import VideoFolder
    from megatron_vcr1.data.importers.formats import import_dataset

    samples, report = import_dataset(benchmark.format, tuple(annotations), VideoFolder(), keep_overruns=True)
    for problem, number in report.issue_counts().items():
        print(f"{number} published rows: {problem}")
    return benchmark.select(samples, annotations[0])


def _is_manifest(path: Path) -> bool:
    """Whether the first line is a row of one; a published file may be JSON lines too."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return True  # whose reader says what is wrong with it
    return isinstance(row, dict) and {"id", "task", "target"} <= row.keys()
