from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.evaluation.summary import Estimate, Summary, summarize
from megatron_vcr1.tasks import SampleMetrics
from megatron_vcr1.types import Sample
from tests.evaluation.samples import captions, choices


def summary_of(name: str, samples: Sequence[Sample], *accuracies: float) -> Summary:
    metrics = [SampleMetrics({"accuracy": value}, {} if value else {"accuracy": "wrong"}) for value in accuracies]
    return summarize(find_benchmark(name), samples, metrics)


def test_a_category_also_counts_in_the_category_above_it() -> None:
    samples = [
        *choices("a", "b", category="short/Counting"),
        *choices("c", category="short/OCR"),
        *choices("d", category="long/OCR"),
    ]
    summary = summary_of("videomme", samples, 1, 0, 1, 0)
    assert {name: (values["num_samples"], values["accuracy"]) for name, values in summary.categories.items()} == {
        "long": (1, 0),
        "long/OCR": (1, 0),
        "short": (3, pytest.approx(2 / 3)),
        "short/Counting": (2, 0.5),
        "short/OCR": (1, 1),
    }
    assert summary.zeros == {"accuracy": {"wrong": 2}}


def test_mvbench_is_the_mean_of_its_tasks() -> None:
    samples = [*choices("a", "b", "c", category="action_count"), *choices("d", category="action_antonym")]
    assert summary_of("mvbench", samples, 1, 1, 0, 0).metrics["accuracy"].value == pytest.approx(1 / 3)
    assert summary_of("videomme", samples, 1, 1, 0, 0).metrics["accuracy"].value == 0.5


def test_a_single_video_gives_no_interval() -> None:
    summary = summary_of("videomme", choices("a", "b", video="same.mp4"), 1, 0)
    assert summary.metrics == {"accuracy": Estimate(0.5, None, None)}
    assert summary.as_json()["metrics"] == {"accuracy": {"value": 0.5, "low": None, "high": None}}


def test_f1_is_computed_from_the_means_and_samples_without_verdict_are_left_out() -> None:
    metrics = [
        SampleMetrics({"recall": 1.0, "precision": 0.5}),
        SampleMetrics({"recall": 0.0, "precision": 0.0}),
        SampleMetrics({}, {"recall": "not judged"}),
    ]
    summary = summarize(find_benchmark("captioning"), captions("a", "b", "c"), metrics)
    assert summary.metrics["F1"].value == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert (summary.num_samples, summary.num_unjudged, summary.zeros) == (3, 1, {})
    assert summarize(find_benchmark("captioning"), captions("c"), metrics[2:]).metrics == {}
