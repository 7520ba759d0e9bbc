from __future__ import annotations

import pytest

from megatron_vcr1.data.rows import row_from_sample, sample_from_row
from megatron_vcr1.data.templates import build_messages, load_templates, target_text
from megatron_vcr1.rewards import score
from megatron_vcr1.tasks.temporal_grounding import TASK, GroundingTarget
from megatron_vcr1.types import Interval
from tests.rewards.samples import parts_of, sample

SEVERAL = sample("temporal_grounding", GroundingTarget(intervals=(Interval(0, 10), Interval(20, 30))))


def test_reward_of_grounding() -> None:
    breakdown = score(sample("temporal_grounding"), "<answer>12.5 to 14</answer>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(1.5 / 4.5)}
    assert breakdown.total == pytest.approx(4 / 3)
    chatty = score(sample("temporal_grounding"), "So: <answer>from 12.5 to 14 s</answer>", thinking=False)
    assert chatty.total == pytest.approx(1 / 3)
    assert chatty.reasons == {"format": "text before <answer>"}


def test_grounding_metrics() -> None:
    scores = TASK.metrics(sample("temporal_grounding"), "12.5 to 14.75")  # half of 12.5 to 17
    assert scores.values == {"mIoU": 0.5, "R@0.3": 1, "R@0.5": 1, "R@0.7": 0}
    unreadable = TASK.metrics(sample("temporal_grounding"), "<answer>at noon</answer>")
    assert set(unreadable.values.values()) == {0}
    assert unreadable.reasons == {"iou": "no start and end"}
    assert TASK.metrics(sample("temporal_grounding"), "1 to 2").reasons == {"iou": "no overlap"}


def test_a_list_of_spans_is_rewarded_by_the_iou_of_the_covered_time() -> None:
    breakdown = score(SEVERAL, "<answer>[(0, 10), (20, 25)]</answer>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": 0.75}
    assert score(SEVERAL, "<answer>0 to 10</answer>", thinking=False).parts["iou"] == 0.5
    assert score(SEVERAL, "<answer>0 to 30</answer>", thinking=False).parts["iou"] == pytest.approx(2 / 3)
    assert score(SEVERAL, "<answer>[]</answer>", thinking=False).reasons == {"iou": "no start and end"}
    listed = score(sample("temporal_grounding"), "<answer>[(12.5, 14.75)]</answer>", thinking=False)
    assert parts_of(listed) == {"format": 1, "iou": 0.5}


def test_metrics_with_several_true_spans() -> None:
    scores = TASK.metrics(SEVERAL, "[(20, 25), (0, 10)]")
    assert scores.values == {"mIoU": 0.75, "R@0.3": 1, "R@0.5": 1, "R@0.7": 0}  # R@t counts the first span
    assert TASK.metrics(SEVERAL, "[(0, 10), (40, 90)]").values["R@0.7"] == 1


def test_the_prompt_asks_for_a_list_if_the_target_is_one() -> None:
    templates = load_templates()
    prompts = [
        build_messages(target, templates, thinking=True)[0]["content"][1]["text"]
        for target in (sample("temporal_grounding"), SEVERAL)
    ]
    assert "Find the part of" in prompts[0]
    assert prompts[0].endswith("<answer>12.54 to 17.83</answer>")
    assert "Find every part of" in prompts[1]
    assert prompts[1].endswith("<answer>[(5.20, 10.40), (12.54, 17.83)]</answer>")
    assert target_text(SEVERAL, templates) == "<answer>[(0.00, 10.00), (20.00, 30.00)]</answer>"


def test_rows_hold_one_span_or_all_spans() -> None:
    row = row_from_sample(SEVERAL)
    assert row["target"] == {"intervals": [[0, 10], [20, 30]]}
    assert sample_from_row(row) == SEVERAL
    assert row_from_sample(sample("temporal_grounding"))["target"] == {"interval": [12.5, 17]}
    for target in ({}, {"intervals": []}, {"interval": [1, 2], "intervals": [[1, 2]]}):
        with pytest.raises(ValueError, match="needs either 'interval', the only span, or 'intervals', all spans"):
            sample_from_row({**row, "target": target})


@pytest.mark.parametrize("output", ["12.5s - 14.75s", '{"start": 12.5, "end": 14.75}', "<answer>00:12.5 to 00:14.75"])
def test_other_forms_are_read_leniently(output: str) -> None:
    assert TASK.metrics(sample("temporal_grounding"), output).values["mIoU"] == 0
    lenient = TASK.lenient_metrics(sample("temporal_grounding"), output, None)
    assert lenient.values == {"mIoU": 0.5, "R@0.3": 1, "R@0.5": 1, "R@0.7": 0}
    assert lenient.reasons == {}
