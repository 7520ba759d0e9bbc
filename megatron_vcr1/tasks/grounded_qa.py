"""Grounded QA: the letter of the right option, and the spans of time that contain the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcr1.rewards.answer_parsing import read_choice
from megatron_vcr1.rewards.lenient import lenient_glue, leniently
from megatron_vcr1.rewards.overlap import merge, span_union_iou, temporal_iou
from megatron_vcr1.rewards.parsing import first_glue, parse_spans
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import (
    SampleMetrics,
    at_least,
    choice_accuracy,
    lenient_choice,
    reason_if_zero,
    value_or_default,
)
from megatron_vcr1.tasks.multiple_choice_qa import check_choice, choice_part
from megatron_vcr1.tasks.row_fields import INTERVAL, TEXT, TargetField, list_of
from megatron_vcr1.types import Interval, RewardPart, Sample, Target


@dataclass(frozen=True, slots=True)
class GroundedChoiceTarget(Target):
    """The target of grounded QA: the letter of the right option, and the spans of time that contain the evidence."""

    choice: str
    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        if not self.intervals:
            raise ValueError("grounded QA needs at least one supporting interval")


class GroundedQA(Task[GroundedChoiceTarget]):
    """Choose the option and state the spans that prove it; reward: format + IoU + accuracy."""

    name = "grounded_qa"
    target_type = GroundedChoiceTarget
    needs_media = "one video"
    target_fields = (
        TargetField("choice", TEXT, "the letter of the right option"),
        TargetField("intervals", list_of(INTERVAL), "the spans that contain the evidence, in seconds; at least one"),
    )
    answer_prompt = """\
$query
$options
Reply with the letter of the right option, and after it with the parts of the video that prove it, as a list of \
(start, end) in seconds, in this form:
<answer>A</answer><glue>[(5.2, 10.4)]</glue>"""
    think_prompt = """\
$query
$options
First reason about what you see inside <think> </think>, and mark each moment or range that you rely on with \
<timestep> </timestep>. Then give the letter of the right option, and after it the parts of the video that \
prove it, as a list of (start, end) in seconds, in this form:
<think>your reasoning</think>
<answer>A</answer><glue>[(5.2, 10.4)]</glue>"""
    tags = ("answer", "glue")
    has_options = True

    def check_sample(self, sample: Sample) -> None:
        super().check_sample(sample)
        check_choice(self.target_of(sample).choice, sample)

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        target = self.target_of(sample)
        spans = (f"({numbers.seconds(span.start_s)}, {numbers.seconds(span.end_s)})" for span in target.intervals)
        return f"<answer>{target.choice}</answer><glue>[{', '.join(spans)}]</glue>"

    def check_answer_form(self, sample: Sample, completion: str) -> None:
        parse_spans(first_glue(completion))

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        target = self.target_of(sample)
        return {
            "iou": compute_part(
                lambda: span_union_iou(parse_spans(first_glue(completion)), target.intervals), "no overlap"
            ),
            "accuracy": choice_part(sample, completion, target.choice),
        }

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        """Compute the metrics of NExT-GQA in two conventions.

        The paper's: ``mIoU`` of the merged spans, and ``accuracy``. The authors': IoU and IoP (the fraction of the
        predicted span that is correct) of a single predicted span with the annotated span that it fits best, and
        Acc@GQA, which is 1 for the correct option with an IoP of at least 0.5. If several spans are predicted, the
        longest counts as the single span, the first of equally long ones. A predicted span without length does not
        count; the authors give it an IoP of 1.
        """
        target = self.target_of(sample)
        no_spans: tuple[Interval, ...] = ()
        spans, iou_reasons = value_or_default("iou", no_spans, lambda: parse_spans(first_glue(output)))
        accuracy, accuracy_reasons = choice_accuracy(lambda: read_choice(output, sample.options), target.choice)
        union_iou = span_union_iou(spans, target.intervals)
        iou, iop = single_span_scores(spans, target.intervals)
        values = {
            "mIoU": union_iou,
            "accuracy": accuracy,
            "Acc@GQA": accuracy * (iop >= 0.5),
            "mIoP": iop,
            **at_least("IoP", iop, (0.3, 0.5)),
            "mIoU (single span)": iou,
            **at_least("IoU", iou, (0.3, 0.5)),
        }
        reasons = {**(iou_reasons or reason_if_zero("iou", union_iou, "no overlap")), **accuracy_reasons}
        return SampleMetrics(values, reasons)

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        target = self.target_of(sample)

        def union_iou() -> float:
            spans = leniently(lambda: parse_spans(first_glue(output)), lambda: lenient_glue(output))
            return span_union_iou(spans, target.intervals)

        iou, iou_reasons = value_or_default("iou", 0.0, union_iou)
        accuracy, accuracy_reasons = choice_accuracy(lambda: lenient_choice(sample, output), target.choice)
        reasons = {**(iou_reasons or reason_if_zero("iou", iou, "no overlap")), **accuracy_reasons}
        return SampleMetrics({"mIoU": iou, "accuracy": accuracy}, reasons)

    def intervals(self, sample: Sample) -> tuple[Interval, ...]:
        return self.target_of(sample).intervals

    def answered_intervals(self, sample: Sample, completion: str) -> tuple[Interval, ...]:
        return parse_spans(first_glue(completion))


def single_span_scores(predicted: Sequence[Interval], target: Sequence[Interval]) -> tuple[float, float]:
    """Return NExT-GQA's IoU and IoP of the longest predicted span, each the best over the annotated spans.

    Without a predicted span both are 0.
    """
    if not predicted:
        return 0.0, 0.0
    span = max(merge(predicted), key=lambda merged: merged.duration_s)
    iou = max(temporal_iou(span, truth) for truth in target)
    covered_s = max(min(span.end_s, truth.end_s) - max(span.start_s, truth.start_s) for truth in target)
    return iou, min(max(covered_s, 0.0) / span.duration_s, 1.0)


TASK = GroundedQA()
