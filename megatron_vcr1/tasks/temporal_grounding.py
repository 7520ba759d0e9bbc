"""Temporal grounding: the span of time in which a described event happens, or all such spans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vcr1.rewards.answer_parsing import read_answer
from megatron_vcr1.rewards.lenient import lenient_answer, lenient_spans, leniently
from megatron_vcr1.rewards.overlap import span_union_iou, temporal_iou
from megatron_vcr1.rewards.parsing import last_answer, parse_event_spans
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, at_least, reason_if_zero, value_or_default
from megatron_vcr1.tasks.row_fields import INTERVAL, TargetField, list_of
from megatron_vcr1.types import Interval, RewardPart, Sample, Target


@dataclass(frozen=True, slots=True)
class GroundingTarget(Target):
    """The target of temporal grounding: one span, or all spans in which the queried event happens.

    Attributes:
        interval: the only span; the prompt asks for one.
        intervals: all spans, one or more; the prompt asks for a list of them (QVHighlights).
    """

    interval: Interval | None = None
    intervals: tuple[Interval, ...] | None = None

    def __post_init__(self) -> None:
        if (self.interval is None) == (not self.intervals):
            raise ValueError("temporal grounding needs either 'interval', the only span, or 'intervals', all spans")

    @property
    def spans(self) -> tuple[Interval, ...]:
        """All true spans."""
        return self.intervals or (() if self.interval is None else (self.interval,))


class TemporalGrounding(Task[GroundingTarget]):
    """Find the span of time in which the event of the query happens; reward: format + IoU."""

    name = "temporal_grounding"
    target_type = GroundingTarget
    needs_media = "one video"
    target_fields = (
        TargetField("interval", INTERVAL, "the span in which the queried event happens, in seconds", required=False),
        TargetField("intervals", list_of(INTERVAL), "instead of `interval`: all spans of the event", required=False),
    )
    answer_prompt = """\
Find $parts of the video in which this happens: "$query"
Reply with the second at which it starts and the second at which it ends, both with two decimals, in this form:
<answer>$example</answer>"""
    think_prompt = """\
Find $parts of the video in which this happens: "$query"
First reason about what you see inside <think> </think>, and mark each moment or range that you rely on with \
<timestep> </timestep>. Then give the second at which it starts and the second at which it ends, both with two \
decimals, in this form:
<think>your reasoning</think>
<answer>$example</answer>"""
    more_placeholders = (
        ("parts", '"the part", or "every part" if the target is `intervals`'),
        ("example", "an answer in the form that is asked for: `12.54 to 17.83`, or a list of (start, end)"),
    )

    def placeholders(self, sample: Sample, numbers: NumberFormat) -> dict[str, str]:
        one = self.target_of(sample).interval is not None
        return {**super().placeholders(sample, numbers), **_answer_form(one=one)}

    def query_placeholders(self, query: str, options: Sequence[str], numbers: NumberFormat) -> dict[str, str]:
        """Ask for one span."""
        return {**super().query_placeholders(query, options, numbers), **_answer_form(one=True)}

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        target = self.target_of(sample)
        return f"<answer>{_written(target.spans, numbers, as_list=target.interval is None)}</answer>"

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        """Compute the IoU of the time that the answered and the true spans cover, as VideoChat-R1.5 does."""
        target = self.target_of(sample).spans
        return {
            "iou": compute_part(
                lambda: span_union_iou(parse_event_spans(last_answer(completion)), target), "no overlap"
            )
        }

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        """Compute mIoU and R@t (Charades-STA, ActivityNet, QVHighlights).

        ``mIoU`` is the IoU of the time that the spans cover. ``R@t`` is 1 if the first answered span has an IoU of at
        least t with the true span that it fits best, as QVHighlights defines R1@t. With one span on each side, the two
        use the same IoU.
        """
        return _metrics(lambda: parse_event_spans(read_answer(output)), self.target_of(sample).spans)

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        def read() -> tuple[Interval, ...]:
            return leniently(
                lambda: parse_event_spans(read_answer(output)), lambda: lenient_spans(lenient_answer(output))
            )

        return _metrics(read, self.target_of(sample).spans)

    def intervals(self, sample: Sample) -> tuple[Interval, ...]:
        return self.target_of(sample).spans

    def answered_intervals(self, sample: Sample, completion: str) -> tuple[Interval, ...]:
        return parse_event_spans(read_answer(completion))


def _metrics(read: Callable[[], tuple[Interval, ...]], target: tuple[Interval, ...]) -> SampleMetrics:
    no_spans: tuple[Interval, ...] = ()
    spans, reasons = value_or_default("iou", no_spans, read)
    iou = span_union_iou(spans, target)
    best = max(temporal_iou(spans[0], span) for span in target) if spans else 0.0
    values = {"mIoU": iou, **at_least("R", best, (0.3, 0.5, 0.7))}
    return SampleMetrics(values, reasons or reason_if_zero("iou", iou, "no overlap"))


def _answer_form(*, one: bool) -> dict[str, str]:
    """Return the placeholders that ask for one span, or for all spans."""
    example = (Interval(12.54, 17.83),) if one else (Interval(5.2, 10.4), Interval(12.54, 17.83))
    return {"parts": "the part" if one else "every part", "example": _written(example, NumberFormat(), as_list=not one)}


def _written(spans: tuple[Interval, ...], numbers: NumberFormat, *, as_list: bool) -> str:
    """Write spans as a list of (start, end), or a single one as START to END."""
    times = [(numbers.seconds(span.start_s), numbers.seconds(span.end_s)) for span in spans]
    if as_list:
        return f"[{', '.join(f'({start}, {end})' for start, end in times)}]"
    ((start, end),) = times
    return f"{start} to {end}"


TASK = TemporalGrounding()
