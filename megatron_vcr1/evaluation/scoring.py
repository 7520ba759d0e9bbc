"""Scoring of predictions, and the files that hold the result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vcr1.evaluation import metrics
from megatron_vcr1.evaluation.answers import is_tagged, read_answer
from megatron_vcr1.evaluation.benchmarks import Benchmark
from megatron_vcr1.evaluation.bootstrap import NUM_RESAMPLES, SEED
from megatron_vcr1.evaluation.metrics import Measured
from megatron_vcr1.evaluation.predictions import Prediction, match_predictions, read_predictions
from megatron_vcr1.evaluation.summary import Summary, summarize
from megatron_vcr1.judge import CaptionVerdicts, Judge
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.rewards.scoring import NOT_JUDGED
from megatron_vcr1.types import FinishReason, Task, VideoSample

_CAPTIONS_A_CALL = 64
_UNANSWERED = "no output"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A benchmark's result.

    Attributes:
        predictions, measured: of each sample.
        verdicts: what a judge found, by sample id; for captioning.
        judge: who judged.
    """

    benchmark: Benchmark
    samples: Sequence[VideoSample]
    predictions: Sequence[Prediction]
    measured: Sequence[Measured]
    summary: Summary
    verdicts: Mapping[str, CaptionVerdicts]
    judge: str | None

    def as_json(self) -> dict[str, Any]:
        """What metrics.json holds; figures are in [0, 1]."""
        outputs = [one.output for one in self.predictions if one.output is not None]
        counts = {
            "num_unanswered": len(self.samples) - len(outputs),
            "num_untagged": sum(not is_tagged(output) for output in outputs),
            "num_reduced": sum(one.reduction is not None for one in self.predictions),
            "num_truncated": sum(one.finish_reason == FinishReason.LENGTH for one in self.predictions),
        }
        judged = {"judge": self.judge} if self.judge is not None else {}
        bootstrap = {"level": 0.95, "resamples": NUM_RESAMPLES, "seed": SEED, "unit": "video"}
        return {"benchmark": self.benchmark.name, **judged, **self.summary.as_json(), **counts, "bootstrap": bootstrap}

    def sample_rows(self) -> Iterable[dict[str, Any]]:
        """What samples.jsonl holds."""
        for sample, prediction, one in zip(self.samples, self.predictions, self.measured, strict=True):
            row: dict[str, Any] = {"id": sample.id, "metrics": dict(one.values), "reasons": dict(one.reasons)}
            if sample.category:
                row["category"] = sample.category
            if prediction.error is not None:
                row["error"] = prediction.error
            if (verdicts := self.verdicts.get(sample.id)) is not None:
                row["reference_events"] = _pairs(verdicts.reference_events, verdicts.reference_verdicts)
                row["caption_events"] = _pairs(verdicts.caption_events, verdicts.caption_verdicts)
            yield row


def score_predictions(
    benchmark: Benchmark, samples: Sequence[VideoSample], predictions: Sequence[Prediction], judge: Judge | None
) -> Evaluation:
    """What the predictions are worth; a sample without an output is worth nothing, and counted.

    Args:
        predictions: of each sample.
        judge: reads captions; needed for captioning only.
    """
    verdicts: dict[str, CaptionVerdicts] = {}
    if benchmark.task is Task.CAPTIONING:
        if judge is None:
            raise ValueError(f"benchmark {benchmark.name} needs a judge")
        captions, unreadable = _read_captions(samples, predictions)
        verdicts = _judge_captions(judge, samples, captions)
        measured = [_caption_measure(sample.id, unreadable, verdicts) for sample in samples]
    else:
        measured = [_measure(benchmark, *pair) for pair in zip(samples, predictions, strict=True)]
    return Evaluation(
        benchmark,
        samples,
        predictions,
        measured,
        summarize(benchmark, samples, measured),
        verdicts,
        judge.name if judge is not None and benchmark.task is Task.CAPTIONING else None,
    )


def score_file(
    benchmark: Benchmark,
    samples: Sequence[VideoSample],
    predictions: Path,
    out: Path,
    judge: Judge | None,
    *,
    allow_missing: bool,
) -> Evaluation:
    """Scores a file of predictions; writes `out`, and beside it OUT.samples.jsonl.

    Raises:
        UserError: the predictions do not fit the samples; names line or ids.
    """
    matched = match_predictions(read_predictions(predictions), samples, predictions, allow_missing=allow_missing)
    evaluation = score_predictions(benchmark, samples, matched, judge)
    about = {"label": out.stem, "predictions": str(predictions)}
    write_evaluation(evaluation, out, out.with_suffix(".samples.jsonl"), about)
    return evaluation


def write_evaluation(evaluation: Evaluation, metrics_file: Path, samples_file: Path, about: Mapping[str, Any]) -> None:
    """Writes both files; metrics.json last, so that it never stands beside samples of another result.

    Args:
        about: what else metrics.json says: label, model, thinking, manifest.
    """
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    _write(samples_file, "".join(json.dumps(row) + "\n" for row in evaluation.sample_rows()))
    _write(metrics_file, json.dumps({**about, **evaluation.as_json()}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _measure(benchmark: Benchmark, sample: VideoSample, prediction: Prediction) -> Measured:
    measure = benchmark.measure
    assert measure is not None, f"{benchmark.name} has a measure of its own"
    if prediction.output is not None:
        return measure(sample, prediction.output)
    nothing = measure(sample, "")
    return Measured(nothing.values, dict.fromkeys(nothing.reasons, _UNANSWERED))


def _read_captions(
    samples: Sequence[VideoSample], predictions: Sequence[Prediction]
) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by id, and why there is none, by id."""
    captions, unreadable = {}, {}
    for sample, prediction in zip(samples, predictions, strict=True):
        try:
            if prediction.output is None:
                raise UnparsableError(_UNANSWERED)
            captions[sample.id] = read_answer(prediction.output)
        except UnparsableError as error:
            unreadable[sample.id] = str(error)
    return captions, unreadable


def _judge_captions(
    judge: Judge, samples: Sequence[VideoSample], captions: Mapping[str, str]
) -> dict[str, CaptionVerdicts]:
    """What the judge found, by id; without what it could not judge."""
    asked = [sample for sample in samples if sample.id in captions]
    verdicts: dict[str, CaptionVerdicts] = {}
    with tqdm(total=len(asked), unit="caption", desc="judge") as bar:
        for start in range(0, len(asked), _CAPTIONS_A_CALL):
            chunk = asked[start : start + _CAPTIONS_A_CALL]
            found = judge.compare(chunk, [captions[sample.id] for sample in chunk])
            verdicts |= {sample.id: one for sample, one in zip(chunk, found, strict=True) if one is not None}
            bar.update(len(chunk))
    return verdicts


def _caption_measure(id: str, unreadable: Mapping[str, str], verdicts: Mapping[str, CaptionVerdicts]) -> Measured:
    if id in unreadable:
        return metrics.caption(0.0, 0.0, {"recall": unreadable[id]})
    if id in verdicts:
        return metrics.caption(verdicts[id].recall, verdicts[id].precision, {})
    return Measured({}, {"recall": NOT_JUDGED})


def _pairs(events: Sequence[str], verdicts: Sequence[str]) -> list[list[str]]:
    return [[event, str(verdict)] for event, verdict in zip(events, verdicts, strict=True)]
