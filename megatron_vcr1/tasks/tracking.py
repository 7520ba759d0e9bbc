"""Tracking: the box of an object in each frame that the model sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcr1.rewards.answer_parsing import read_answer
from megatron_vcr1.rewards.lenient import lenient_answer, lenient_boxes, leniently
from megatron_vcr1.rewards.overlap import mean_box_iou, mean_uncut_box_iou
from megatron_vcr1.rewards.parsing import UnparsableError, last_answer, parse_box_rows, parse_boxes
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, at_least, reason_if_zero, value_or_default
from megatron_vcr1.tasks.row_fields import BOX, TargetField, list_of
from megatron_vcr1.types import Box, RewardPart, Sample, Target


@dataclass(frozen=True, slots=True)
class TrackingTarget(Target):
    """The target of tracking: the object's box in each frame that the model sees.

    The prompt contains the first box, which tells the model which object to track.
    """

    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if len(self.boxes) < 2 or len(self.boxes) % 2:
            raise ValueError(
                f"tracking needs one box per frame of an even number of frames (they enter the model in pairs), "
                f"got {len(self.boxes)}"
            )


class Tracking(Task[TrackingTarget]):
    """Follow the object of the query from its first box; reward: format + mean IoU of the boxes."""

    name = "tracking"
    target_type = TrackingTarget
    needs_media = "one video"
    target_fields = (TargetField("boxes", list_of(BOX), "the object's box in each frame, as fractions of the frame"),)
    answer_prompt = """\
The video is shown as $num_frames frames. In the first frame, the $query is inside the box $first_box, given as \
[x0, y0, x1, y1] with 0 at the left and top edge and 1 at the right and bottom edge.
Follow it and reply with a list of $num_frames boxes, one for each frame in order, in this form:
<answer>[[x0, y0, x1, y1], ...]</answer>"""
    think_prompt = """\
The video is shown as $num_frames frames. In the first frame, the $query is inside the box $first_box, given as \
[x0, y0, x1, y1] with 0 at the left and top edge and 1 at the right and bottom edge.
Follow it. First reason about how it moves inside <think> </think>. Then give a list of $num_frames boxes, one \
for each frame in order, in this form:
<think>your reasoning</think>
<answer>[[x0, y0, x1, y1], ...]</answer>"""
    more_placeholders = (
        ("num_frames", "number of frames that the model sees, and of boxes that it should return"),
        ("first_box", "the object's box in the first frame"),
    )

    def placeholders(self, sample: Sample, numbers: NumberFormat) -> dict[str, str]:
        boxes = self.target_of(sample).boxes
        more = {"num_frames": str(len(boxes)), "first_box": numbers.box(boxes[0])}
        return {**super().placeholders(sample, numbers), **more}

    def video_options(self, sample: Sample) -> dict[str, float]:
        num_frames = len(self.target_of(sample).boxes)
        return {"min_frames": num_frames, "max_frames": num_frames}

    def frames_fault(self, sample: Sample, num_frames: int) -> str | None:
        num_boxes = len(self.target_of(sample).boxes)
        if num_frames == num_boxes:
            return None
        return f"the video has {num_frames} frames, but tracking has {num_boxes} boxes"

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        return f"<answer>[{', '.join(map(numbers.box, self.target_of(sample).boxes))}]</answer>"

    def check_answer_form(self, sample: Sample, completion: str) -> None:
        parse_boxes(last_answer(completion), len(self.target_of(sample).boxes))

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        target = self.target_of(sample).boxes

        def iou() -> float:
            predicted = parse_boxes(last_answer(completion), len(target))
            if not any(predicted):
                raise UnparsableError("no valid box within 0..1")
            return mean_box_iou(predicted, target)

        return {"iou": compute_part(iou, "no overlap")}

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        """Compute the metrics of GOT-10k in two conventions.

        The paper's, as its code computes them: ``overlap`` is the mean IoU of all boxes, which may extend beyond the
        frame, and R@t is 1 if it is at least t. In ``overlap (strict)``, which is the IoU of the reward, a box that
        extends beyond the frame scores 0. The toolkit's: ``AO`` and ``SR@t`` leave out the first box, which the prompt
        states. SR is the fraction of frames with an IoU above t, and boxes are cut at the frame.
        """
        target = self.target_of(sample).boxes
        num_boxes = len(target)
        overlap, reasons = value_or_default(
            "iou", 0.0, lambda: mean_uncut_box_iou(parse_box_rows(read_answer(output), num_boxes), target)
        )
        strict, _ = value_or_default(
            "iou", 0.0, lambda: mean_box_iou(parse_boxes(read_answer(output), num_boxes), target)
        )
        ious, _ = value_or_default("iou", [0.0] * len(target), lambda: toolkit_ious(read_answer(output), target))
        later = ious[1:]
        values = {
            "overlap": overlap,
            **at_least("R", overlap, (0.5, 0.7)),
            "overlap (strict)": strict,
            "AO": math.fsum(later) / len(later),
            **{f"SR@{threshold}": sum(iou > threshold for iou in later) / len(later) for threshold in (0.5, 0.75)},
        }
        return SampleMetrics(values, reasons or reason_if_zero("iou", overlap, "no overlap"))

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        target = self.target_of(sample).boxes

        def read() -> tuple[Box | None, ...]:
            answer = leniently(lambda: read_answer(output), lambda: lenient_answer(output))
            return lenient_boxes(answer, len(target), frame_size)

        overlap, reasons = value_or_default("iou", 0.0, lambda: mean_box_iou(read(), target))
        values = {"overlap": overlap, **at_least("R", overlap, (0.5, 0.7))}
        if reasons:  # the lenient reading reads no more than the strict one
            strict = self.metrics(sample, output)
            return SampleMetrics({name: strict.values[name] for name in values}, strict.reasons)
        return SampleMetrics(values, reason_if_zero("iou", overlap, "no overlap"))

    def boxes(self, sample: Sample) -> tuple[Box, ...]:
        return self.target_of(sample).boxes

    def answered_boxes(self, sample: Sample, completion: str) -> tuple[Box | None, ...]:
        return parse_boxes(read_answer(completion), len(self.target_of(sample).boxes))


def toolkit_ious(answer: str, target: Sequence[Box]) -> list[float]:
    """Return the IoU of each frame as the GOT-10k toolkit computes it, from left, top, width and height.

    Boxes are cut at the frame. A box that begins outside of the frame is moved inside with its size, instead of being
    cut at both ends. A box with a number that is not finite scores 0.

    Raises:
        UnparsableError: the answer is not a list of as many boxes as `target`.
    """
    return [_toolkit_iou(row, box) for row, box in zip(parse_box_rows(answer, len(target)), target, strict=True)]


def _toolkit_iou(row: tuple[float, ...], target: Box) -> float:
    if not all(map(math.isfinite, row)):
        return 0.0
    x0, y0 = _clip(row[0], 1.0), _clip(row[1], 1.0)
    x1, y1 = x0 + _clip(row[2] - row[0], 1 - x0), y0 + _clip(row[3] - row[1], 1 - y0)
    width = max(min(x1, target.x1) - max(x0, target.x0), 0.0)
    height = max(min(y1, target.y1) - max(y0, target.y0), 0.0)
    union = (x1 - x0) * (y1 - y0) + (target.x1 - target.x0) * (target.y1 - target.y0) - width * height
    return min(width * height / union, 1.0) if union > 0 else 0.0


def _clip(value: float, high: float) -> float:
    """Clip to [0, high]."""
    return min(max(value, 0.0), high)


TASK = Tracking()
