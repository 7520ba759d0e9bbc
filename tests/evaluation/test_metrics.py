from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.data.prompts import load_templates, target_text
from megatron_vcr1.evaluation import metrics
from megatron_vcr1.evaluation.benchmarks import BENCHMARKS, Benchmark
from megatron_vcr1.types import Box, GroundedChoiceTarget, Interval, Task, TrackingTarget
from tests.rewards.samples import BOXES, FRAGMENTS, completions, sample, soups

MEASURED = [benchmark for benchmark in BENCHMARKS.values() if benchmark.measure is not None]


@pytest.mark.parametrize("benchmark", MEASURED, ids=lambda benchmark: benchmark.name)
def test_the_right_answer_is_worth_1_by_every_metric(benchmark: Benchmark) -> None:
    one = sample(benchmark.task)
    measured = benchmark.measure(one, target_text(one, load_templates()))
    # NExT-GQA's single span cannot be both of two.
    expected = {
        name: 1.25 / 1.25 if "IoU" not in name or one.task is not Task.GROUNDED_QA else pytest.approx(1)
        for name in measured.values
    }
    assert measured.values == expected
    assert measured.reasons == {}


def test_grounding() -> None:
    measured = metrics.grounding(sample(Task.TEMPORAL_GROUNDING), "12.5 to 14.75")  # half of 12.5 to 17
    assert measured.values == {"mIoU": 0.5, "R@0.3": 1, "R@0.5": 1, "R@0.7": 0}
    nothing = metrics.grounding(sample(Task.TEMPORAL_GROUNDING), "<answer>at noon</answer>")
    assert set(nothing.values.values()) == {0}
    assert nothing.reasons == {"iou": "no start and end"}
    assert metrics.grounding(sample(Task.TEMPORAL_GROUNDING), "1 to 2").reasons == {"iou": "no overlap"}


def test_tracking_counts_the_first_frame_and_boxes_beyond_the_frame_in_two_ways() -> None:
    truth = sample(Task.TRACKING, TrackingTarget((Box(0.5, 0, 1, 1), Box(0.5, 0, 1, 1))))
    measured = metrics.tracking(truth, "[[0, 0, 0.5, 1], [0.5, 0, 1.2, 1]]")
    assert measured.values == {"overlap": 0, "R@0.5": 0, "R@0.7": 0, "AO": 1, "SR@0.5": 1, "SR@0.75": 1}
    measured = metrics.tracking(truth, "[[0.5, 0, 1, 1], [0.75, 0, 1, 1]]")
    assert measured.values == {"overlap": 0.75, "R@0.5": 1, "R@0.7": 1, "AO": 0.5, "SR@0.5": 0, "SR@0.75": 0}


@pytest.mark.parametrize("row", ["[1e999, 0, 1, 1]", "[0.9, 0.9, 0.1, 0.1]", "[2, 2, 3, 3]", "[-1e308, 0, 1e308, 1]"])
def test_boxes_that_are_none(row: str) -> None:
    answer = f"[{', '.join([row] * len(BOXES))}]"
    assert metrics.toolkit_ious(answer, BOXES)[0] <= 0.5
    assert metrics.tracking(sample(Task.TRACKING), answer).values["overlap"] == 0


def test_grounded_choice_in_two_ways() -> None:
    truth = sample(Task.GROUNDED_QA, GroundedChoiceTarget("B", (Interval(0, 10), Interval(20, 30))))
    measured = metrics.grounded_choice(truth, "<answer>B</answer><glue>[(5, 25), (40, 41)]</glue>")
    assert measured.values == {
        "mIoU": pytest.approx(10 / 31),
        "accuracy": 1,
        "Acc@GQA": 0,  # a quarter of the longest span is in each annotated one
        "mIoP": 0.25,
        "IoP@0.3": 0,
        "IoP@0.5": 0,
        "mIoU (single span)": 0.2,
        "IoU@0.3": 0,
        "IoU@0.5": 0,
    }
    right = metrics.grounded_choice(truth, "<answer>B</answer><glue>[(4, 8)]</glue>").values
    assert (right["Acc@GQA"], right["mIoP"], right["mIoU (single span)"]) == (1, 1, 0.4)
    wrong = metrics.grounded_choice(truth, "<answer>C</answer><glue>[(4, 8)]</glue>")
    assert (wrong.values["Acc@GQA"], wrong.reasons) == (0, {"accuracy": "wrong option"})
    unread = metrics.grounded_choice(truth, "B")
    assert (unread.values["accuracy"], unread.values["mIoU"]) == (1, 0)
    assert unread.reasons == {"iou": "no <glue>"}


def test_quality() -> None:
    assert metrics.quality(sample(Task.QUALITY), "Low Quality").values == {"accuracy": 1}
    assert metrics.quality(sample(Task.QUALITY), "high").reasons == {"accuracy": "wrong label"}


def check(benchmark: Benchmark, output: str) -> None:
    measured = benchmark.measure(sample(benchmark.task), output)
    assert set(measured.values) == set(benchmark.measure(sample(benchmark.task), "").values)
    assert all(0 <= value <= 1 for value in measured.values.values())
    assert all(measured.reasons.values())


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.CAPTIONING])
@given(completions | st.text(max_size=30))
def test_any_output_has_a_value(task: Task, output: str) -> None:
    check(BENCHMARKS[str(task)], output)


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.CAPTIONING])
def test_many_outputs_have_a_value(task: Task) -> None:
    for output in soups([fragment for fragment in FRAGMENTS if "<" not in fragment], 2000, max_fragments=6):
        check(BENCHMARKS[str(task)], output)
