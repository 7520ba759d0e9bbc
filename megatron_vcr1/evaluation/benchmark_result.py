"""Scores the predictions for a benchmark, and writes the result's files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vcr1.evaluation.benchmarks import Benchmark
from megatron_vcr1.evaluation.bootstrap import NUM_RESAMPLES, SEED
from megatron_vcr1.evaluation.predictions import Prediction, extra_ids, match_predictions, read_predictions
from megatron_vcr1.evaluation.summary import Summary, summarize
from megatron_vcr1.judge import CaptionVerdicts, Judge
from megatron_vcr1.rewards.answer_parsing import is_tagged, read_answer
from megatron_vcr1.rewards.lenient import lenient_answer
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.rewards.scoring import NOT_JUDGED
from megatron_vcr1.tasks import SampleMetrics, task_of, with_lenient
from megatron_vcr1.types import FinishReason, Sample
from megatron_vcr1.user_modules import call_user_code

_CAPTIONS_PER_CALL = 64
_NO_OUTPUT = "no output"


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The result of one benchmark and one model.

    Attributes:
        predictions: the prediction for each sample.
        sample_metrics: the metrics of each sample.
        summary: the metrics of the benchmark.
        verdicts: the judge's verdicts by id, of the samples that need a judge.
        judge: name of the judge; None if there was none.
        num_extra: number of predictions in the file that belong to other samples and were left out.
    """

    benchmark: Benchmark
    samples: Sequence[Sample]
    predictions: Sequence[Prediction]
    sample_metrics: Sequence[SampleMetrics]
    summary: Summary
    verdicts: Mapping[str, CaptionVerdicts]
    judge: str | None
    num_extra: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the content of metrics.json; metrics are in [0, 1]."""
        outputs = [prediction.output for prediction in self.predictions if prediction.output is not None]
        counts = {
            "num_unanswered": len(self.samples) - len(outputs),
            "num_extra": self.num_extra,
            "num_lenient": sum(values.is_lenient for values in self.sample_metrics),
            "num_untagged": sum(not is_tagged(output) for output in outputs),
            "num_reduced": sum(prediction.reduction is not None for prediction in self.predictions),
            "num_truncated": sum(prediction.finish_reason == FinishReason.LENGTH for prediction in self.predictions),
        }
        judged = {"judge": self.judge} if self.judge is not None else {}
        bootstrap = {"level": 0.95, "resamples": NUM_RESAMPLES, "seed": SEED, "unit": "video"}
        return {"benchmark": self.benchmark.name, **judged, **self.summary.as_json(), **counts, "bootstrap": bootstrap}

    def sample_rows(self) -> Iterable[dict[str, Any]]:
        """Yield the lines of samples.jsonl."""
        for sample, prediction, values in zip(self.samples, self.predictions, self.sample_metrics, strict=True):
            row: dict[str, Any] = {"id": sample.id, "metrics": dict(values.values), "reasons": dict(values.reasons)}
            if values.is_lenient:
                row["lenient"] = True
            if sample.category:
                row["category"] = sample.category
            if prediction.error is not None:
                row["error"] = prediction.error
            if (verdicts := self.verdicts.get(sample.id)) is not None:
                row["reference_events"] = _pairs(verdicts.reference_events, verdicts.reference_verdicts)
                row["caption_events"] = _pairs(verdicts.caption_events, verdicts.caption_verdicts)
            yield row


def score_predictions(
    benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[Prediction], judge: Judge | None
) -> BenchmarkResult:
    """Score predictions; a sample without an output scores 0 and is counted.

    Args:
        benchmark: the benchmark of the samples.
        samples: all samples.
        predictions: the prediction for each sample.
        judge: compares captions; None if no sample needs one.
    """
    judged = [_needs_judge(sample) for sample in samples]
    pairs = list(zip(samples, predictions, strict=True))
    to_judge = [pair for pair, is_judged in zip(pairs, judged, strict=True) if is_judged]
    if to_judge and judge is None:
        raise ValueError(f"benchmark {benchmark.name} needs a judge")
    captions, unreadable = _read_captions(to_judge)
    verdicts = _judge_captions(judge, [sample for sample, _ in to_judge], captions) if judge is not None else {}
    sample_metrics = [
        _judged_metrics(sample, unreadable, verdicts) if is_judged else _metrics(sample, prediction)
        for (sample, prediction), is_judged in zip(pairs, judged, strict=True)
    ]
    return BenchmarkResult(
        benchmark,
        samples,
        predictions,
        sample_metrics,
        summarize(benchmark, samples, sample_metrics),
        verdicts,
        judge.name if judge is not None and to_judge else None,
    )


def needs_judge(samples: Iterable[Sample]) -> bool:
    """Return whether a judge has to decide on the completions of any of the samples."""
    return any(map(_needs_judge, samples))


def _needs_judge(sample: Sample) -> bool:
    task = task_of(sample)
    return call_user_code(lambda: task.needs_judge(sample), f"sample {sample.id}: needs_judge of task {task.name}")


def score_file(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    predictions: Path,
    out: Path,
    judge: Judge | None,
    *,
    allow_missing: bool,
    allow_extra: bool,
) -> BenchmarkResult:
    """Score a file of predictions, and write `out` and OUT.samples.jsonl next to it.

    Raises:
        UserError: the predictions do not fit the samples; names the line or the ids.
    """
    read = read_predictions(predictions)
    matched = match_predictions(read, samples, predictions, allow_missing=allow_missing, allow_extra=allow_extra)
    result = score_predictions(benchmark, samples, matched, judge)
    result = replace(result, num_extra=len(extra_ids(read, samples)))
    details = {"label": out.stem, "predictions": str(predictions)}
    write_result(result, out, out.with_suffix(".samples.jsonl"), details)
    return result


def write_result(result: BenchmarkResult, metrics_file: Path, samples_file: Path, details: Mapping[str, Any]) -> None:
    """Write metrics.json and samples.jsonl.

    metrics.json is written last, so that it never appears next to the samples of another result.

    Args:
        result: the result.
        metrics_file, samples_file: the paths; the folder is created.
        details: further entries of metrics.json: label, model, thinking, manifest.
    """
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    _write(samples_file, "".join(json.dumps(row) + "\n" for row in result.sample_rows()))
    _write(metrics_file, json.dumps({**details, **result.as_json()}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file that appears under its name only when it is complete."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _metrics(sample: Sample, prediction: Prediction) -> SampleMetrics:
    task, output = task_of(sample), prediction.output or ""
    metrics = call_user_code(
        lambda: with_lenient(task.metrics(sample, output), task.lenient_metrics(sample, output, prediction.frame_size)),
        f"sample {sample.id}: the metrics of task {task.name}",
    )
    if prediction.output is not None:
        return metrics
    return SampleMetrics(metrics.values, dict.fromkeys(metrics.reasons, _NO_OUTPUT))


def _read_captions(pairs: Iterable[tuple[Sample, Prediction]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return captions by id, and the reason for each sample whose caption the strict reading does not read.

    Captions that only the lenient reading reads are in both.
    """
    captions, unreadable = {}, {}
    for sample, prediction in pairs:
        if prediction.output is None:
            unreadable[sample.id] = _NO_OUTPUT
            continue
        try:
            captions[sample.id] = read_answer(prediction.output)
        except UnparsableError as error:
            unreadable[sample.id] = str(error)
            with contextlib.suppress(UnparsableError):
                captions[sample.id] = lenient_answer(prediction.output)
    return captions, unreadable


def _judge_captions(judge: Judge, samples: Sequence[Sample], captions: Mapping[str, str]) -> dict[str, CaptionVerdicts]:
    """Return the judge's verdicts by id, without the captions that it could not judge."""
    to_judge = [sample for sample in samples if sample.id in captions]
    verdicts: dict[str, CaptionVerdicts] = {}
    with tqdm(total=len(to_judge), unit="caption", desc="judge", disable=not to_judge) as bar:
        for start in range(0, len(to_judge), _CAPTIONS_PER_CALL):
            chunk = to_judge[start : start + _CAPTIONS_PER_CALL]
            found = judge.compare(chunk, [captions[sample.id] for sample in chunk])
            verdicts |= {
                sample.id: verdict for sample, verdict in zip(chunk, found, strict=True) if verdict is not None
            }
            bar.update(len(chunk))
    return verdicts


def _judged_metrics(
    sample: Sample, unreadable: Mapping[str, str], verdicts: Mapping[str, CaptionVerdicts]
) -> SampleMetrics:
    task = task_of(sample)

    def metrics(recall: float, precision: float) -> SampleMetrics:
        where = f"sample {sample.id}: the judged metrics of task {task.name}"
        return call_user_code(lambda: task.judged_metrics(recall, precision), where)

    zero = metrics(0.0, 0.0)
    verdict, reason = verdicts.get(sample.id), unreadable.get(sample.id)
    if verdict is None and reason is None:
        return SampleMetrics({}, dict.fromkeys(zero.reasons, NOT_JUDGED))
    judged = metrics(verdict.recall, verdict.precision) if verdict else None
    unread = SampleMetrics(zero.values, dict.fromkeys(zero.reasons, reason)) if reason else None
    strict, lenient = unread or judged, judged or unread
    assert strict is not None  # one of them is there
    return with_lenient(strict, lenient)


def _pairs(events: Sequence[str], verdicts: Sequence[str]) -> list[list[str]]:
    return [[event, str(verdict)] for event, verdict in zip(events, verdicts, strict=True)]
