from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.evaluation import metrics
from megatron_vcr1.evaluation.benchmarks import BENCHMARKS, Benchmark
from megatron_vcr1.types import Box, GroundedChoiceTarget, Interval, Task, TrackingTarget
from tests.rewards.samples import BOXES, FRAGMENTS, completions, random_texts, sample

WITHOUT_JUDGE = [benchmark for benchmark in BENCHMARKS.values() if benchmark.metric_function is not None]


@pytest.mark.parametrize("benchmark", WITHOUT_JUDGE, ids=lambda benchmark: benchmark.name)
def test_the_target_text_scores_1_in_every_metric(benchmark: Benchmark) -> None:
    correct = sample(benchmark.task)
    scores = benchmark.metric_function(correct, target_text(correct, load_templates()))
    # NExT-GQA's single predicted span cannot cover both of two annotated spans.
    expected = {
        name: 1.25 / 1.25 if "IoU" not in name or correct.task is not Task.GROUNDED_QA else pytest.approx(1)
        for name in scores.values
    }
    assert scores.values == expected
    assert scores.reasons == {}


def test_grounding_metrics() -> None:
    scores = metrics.grounding(sample(Task.TEMPORAL_GROUNDING), "12.5 to 14.75")  # half of 12.5 to 17
    assert scores.values == {"mIoU": 0.5, "R@0.3": 1, "R@0.5": 1, "R@0.7": 0}
    unreadable = metrics.grounding(sample(Task.TEMPORAL_GROUNDING), "<answer>at noon</answer>")
    assert set(unreadable.values.values()) == {0}
    assert unreadable.reasons == {"iou": "no start and end"}
    assert metrics.grounding(sample(Task.TEMPORAL_GROUNDING), "1 to 2").reasons == {"iou": "no overlap"}


def test_tracking_metrics_differ_in_the_first_frame_and_at_the_border() -> None:
    target = sample(Task.TRACKING, TrackingTarget((Box(0.5, 0, 1, 1), Box(0.5, 0, 1, 1))))
    scores = metrics.tracking(target, "[[0, 0, 0.5, 1], [0.5, 0, 1.2, 1]]")
    assert scores.values == {"overlap": 0, "R@0.5": 0, "R@0.7": 0, "AO": 1, "SR@0.5": 1, "SR@0.75": 1}
    scores = metrics.tracking(target, "[[0.5, 0, 1, 1], [0.75, 0, 1, 1]]")
    assert scores.values == {"overlap": 0.75, "R@0.5": 1, "R@0.7": 1, "AO": 0.5, "SR@0.5": 0, "SR@0.75": 0}


@pytest.mark.parametrize("row", ["[1e999, 0, 1, 1]", "[0.9, 0.9, 0.1, 0.1]", "[2, 2, 3, 3]", "[-1e308, 0, 1e308, 1]"])
def test_invalid_boxes_do_not_overlap(row: str) -> None:
    answer = f"[{', '.join([row] * len(BOXES))}]"
    assert metrics.toolkit_ious(answer, BOXES)[0] <= 0.5
    assert metrics.tracking(sample(Task.TRACKING), answer).values["overlap"] == 0


def test_grounded_choice_metrics_in_both_conventions() -> None:
    target = sample(Task.GROUNDED_QA, GroundedChoiceTarget("B", (Interval(0, 10), Interval(20, 30))))
    scores = metrics.grounded_choice(target, "<answer>B</answer><glue>[(5, 25), (40, 41)]</glue>")
    assert scores.values == {
        "mIoU": pytest.approx(10 / 31),
        "accuracy": 1,
        "Acc@GQA": 0,  # each annotated span covers a quarter of the longest span
        "mIoP": 0.25,
        "IoP@0.3": 0,
        "IoP@0.5": 0,
        "mIoU (single span)": 0.2,
        "IoU@0.3": 0,
        "IoU@0.5": 0,
    }
    right = metrics.grounded_choice(target, "<answer>B</answer><glue>[(4, 8)]</glue>").values
    assert (right["Acc@GQA"], right["mIoP"], right["mIoU (single span)"]) == (1, 1, 0.4)
    wrong = metrics.grounded_choice(target, "<answer>C</answer><glue>[(4, 8)]</glue>")
    assert (wrong.values["Acc@GQA"], wrong.reasons) == (0, {"accuracy": "wrong option"})
    untagged = metrics.grounded_choice(target, "B")
    assert (untagged.values["accuracy"], untagged.values["mIoU"]) == (1, 0)
    assert untagged.reasons == {"iou": "no <glue>"}


def test_quality_ignores_case() -> None:
    assert metrics.quality(sample(Task.QUALITY), "Low Quality").values == {"accuracy": 1}
    assert metrics.quality(sample(Task.QUALITY), "high").reasons == {"accuracy": "wrong label"}


def check_is_scored(benchmark: Benchmark, output: str) -> None:
    scores = benchmark.metric_function(sample(benchmark.task), output)
    assert set(scores.values) == set(benchmark.metric_function(sample(benchmark.task), "").values)
    assert all(0 <= value <= 1 for value in scores.values.values())
    assert all(scores.reasons.values())


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.CAPTIONING])
@given(completions | st.text(max_size=30))
def test_any_output_is_scored(task: Task, output: str) -> None:
    check_is_scored(BENCHMARKS[str(task)], output)


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.CAPTIONING])
def test_many_malformed_outputs_are_scored(task: Task) -> None:
    for output in random_texts([fragment for fragment in FRAGMENTS if "<" not in fragment], 2000, max_fragments=6):
        check_is_scored(BENCHMARKS[str(task)], output)
