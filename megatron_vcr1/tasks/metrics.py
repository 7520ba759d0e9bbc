"""What the metrics of the tasks share: pure functions, like the rewards.

Where the paper and the authors of a dataset define a metric differently, both are computed under different names. All
metrics are in [0, 1] and higher is better. An unreadable answer scores 0, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_vcr1.rewards.answer_parsing import read_choice
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.types import VideoSample

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SampleMetrics:
    """The metrics of one output.

    Attributes:
        values: value by metric name; empty if a judge could not judge the output.
        reasons: for each part of the answer that scored 0 (iou, accuracy, recall), the reason.
    """

    values: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)


def choice_accuracy(sample: VideoSample, output: str, choice: str) -> tuple[float, Mapping[str, str]]:
    """Return the accuracy of a multiple-choice answer, and the reason if it is 0."""
    accuracy, reasons = value_or_default("accuracy", 0.0, lambda: float(read_choice(output, sample.options) == choice))
    return accuracy, reasons or reason_if_zero("accuracy", accuracy, "wrong option")


def value_or_default(part: str, default: T, compute: Callable[[], T]) -> tuple[T, Mapping[str, str]]:
    """Return the computed value; for an unreadable answer, the default and the reason."""
    try:
        return compute(), {}
    except UnparsableError as unparsable:
        return default, {part: str(unparsable)}


def reason_if_zero(part: str, value: float, reason: str) -> Mapping[str, str]:
    """Return the reason under the name of the part if the value is 0."""
    return {} if value > 0 else {part: reason}


def at_least(name: str, value: float, thresholds: Sequence[float]) -> dict[str, float]:
    """Return a metric NAME@THRESHOLD for each threshold: 1 if the value is at least the threshold, else 0."""
    return {f"{name}@{threshold}": float(value >= threshold) for threshold in thresholds}
