"""Temporal grounding: the span of time in which a described event happens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vcr1.rewards.answer_parsing import read_answer
from megatron_vcr1.rewards.overlap import temporal_iou
from megatron_vcr1.rewards.parsing import last_answer, parse_interval
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, at_least, reason_if_zero, value_or_default
from megatron_vcr1.tasks.row_fields import INTERVAL, TargetField
from megatron_vcr1.types import Interval, RewardPart, Target, VideoSample


@dataclass(frozen=True, slots=True)
class GroundingTarget(Target):
    """The target of temporal grounding: the span in which the queried event happens."""

    interval: Interval


class TemporalGrounding(Task[GroundingTarget]):
    """Find the span of time in which the event of the query happens; reward: format + IoU."""

    name = "temporal_grounding"
    target_type = GroundingTarget
    target_fields = (TargetField("interval", INTERVAL, "the span in which the queried event happens, in seconds"),)
    answer_prompt = """\
Find the part of the video in which this happens: "$query"
Reply with the second at which it starts and the second at which it ends, both with two decimals, in this form:
<answer>12.54 to 17.83</answer>"""
    think_prompt = """\
Find the part of the video in which this happens: "$query"
First reason about what you see inside <think> </think>, and mark each moment or range that you rely on with \
<timestep> </timestep>. Then give the second at which it starts and the second at which it ends, both with two \
decimals, in this form:
<think>your reasoning</think>
<answer>12.54 to 17.83</answer>"""

    def target_text(self, sample: VideoSample, numbers: NumberFormat) -> str:
        interval = self.target_of(sample).interval
        return f"<answer>{numbers.seconds(interval.start_s)} to {numbers.seconds(interval.end_s)}</answer>"

    def reward_parts(self, sample: VideoSample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        target = self.target_of(sample).interval
        return {
            "iou": compute_part(lambda: temporal_iou(parse_interval(last_answer(completion)), target), "no overlap")
        }

    def metrics(self, sample: VideoSample, output: str) -> SampleMetrics:
        """Compute mIoU and R@t, which is 1 if the IoU is at least t (Charades-STA, ActivityNet)."""
        target = self.target_of(sample).interval
        iou, reasons = value_or_default("iou", 0.0, lambda: temporal_iou(parse_interval(read_answer(output)), target))
        values = {"mIoU": iou, **at_least("R", iou, (0.3, 0.5, 0.7))}
        return SampleMetrics(values, reasons or reason_if_zero("iou", iou, "no overlap"))

    def intervals(self, sample: VideoSample) -> tuple[Interval, ...]:
        return (self.target_of(sample).interval,)

    def answered_intervals(self, sample: VideoSample, completion: str) -> tuple[Interval, ...]:
        return (parse_interval(read_answer(completion)),)


TASK = TemporalGrounding()
