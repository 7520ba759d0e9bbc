"""Numeric answers: a number, compared with the true one exactly, within a tolerance, or by mean relative accuracy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from megatron_vcr1.rewards.answer_parsing import read_answer
from megatron_vcr1.rewards.parsing import UnparsableError, last_answer, with_ascii_forms
from megatron_vcr1.rewards.scoring import compute_part
from megatron_vcr1.tasks.base import NumberFormat, Task
from megatron_vcr1.tasks.metrics import SampleMetrics, reason_if_zero, value_or_default, with_tagged_answer
from megatron_vcr1.tasks.row_fields import NUMBER, TargetField, choice_of
from megatron_vcr1.types import RewardPart, Sample, Target

# A maximal run of digits, dots and commas; one inside of a word does not count. _PLAIN checks it afterwards.
_NUMBER = re.compile(r"(?<![\w.,])([+-]?+(?:[0-9][0-9.,]*+|\.[0-9]++)(?:[eE][+-]?+[0-9]++)?+)", re.ASCII)
_PLAIN = re.compile(r"[+-]?(?:(?:[0-9]++|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]*)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")
_MRA_ERRORS = tuple(index / 20 for index in range(1, 11))  # 0.05, 0.1, ... 0.5: 1 minus each threshold


class NumberMetric(StrEnum):
    """How an answered number is compared with the true one."""

    EXACT = "exact"
    """1 if the difference is at most `tolerance` (default 0), else 0."""
    RELATIVE = "relative"
    """1 if the difference is at most `tolerance` times the true number (default 0.05), else 0."""
    MEAN_RELATIVE_ACCURACY = "mean_relative_accuracy"
    """The fraction of the thresholds 0.5, 0.55, ... 0.95 for which the relative error is below 1 - threshold."""


_DEFAULT_TOLERANCES = {NumberMetric.EXACT: 0.0, NumberMetric.RELATIVE: 0.05}


@dataclass(frozen=True, slots=True)
class NumberTarget(Target):
    """The target of a numeric question.

    Attributes:
        value: the true number.
        metric: how answers are compared with it.
        tolerance: the largest difference that counts as right; None means the metric's default.
    """

    value: float
    metric: NumberMetric = NumberMetric.EXACT
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"the number is {self.value}; it must be finite")
        if self.tolerance is None:
            return
        if self.metric not in _DEFAULT_TOLERANCES:
            raise ValueError(f"a tolerance is given, but {self.metric} has none")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"the tolerance is {self.tolerance}; it must be 0 or positive, and finite")


class Numeric(Task[NumberTarget]):
    """Answer the query with a number; reward: format + accuracy, which is graded for mean relative accuracy."""

    name = "numeric"
    target_type = NumberTarget
    target_fields = (
        TargetField("value", NUMBER, "the true number"),
        TargetField("metric", choice_of(NumberMetric), "how answers are compared; exact by default", required=False),
        TargetField(
            "tolerance",
            NUMBER,
            "largest difference that counts as right, for `relative` as a fraction of the number; "
            "by default 0 for `exact` and 0.05 for `relative`",
            required=False,
        ),
    )
    answer_prompt = """\
$query
Reply with a number alone, written in digits, in this form:
<answer>4</answer>"""
    think_prompt = """\
$query
First reason about what you see inside <think> </think>. Then give a number alone, written in digits, in this form:
<think>your reasoning</think>
<answer>4</answer>"""

    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        value = self.target_of(sample).value
        return f"<answer>{int(value) if value.is_integer() else value}</answer>"

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        target = self.target_of(sample)
        return {
            "accuracy": compute_part(lambda: accuracy(only_number(last_answer(completion)), target), "wrong number")
        }

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        """Compute the accuracy by the sample's own metric, and for all samples the mean relative accuracy (VSI-Bench).

        If the answer contains several numbers, the first one counts, as in VSI-Bench.
        """
        target = self.target_of(sample)
        answered, reasons = value_or_default("accuracy", math.nan, lambda: numbers_in(read_answer(output))[0])
        values = {
            "accuracy": accuracy(answered, target),
            "mean relative accuracy": mean_relative_accuracy(answered, target.value),
        }
        return SampleMetrics(values, reasons or reason_if_zero("accuracy", values["accuracy"], "wrong number"))

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        return self.metrics(sample, with_tagged_answer(output))


def accuracy(answered: float, target: NumberTarget) -> float:
    """Compare an answered number with the true one by the target's metric. NaN is wrong."""
    if target.metric is NumberMetric.MEAN_RELATIVE_ACCURACY:
        return mean_relative_accuracy(answered, target.value)
    tolerance = _DEFAULT_TOLERANCES[target.metric] if target.tolerance is None else target.tolerance
    if target.metric is NumberMetric.RELATIVE:
        tolerance *= abs(target.value)
    return float(abs(answered - target.value) <= tolerance)


def mean_relative_accuracy(answered: float, value: float) -> float:
    """Compute the mean relative accuracy of VSI-Bench (its equation 1). For a true number of 0, only 0 is right.

    The published script differs: it has 11 thresholds from 0.5 to 0.95, and an error equal to a limit counts as right.
    """
    if answered == value:
        return 1.0
    if value == 0:
        return 0.0
    error = abs(answered - value) / abs(value)
    return sum(error < limit for limit in _MRA_ERRORS) / len(_MRA_ERRORS)


def numbers_in(answer: str) -> list[float]:
    """Return all numbers in a text, at least one. They may have a sign, commas between thousands, and an exponent.

    Digits and signs may be those of ASCII or full-width ones, and the minus sign may be U+2212.

    Raises:
        UnparsableError: there is none, or one is malformed or not finite.
    """
    numbers = []
    for found in _NUMBER.findall(with_ascii_forms(answer)):
        digits = found.rstrip(".,")  # the end of a sentence
        if not _PLAIN.fullmatch(digits):
            raise UnparsableError("malformed number")
        number = float(digits.replace(",", ""))
        if not math.isfinite(number):
            raise UnparsableError("number is not finite")
        numbers.append(number)
    if not numbers:
        raise UnparsableError("no number")
    return numbers


def only_number(answer: str) -> float:
    """Return the only number in a text: several numbers would let a policy name more than one answer.

    Raises:
        UnparsableError: there is none or more than one, or it is malformed or not finite.
    """
    numbers = numbers_in(answer)
    if len(numbers) > 1:
        raise UnparsableError("several numbers")
    return numbers[0]


TASK = Numeric()
