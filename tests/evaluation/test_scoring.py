from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import BENCHMARKS, find_benchmark
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.evaluation.scoring import Evaluation, score_predictions, write_evaluation
from megatron_vcr1.judge import Judge
from megatron_vcr1.judge.lexical import LexicalReader
from megatron_vcr1.types import VideoSample
from tests.evaluation.samples import captions, choices


def scored(name: str, samples: Sequence[VideoSample], *outputs: str | None, judge: Judge | None = None) -> Evaluation:
    predictions = [
        Prediction(one.id, output, None if output is not None else "the video is damaged")
        for one, output in zip(samples, outputs, strict=True)
    ]
    return score_predictions(BENCHMARKS[name], samples, predictions, judge)


def test_what_is_counted() -> None:
    details = scored(
        "videomme", choices("a", "b", "c", "d", "e"), "A", "<answer>A</answer>", "<answer>B</answer>", "<think>A", None
    ).as_json()
    assert details["metrics"]["accuracy"]["value"] == 0.4
    assert details["metrics"]["accuracy"]["low"] < 0.4 < details["metrics"]["accuracy"]["high"]
    assert details["zeros"] == {"accuracy": {"wrong option": 1, "no <answer>": 1, "no output": 1}}
    assert (details["num_samples"], details["num_unanswered"], details["num_untagged"]) == (5, 1, 1)
    assert "judge" not in details


def test_truncated_answers_are_counted() -> None:
    predictions = [Prediction("a", "A", finish_reason="stop"), Prediction("b", "A", finish_reason="length")]
    evaluation = score_predictions(BENCHMARKS["videomme"], choices("a", "b"), predictions, None)
    assert evaluation.as_json()["num_truncated"] == 1


def test_categories_and_the_classes_above_them() -> None:
    samples = [
        *choices("a", "b", category="short/Counting"),
        *choices("c", category="short/OCR"),
        *choices("d", category="long/OCR"),
    ]
    summary = scored("videomme", samples, "A", "B", "A", "B").summary
    assert {name: (one["num_samples"], one["accuracy"]) for name, one in summary.categories.items()} == {
        "long": (1, 0),
        "long/OCR": (1, 0),
        "short": (3, pytest.approx(2 / 3)),
        "short/Counting": (2, 0.5),
        "short/OCR": (1, 1),
    }


def test_mvbench_is_the_mean_of_its_tasks() -> None:
    samples = [*choices("a", "b", "c", category="action_count"), *choices("d", category="action_antonym")]
    assert scored("mvbench", samples, "A", "A", "B", "B").summary.metrics["accuracy"].value == pytest.approx(1 / 3)
    assert scored("videomme", samples, "A", "A", "B", "B").summary.metrics["accuracy"].value == 0.5


def test_one_video_has_no_interval() -> None:
    samples = choices("a", "b", video="same.mp4")
    estimate = scored("videomme", samples, "A", "B").summary.metrics["accuracy"]
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)


def test_a_benchmark_picks_its_samples() -> None:
    short, long = choices("a", category="short/OCR"), choices("b", category="long/OCR")
    assert BENCHMARKS["videomme_short"].select([*long, *short, *captions("c")], "m.jsonl") == short
    with pytest.raises(UserError, match=r"m\.jsonl: none of its 1 samples is for benchmark tracking, of tracking"):
        find_benchmark("tracking").select(long, "m.jsonl")
    with pytest.raises(UserError, match="coco: no such benchmark; there are charades_sta, "):
        find_benchmark("coco")


class Unsure(LexicalReader):
    """Cannot read one caption."""

    def judge_events(self, questions):
        found = super().judge_events(questions)
        return [None if "unreadable" in text else one for (_, text), one in zip(questions, found, strict=True)]


def test_captions_are_judged_both_ways() -> None:
    outputs = ("A dog barks. It rains. A cat runs off.", "<answer>A cat runs.</answer>", "<think>A dog barks.", None)
    evaluation = scored("dream1k", captions("a", "b", "c", "d"), *outputs, judge=Judge(LexicalReader()))
    values = {row["id"]: row["metrics"] for row in evaluation.sample_rows()}
    assert values["a"] == {"recall": 1, "precision": pytest.approx(1 / 3)}
    assert values["b"] == {"recall": 0.5, "precision": 1}
    assert values["c"] == values["d"] == {"recall": 0, "precision": 0}
    metrics = evaluation.summary.metrics
    assert metrics["recall"].value == 1.5 / 4
    assert metrics["precision"].value == pytest.approx((4 / 3) / 4)
    both = 2 * metrics["recall"].value * metrics["precision"].value
    assert metrics["F1"].value == pytest.approx(both / (metrics["recall"].value + metrics["precision"].value))
    assert evaluation.as_json()["judge"] == LexicalReader.name
    assert evaluation.summary.zeros == {"recall": {"no <answer>": 1, "no output": 1}}


def test_what_a_judge_could_not_read_is_in_no_figure() -> None:
    outputs = ("A dog barks. A cat runs.", "unreadable")
    evaluation = scored("captioning", captions("a", "b"), *outputs, judge=Judge(Unsure()))
    assert evaluation.summary.metrics["recall"].value == 1
    assert evaluation.summary.num_unjudged == 1
    assert evaluation.summary.zeros == {}
    nothing = scored("captioning", captions("b"), "unreadable", judge=Judge(Unsure()))
    assert nothing.summary.metrics == {}
    assert nothing.as_json()["num_unjudged"] == 1


def test_f1_of_nothing_right_is_0() -> None:
    evaluation = scored("captioning", captions("a", "b"), "It rains.", "It snows.", judge=Judge(LexicalReader()))
    assert evaluation.summary.metrics["F1"].value == 0


def test_captions_need_a_judge() -> None:
    with pytest.raises(ValueError, match="dream1k needs a judge"):
        scored("dream1k", captions("a"), "A dog.")


def test_files(tmp_path: Path) -> None:
    evaluation = scored("dream1k", captions("a", "b"), "A dog barks.", None, judge=Judge(LexicalReader()))
    files = tmp_path / "new" / "metrics.json", tmp_path / "new" / "samples.jsonl"
    write_evaluation(evaluation, *files, {"label": "dream", "model": "m", "thinking": True})
    details = json.loads(files[0].read_text())
    assert (details["label"], details["benchmark"], details["num_samples"]) == ("dream", "dream1k", 2)
    assert details["bootstrap"] == {"level": 0.95, "resamples": 2000, "seed": 0, "unit": "video"}
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert rows[0]["reference_events"] == [["A dog barks.", "entailment"], ["A cat runs.", "neutral"]]
    assert rows[1]["error"] == "the video is damaged"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["metrics.json", "new", "samples.jsonl"]
