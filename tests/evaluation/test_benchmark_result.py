from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vcr1.evaluation.benchmark_result import BenchmarkResult, score_predictions, write_result
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.judge import Judge
from megatron_vcr1.judge.lexical import LexicalBackend
from megatron_vcr1.tasks import QualityTarget, TextMetric, TextTarget, find_task
from megatron_vcr1.types import Sample, Video
from megatron_vcr1.user_modules import UserCodeError
from tests.evaluation.samples import captions, choices


def scored(name: str, samples: Sequence[Sample], *outputs: str | None, judge: Judge | None = None) -> BenchmarkResult:
    predictions = [
        Prediction(sample.id, output, None if output is not None else "the video is damaged")
        for sample, output in zip(samples, outputs, strict=True)
    ]
    return score_predictions(find_benchmark(name), samples, predictions, judge)


def test_answers_and_reasons_for_zeros_are_counted() -> None:
    details = scored(
        "videomme", choices("a", "b", "c", "d", "e"), "A", "<answer>A</answer>", "<answer>B</answer>", "<think>A", None
    ).as_json()
    assert details["metrics"]["accuracy"]["value"] == 0.4
    assert details["metrics"]["accuracy"]["low"] < 0.4 < details["metrics"]["accuracy"]["high"]
    assert details["zeros"] == {"accuracy": {"wrong option": 1, "no <answer>": 1, "no output": 1}}
    assert (details["num_samples"], details["num_unanswered"], details["num_untagged"]) == (5, 1, 1)
    assert "judge" not in details


def test_answers_that_only_the_lenient_reading_reads_are_counted() -> None:
    result = scored("videomme", choices("a", "b", "c", "d"), "A", "<answer>A", "<think>x</think>b", "<think>A")
    details = result.as_json()
    assert (details["num_lenient"], details["num_samples"]) == (2, 4)
    assert details["metrics"]["accuracy"]["value"] == 0.25
    assert details["metrics"]["accuracy (lenient)"]["value"] == 0.5
    assert details["zeros"] == {"accuracy": {"no <answer>": 2, "<answer> not closed": 1}}
    assert [row["id"] for row in result.sample_rows() if "lenient" in row] == ["b", "c"]


def test_a_caption_that_only_the_lenient_reading_reads_is_judged() -> None:
    outputs = "<answer>A dog barks. A cat runs.", "<answer>A dog barks. A cat runs.</answer>"
    result = scored("captioning", captions("a", "b"), *outputs, judge=Judge(LexicalBackend()))
    metrics = {name: estimate.value for name, estimate in result.summary.metrics.items()}
    assert (metrics["recall"], metrics["recall (lenient)"]) == (0.5, 1)
    assert (metrics["F1"], metrics["F1 (lenient)"]) == (0.5, 1)
    assert result.as_json()["num_lenient"] == 1


def test_truncated_answers_are_counted() -> None:
    predictions = [Prediction("a", "A", finish_reason="stop"), Prediction("b", "A", finish_reason="length")]
    result = score_predictions(find_benchmark("videomme"), choices("a", "b"), predictions, None)
    assert result.as_json()["num_truncated"] == 1


class Unsure(LexicalBackend):
    """A judge that cannot read one of the captions."""

    def judge_events(self, questions):
        found = super().judge_events(questions)
        return [None if "unreadable" in text else verdict for (_, text), verdict in zip(questions, found, strict=True)]


def test_captions_are_judged_for_recall_and_precision() -> None:
    outputs = ("A dog barks. It rains. A cat runs off.", "<answer>A cat runs.</answer>", "<think>A dog barks.", None)
    result = scored("dream1k", captions("a", "b", "c", "d"), *outputs, judge=Judge(LexicalBackend()))
    values = {row["id"]: row["metrics"] for row in result.sample_rows()}
    a = {"recall": 1, "precision": pytest.approx(1 / 3)}
    assert values["a"] == {**a, **{f"{name} (lenient)": value for name, value in a.items()}}
    assert values["b"] == {"recall": 0.5, "precision": 1, "recall (lenient)": 0.5, "precision (lenient)": 1}
    assert values["c"] == values["d"] == dict.fromkeys(values["a"], 0)
    metrics = result.summary.metrics
    assert metrics["recall"].value == 1.5 / 4
    assert metrics["precision"].value == pytest.approx((4 / 3) / 4)
    both = 2 * metrics["recall"].value * metrics["precision"].value
    assert metrics["F1"].value == pytest.approx(both / (metrics["recall"].value + metrics["precision"].value))
    assert result.as_json()["judge"] == LexicalBackend.name
    assert result.summary.zeros == {"recall": {"no <answer>": 1, "no output": 1}}


def test_captions_that_were_not_judged_are_in_no_metric() -> None:
    outputs = ("A dog barks. A cat runs.", "unreadable")
    result = scored("captioning", captions("a", "b"), *outputs, judge=Judge(Unsure()))
    assert result.summary.metrics["recall"].value == 1
    assert result.summary.num_unjudged == 1
    assert result.summary.zeros == {}
    nothing = scored("captioning", captions("b"), "unreadable", judge=Judge(Unsure()))
    assert nothing.summary.metrics == {}
    assert nothing.as_json()["num_unjudged"] == 1


def test_f1_without_any_match_is_0() -> None:
    result = scored("captioning", captions("a", "b"), "It rains.", "It snows.", judge=Judge(LexicalBackend()))
    assert result.summary.metrics["F1"].value == 0


def test_captions_need_a_judge() -> None:
    with pytest.raises(ValueError, match="dream1k needs a judge"):
        scored("dream1k", captions("a"), "A dog.")


def test_the_files_of_a_result(tmp_path: Path) -> None:
    result = scored("dream1k", captions("a", "b"), "A dog barks.", None, judge=Judge(LexicalBackend()))
    files = tmp_path / "new" / "metrics.json", tmp_path / "new" / "samples.jsonl"
    write_result(result, *files, {"label": "dream", "model": "m", "thinking": True})
    details = json.loads(files[0].read_text())
    assert (details["label"], details["benchmark"], details["num_samples"]) == ("dream", "dream1k", 2)
    assert details["bootstrap"] == {"level": 0.95, "resamples": 2000, "seed": 0, "unit": "video"}
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert rows[0]["reference_events"] == [["A dog barks.", "entailment"], ["A cat runs.", "neutral"]]
    assert rows[1]["error"] == "the video is damaged"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.json", "new", "samples.jsonl"]


def test_free_form_answers_are_compared_by_their_own_metric() -> None:
    targets = (TextTarget("a red bicycle"), TextTarget("a red bicycle", TextMetric.JUDGE))
    samples = [Sample(id, (Video(f"{id}.mp4"),), targets[id in "cde"], "what?") for id in "abcde"]
    outputs = ("A red bicycle.", "It is red.", "It is a red bicycle.", "a car", None)
    result = scored("free_form", samples, *outputs, judge=Judge(LexicalBackend()))
    assert [values.values["accuracy"] for values in result.sample_metrics] == [1, 0, 1, 0, 0]
    assert result.as_json()["zeros"] == {"accuracy": {"wrong answer": 2, "no output": 1}}
    assert result.judge == LexicalBackend.name and set(result.verdicts) == {"c", "d"}


def test_failing_metrics_name_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise KeyError("colour")

    monkeypatch.setattr(type(find_task("quality")), "metrics", fails)
    samples = [Sample("a7", (Video("a.mp4"),), QualityTarget("low"), "how?")]
    with pytest.raises(UserCodeError, match=r"sample a7: the metrics of task quality(.|\n)*KeyError"):
        scored("quality", samples, "low")


@pytest.mark.parametrize(("method", "what"), [("needs_judge", "needs_judge"), ("judged_metrics", "the judged metrics")])
def test_failing_judged_metrics_name_the_sample(method: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise KeyError("colour")

    monkeypatch.setattr(type(find_task("captioning")), method, fails)
    with pytest.raises(UserCodeError, match=rf"sample a: {what} of task captioning(.|\n)*KeyError"):
        scored("captioning", captions("a"), "A dog barks.", judge=Judge(LexicalBackend()))
