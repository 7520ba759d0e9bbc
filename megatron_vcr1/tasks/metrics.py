"""Shared parts of the tasks' metrics: pure functions, like the rewards.

Where the paper and the authors of a dataset define a metric differently, both are computed under different names. All
metrics are in [0, 1] and higher is better. An unreadable answer scores 0, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_vcr1.rewards.answer_parsing import read_answer, read_choice
from megatron_vcr1.rewards.choices import parse_choice
from megatron_vcr1.rewards.lenient import lenient_answer, leniently
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.types import Sample

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SampleMetrics:
    """The metrics of one output.

    Attributes:
        values: value by metric name; empty if a judge could not judge the output.
        reasons: for each part of the answer that scored 0 (iou, accuracy, recall), the reason.
        is_lenient: whether the strict reading of the output reads less than the lenient one.
    """

    values: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    is_lenient: bool = False


def with_lenient(strict: SampleMetrics, lenient: SampleMetrics | None) -> SampleMetrics:
    """Put the metrics of the lenient reading after the strict ones, as "NAME (lenient)"."""
    if lenient is None:
        return strict
    is_lenient = lenient.reasons != strict.reasons or not lenient.values.items() <= strict.values.items()
    columns = {f"{name} (lenient)": value for name, value in lenient.values.items()}
    return SampleMetrics({**strict.values, **columns}, strict.reasons, is_lenient)


def choice_accuracy(read: Callable[[], str], choice: str) -> tuple[float, Mapping[str, str]]:
    """Return the accuracy of the choice that `read` returns, and the reason if it is 0."""
    accuracy, reasons = value_or_default("accuracy", 0.0, lambda: float(read() == choice))
    return accuracy, reasons or reason_if_zero("accuracy", accuracy, "wrong option")


def lenient_choice(sample: Sample, output: str) -> str:
    """Return the chosen option of an output, whose answer may be marked in an unusual way."""
    return leniently(
        lambda: read_choice(output, sample.options), lambda: parse_choice(lenient_answer(output), sample.options)
    )


def with_tagged_answer(output: str) -> str:
    """Return an output that the strict parsing reads: the output itself, or the leniently read answer in its tags.

    If neither reading finds an answer, it is the output itself.
    """
    try:
        read_answer(output)
        return output  # not in tags of our own: it may hold a stray "</answer>", which would close them
    except UnparsableError:
        pass
    try:
        return f"<answer>{lenient_answer(output)}</answer>"
    except UnparsableError:
        return output


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
