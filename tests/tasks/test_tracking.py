from __future__ import annotations

import pytest

from megatron_vcr1.rewards import score
from megatron_vcr1.tasks import with_lenient
from megatron_vcr1.tasks.tracking import TASK, TrackingTarget, toolkit_ious
from megatron_vcr1.types import Box
from tests.rewards.samples import BOXES, parts_of, sample


def test_tracking_averages_over_all_frames() -> None:
    half = [Box(box.x0, box.y0, box.x1, (box.y0 + box.y1) / 2) for box in BOXES[:4]]
    rows = [[box.x0, box.y0, box.x1, box.y1] for box in half] + [[0.9, 0.9, 0.1, 0.1]] * 2 + [[0, 0, 640, 480]] * 2
    breakdown = score(sample("tracking"), f"<answer>{rows}</answer>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(4 * 0.5 / 8)}
    pixels = score(sample("tracking"), f"<answer>{[[10, 20, 300, 400]] * 8}</answer>", thinking=False)
    assert parts_of(pixels) == {"format": 1, "iou": 0}
    assert pixels.reasons == {"iou": "no valid box within 0..1"}


def test_tracking_has_as_many_boxes_as_its_target() -> None:
    four = sample("tracking", TrackingTarget(BOXES[:4]))
    rows = [[box.x0, box.y0, box.x1, box.y1] for box in BOXES[:4]]
    assert score(four, f"<answer>{rows}</answer>", thinking=False).total == 2


def test_tracking_metrics_differ_in_the_first_frame_and_at_the_border() -> None:
    target = sample("tracking", TrackingTarget((Box(0.5, 0, 1, 1), Box(0.5, 0, 1, 1))))
    scores = TASK.metrics(target, "[[0, 0, 0.5, 1], [0.5, 0, 1.2, 1]]")
    uncut = pytest.approx(0.5 / 0.7 / 2)  # the second box extends beyond the frame
    assert scores.values == {
        **{"overlap": uncut, "R@0.5": 0, "R@0.7": 0, "overlap (strict)": 0},
        **{"AO": 1, "SR@0.5": 1, "SR@0.75": 1},
    }
    lenient = TASK.lenient_metrics(target, "[[0, 0, 0.5, 1], [0.5, 0, 1.2, 1]]", None)
    assert lenient.values == {"overlap": 0.5, "R@0.5": 1, "R@0.7": 0}  # cut at the frame
    scores = TASK.metrics(target, "[[0.5, 0, 1, 1], [0.75, 0, 1, 1]]")
    assert scores.values == {
        **{"overlap": 0.75, "R@0.5": 1, "R@0.7": 1, "overlap (strict)": 0.75},
        **{"AO": 0.5, "SR@0.5": 0, "SR@0.75": 0},
    }


@pytest.mark.parametrize("row", ["[1.5, 0, 2, 1]", "[0.5, 0, 0.4, 1]", "[0, 0, 5000, 5000]"])
def test_boxes_that_the_lenient_reading_cannot_use_do_not_count_as_lenient(row: str) -> None:
    output = f"<answer>[{', '.join([row] * len(BOXES))}]</answer>"
    scores = with_lenient(
        TASK.metrics(sample("tracking"), output), TASK.lenient_metrics(sample("tracking"), output, None)
    )
    assert not scores.is_lenient
    assert scores.values["overlap (lenient)"] == scores.values["overlap"] < 1e-6


def test_boxes_in_pixels_are_read_leniently() -> None:
    rows = [[640 * box.x0, 480 * box.y0, 640 * box.x1, 480 * box.y1] for box in BOXES]
    output = f"Here they are:\n```json\n{[{'bbox_2d': row, 'label': 'dog'} for row in rows]}\n```"
    strict = TASK.metrics(sample("tracking"), output)
    assert (strict.values["overlap"], strict.reasons) == (0, {"iou": "no list of boxes"})
    lenient = TASK.lenient_metrics(sample("tracking"), output, (640, 480))
    assert lenient.values == {"overlap": pytest.approx(1), "R@0.5": 1, "R@0.7": 1}
    assert TASK.lenient_metrics(sample("tracking"), output, None).values["overlap"] < 0.5  # read as thousandths


@pytest.mark.parametrize("row", ["[1e999, 0, 1, 1]", "[0.9, 0.9, 0.1, 0.1]", "[2, 2, 3, 3]", "[-1e308, 0, 1e308, 1]"])
def test_invalid_boxes_do_not_overlap(row: str) -> None:
    answer = f"[{', '.join([row] * len(BOXES))}]"
    assert toolkit_ious(answer, BOXES)[0] <= 0.5
    assert TASK.metrics(sample("tracking"), answer).values["overlap"] == 0
