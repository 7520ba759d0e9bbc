"""The benchmarks of a configuration with their samples, for `vcr1 evaluate` and for validation during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.config.evaluation_sections import BenchmarkSource, JudgeSection
from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.preparation import CachedVideoReader, build_prepare_fn
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import CheckPromptFn
from megatron_vcr1.data.templates import PromptTemplates
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmark_result import needs_judge
from megatron_vcr1.evaluation.benchmarks import Benchmark, find_benchmark
from megatron_vcr1.judge import Judge, build_judge
from megatron_vcr1.tasks import find_task
from megatron_vcr1.types import Sample

PREDICTIONS_FILE = "predictions.jsonl"
SAMPLES_FILE = "samples.jsonl"
METRICS_FILE = "metrics.json"


@dataclass(frozen=True, slots=True)
class BenchmarkJob:
    """One benchmark of a run: its settings, its samples, and the folder of its results."""

    source: BenchmarkSource
    benchmark: Benchmark
    samples: Sequence[Sample]
    folder: Path

    @property
    def label(self) -> str:
        """The benchmark's name in this evaluation."""
        return self.folder.name


def read_jobs(sources: Sequence[BenchmarkSource], folder: Path, *, key: str) -> list[BenchmarkJob]:
    """Read the manifests of benchmarks.

    Args:
        sources: the benchmarks of a section.
        folder: the results of a benchmark go to its subfolder LABEL.
        key: the setting that lists the benchmarks, for error messages.

    Raises:
        UserError: a benchmark is invalid; names the key.
    """
    jobs: dict[str, BenchmarkJob] = {}
    for index, source in enumerate(sources):
        label = source.label or source.name
        if Path(label).name != label or label == ".." or label in jobs:
            raise UserError(
                f"{key}.{index}: label {label!r} must be a folder name that no other benchmark has; set another"
            )
        benchmark = find_benchmark(source.name)
        samples = benchmark.select(read_manifest(source.manifest), source.manifest)[: source.max_samples]
        jobs[label] = BenchmarkJob(source, benchmark, samples, folder / label)
    return list(jobs.values())


def templates_of_jobs(
    jobs: Sequence[BenchmarkJob], templates: PromptTemplates, *, key: str
) -> dict[str, PromptTemplates]:
    """Return the templates of each benchmark by its label: those of the settings, with the prompt that it names.

    Args:
        jobs: the benchmarks.
        templates: the templates of the settings.
        key: the setting that lists the benchmarks, for error messages.

    Raises:
        UserError: a benchmark names a prompt that does not suit its samples.
    """
    by_label: dict[str, PromptTemplates] = {}
    for job in jobs:
        by_label[job.label] = templates
        if job.source.prompt is not None:
            try:
                own, other = find_task(job.benchmark.task), find_task(job.source.prompt)
                by_label[job.label] = templates.asked_like(own, other)
            except ValueError as error:
                raise UserError(f"{key}, {job.label}: prompt: {error}") from None
    return by_label


def judge_for_jobs(jobs: Sequence[BenchmarkJob], section: JudgeSection, cache: Path) -> Judge | None:
    """Build the judge if a benchmark needs one."""
    return build_judge(section, cache) if any(needs_judge(job.samples) for job in jobs) else None


def prepare_fn_of_job(
    job: BenchmarkJob, data: DataSection, templates: PromptTemplates, processor: PromptProcessor, check: CheckPromptFn
) -> PrepareFn:
    """Build the function that decodes and encodes the samples of a benchmark."""
    reader = CachedVideoReader(data)
    return build_prepare_fn(data, templates, processor, reader, thinking=job.source.thinking, check=check)
