from __future__ import annotations

import pytest

from megatron_vcr1.rewards import score
from megatron_vcr1.tasks.grounded_qa import TASK, GroundedChoiceTarget
from megatron_vcr1.types import Interval
from tests.rewards.samples import parts_of, sample


def test_reward_of_grounded_qa() -> None:
    target_sample = sample("grounded_qa", GroundedChoiceTarget("B", (Interval(0, 10), Interval(20, 30))))
    breakdown = score(target_sample, "<answer>C</answer><glue>[(5, 25), (5, 7)]</glue>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(10 / 30), "accuracy": 0}
    assert breakdown.reasons == {"accuracy": "wrong option"}
    empty = score(target_sample, "<answer>B</answer><glue>[]</glue>", thinking=False)
    assert parts_of(empty) == {"format": 1, "iou": 0, "accuracy": 1}
    assert empty.reasons == {"iou": "no overlap"}
    damaged = score(target_sample, "<answer>B</answer><glue>[(0, 10), (30, 20)]</glue>", thinking=False)
    assert parts_of(damaged) == {"format": 0, "iou": 0, "accuracy": 1}
    assert damaged.reasons == {"format": "start after end", "iou": "start after end"}


def test_grounded_choice_metrics_in_both_conventions() -> None:
    target = sample("grounded_qa", GroundedChoiceTarget("B", (Interval(0, 10), Interval(20, 30))))
    scores = TASK.metrics(target, "<answer>B</answer><glue>[(5, 25), (40, 41)]</glue>")
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
    right = TASK.metrics(target, "<answer>B</answer><glue>[(4, 8)]</glue>").values
    assert (right["Acc@GQA"], right["mIoP"], right["mIoU (single span)"]) == (1, 1, 0.4)
    wrong = TASK.metrics(target, "<answer>C</answer><glue>[(4, 8)]</glue>")
    assert (wrong.values["Acc@GQA"], wrong.reasons) == (0, {"accuracy": "wrong option"})
    untagged = TASK.metrics(target, "B")
    assert (untagged.values["accuracy"], untagged.values["mIoU"]) == (1, 0)
    assert untagged.reasons == {"iou": "no <glue>"}
