"""Validation: the benchmarks of [validation] during training, through the engine of the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.config.evaluation_sections import JudgeSection, ValidationSection
from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.prompts import CheckPromptFn
from megatron_vcr1.data.templates import DEFAULT_TEMPLATES, load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmark_result import BenchmarkResult, score_predictions, write_result
from megatron_vcr1.evaluation.jobs import (
    METRICS_FILE,
    PREDICTIONS_FILE,
    SAMPLES_FILE,
    BenchmarkJob,
    judge_for_jobs,
    prepare_fn_of_job,
    read_jobs,
    templates_of_jobs,
)
from megatron_vcr1.evaluation.predictions import Prediction, write_predictions
from megatron_vcr1.evaluation.predictor import Predictor
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.training.run_dir import VALIDATION_FOLDER
from megatron_vcr1.training.shown_samples import SampleCollector, ShownSample
from megatron_vcr1.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """The outcome of one validation.

    Attributes:
        metrics: values by LABEL/METRIC, and the counts LABEL/num_samples, LABEL/num_unanswered and LABEL/num_unjudged.
        unanswered: label, id and reason of each sample that could not be given to the model; on the first rank only.
        shown: samples for TensorBoard and Weights & Biases; on the first rank only.
    """

    metrics: Mapping[str, float]
    unanswered: Sequence[tuple[str, str, str]]
    shown: Sequence[ShownSample]


class Validator:
    """Evaluates the benchmarks of [validation] as `vcr1 evaluate` does. All ranks of the job call it together.

    Attributes:
        metric_names: the metrics of a validation as LABEL/METRIC.
    """

    def __init__(
        self,
        section: ValidationSection,
        data: DataSection,
        judge: JudgeSection,
        processor: PromptProcessor,
        *,
        check_prompt: CheckPromptFn,
        run_dir: Path,
    ) -> None:
        """Read the manifests.

        Args:
            data: how videos are decoded, and the templates of the prompts.
            check_prompt: a sample whose prompt it refuses stays unanswered.
            run_dir: train.run_dir.

        Raises:
            UserError: a benchmark or a manifest is invalid, or the judge cannot be used.
        """
        self._section = section
        self._num_workers = data.num_workers
        self._processor = processor
        self._check_prompt = check_prompt
        self._folder = run_dir / VALIDATION_FOLDER
        self._jobs = read_jobs(section.benchmarks, self._folder, key="validation.benchmarks")
        self._template_file = str(data.templates or DEFAULT_TEMPLATES)
        templates = load_templates(data.templates)
        self._templates = templates_of_jobs(self._jobs, templates, key="validation.benchmarks")
        self._prepare = {job.label: self._prepare_fn(job, data) for job in self._jobs}
        self._judge = judge_for_jobs(self._jobs, judge, run_dir / "judge_cache")
        self.metric_names = [name for job in self._jobs for name in self._names(job)]

    def _prepare_fn(self, job: BenchmarkJob, data: DataSection) -> PrepareFn:
        return prepare_fn_of_job(job, data, self._templates[job.label], self._processor, self._check_prompt)

    def _names(self, job: BenchmarkJob) -> list[str]:
        """Return the names of a benchmark's metrics: those of a sample without an answer."""
        sample = job.samples[0]
        result = score_predictions(job.benchmark, [sample], [Prediction(sample.id, None, "")], self._judge)
        return [f"{job.label}/{name}" for name in result.summary.metrics]

    def sources(self, data: DataSection) -> list[tuple[PrepareFn, Sequence[Sample]]]:
        """Return the function that prepares samples, and the samples, of each benchmark; `data` says how to decode."""
        return [(self._prepare_fn(job, data), job.samples) for job in self._jobs]

    def run(self, engine: RolloutEngine, step: int, *, is_stopping: Callable[[], bool]) -> ValidationResult | None:
        """Evaluate all benchmarks with the weights that the engine has, and write their files.

        Args:
            step: training steps done.
            is_stopping: see `Predictor.predict`.

        Returns:
            The result, or None if `is_stopping` returned True.

        Raises:
            EngineError: the engine cannot generate.
        """
        answered: list[tuple[BenchmarkJob, list[Prediction], SampleCollector]] = []
        for job in self._jobs:
            collector = SampleCollector(self._section.num_shown_samples if mesh.is_first_rank() else 0)
            predictions = self._predict(job, engine, collector, is_stopping)
            if predictions is None:
                return None
            answered.append((job, predictions, collector))
        parts: list[ValidationResult] = []  # stays empty on the other ranks

        def score() -> dict[str, float]:
            parts.extend(self._score(*entry, step) for entry in answered)
            return {name: value for part in parts for name, value in part.metrics.items()}

        # Only the numbers travel: with NCCL, every rank would hold the frames of all ranks on its GPU.
        metrics = run_on_first_rank(score)
        return ValidationResult(
            metrics,
            unanswered=[entry for part in parts for entry in part.unanswered],
            shown=[sample for part in parts for sample in part.shown],
        )

    def _predict(
        self, job: BenchmarkJob, engine: RolloutEngine, collector: SampleCollector, is_stopping: Callable[[], bool]
    ) -> list[Prediction] | None:
        """Return the predictions on the first rank, an empty list on other ranks; None if the run is stopping."""
        predictor = Predictor(
            engine,
            self._processor,
            self._prepare[job.label],
            max_new_tokens=self._section.max_new_tokens,
            prompts_per_batch=self._section.prompts_per_batch,
            num_workers=self._num_workers,
            on_prepared=collector.add,
        )
        predictions: list[Prediction] = []
        record = predictions.extend if mesh.is_first_rank() else None
        is_complete = predictor.predict(job.samples, record, is_stopping=is_stopping)
        return predictions if is_complete else None

    def _score(
        self, job: BenchmarkJob, predictions: Sequence[Prediction], collector: SampleCollector, step: int
    ) -> ValidationResult:
        """Score a benchmark's predictions and write the same files as `vcr1 evaluate`, to validation/step_N/LABEL."""
        result = score_predictions(job.benchmark, job.samples, predictions, self._judge)
        folder = self._folder / f"step_{step}" / job.label
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / PREDICTIONS_FILE, result.predictions)
        details: dict[str, Any] = {
            "label": job.label,
            "step": step,
            "thinking": job.source.thinking,
            "prompt": job.source.prompt or job.benchmark.task,
            "templates": self._template_file,
            "manifest": str(job.source.manifest.absolute()),
        }
        write_result(result, folder / METRICS_FILE, folder / SAMPLES_FILE, details)
        shown = collector.shown(job.label, result, self._templates[job.label], thinking=job.source.thinking)
        return _summary(job.label, result, shown)


def _summary(label: str, result: BenchmarkResult, shown: Sequence[ShownSample]) -> ValidationResult:
    unanswered = [
        (label, prediction.id, prediction.error or "no output")
        for prediction in result.predictions
        if prediction.output is None
    ]
    metrics = {name: estimate.value for name, estimate in result.summary.metrics.items()}
    counts = {
        "num_samples": result.summary.num_samples,
        "num_unanswered": len(unanswered),
        "num_unjudged": result.summary.num_unjudged,
    }
    named = {f"{label}/{name}": value for name, value in {**metrics, **counts}.items()}
    return ValidationResult(named, unanswered, shown)


class BestStep:
    """Tracks the step with the highest value of checkpoint.keep_best, over the validations of a run.

    Attributes:
        metric: checkpoint.keep_best; None if no metric is tracked.
        step: the best step; None before the first validation after step 0.
        num_worse: validations in a row since then that were not better.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.step: int | None = None
        self.value = -math.inf
        self.num_worse = 0

    def update(self, step: int, value: float | None) -> bool:
        """Include a validation, and return whether it is the best one so far.

        Args:
            value: None, which changes nothing, if the judge gave no verdict on any sample.
        """
        if value is None:
            return False
        if value > self.value:
            self.step, self.value, self.num_worse = step, value, 0
            return True
        self.num_worse += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        value = self.value if self.step is not None else None
        return {"metric": self.metric, "step": self.step, "value": value, "num_worse": self.num_worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint, unless it is of another metric."""
        if state["metric"] != self.metric:
            if state["step"] is not None:
                logger.warning("checkpoint.keep_best was %s: the best step starts over", state["metric"])
            return
        self.step, self.num_worse = state["step"], state["num_worse"]
        self.value = state["value"] if self.step is not None else -math.inf


def check_keep_best(keep_best: str, names: Sequence[str]) -> None:
    """Raise UserError if no validation benchmark has this metric."""
    if keep_best not in names:
        raise UserError(f"checkpoint.keep_best = {keep_best!r}: no such metric; it can be {', '.join(names)}")
