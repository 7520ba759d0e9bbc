from __future__ import annotations

import pytest

from megatron_vcr1.data.rows import row_from_sample, sample_from_row
from megatron_vcr1.rewards import score
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.tasks.numeric import (
    TASK,
    NumberMetric,
    NumberTarget,
    accuracy,
    mean_relative_accuracy,
    numbers_in,
)
from megatron_vcr1.tasks.row_fields import RowError
from tests.rewards.samples import parts_of, sample

ROW = {"id": "a", "task": "numeric", "video": "a.mp4", "duration_s": None, "query": "how many?"}


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("4", [4]),
        ("There are 4.", [4]),
        ("-3.5 m", [-3.5]),
        ("$1,200,000.50", [1_200_000.5]),
        ("1.5e3", [1500]),
        ("75%", [75]),
        ("3 or 4", [3, 4]),
        ("3-4", [3, 4]),
        ("room B2 has .5", [0.5]),
        ("\u22125", [-5]),  # the minus sign
        ("－４.５。", [-4.5]),  # noqa: RUF001
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, numbers: list[float]) -> None:
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    "text, reason",
    [
        ("four", "no number"),
        ("B2", "no number"),
        ("٣", "no number"),
        ("1,2", "malformed number"),
        ("1.2.3", "malformed number"),
        ("1234,567", "malformed number"),
        ("1e999", "number is not finite"),
    ],
)
def test_what_is_no_number_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=reason):
        numbers_in(text)


@pytest.mark.parametrize(
    "target, right, wrong",
    [
        (NumberTarget(4), 4, 4.1),
        (NumberTarget(4, NumberMetric.EXACT, 0.5), 4.5, 4.51),
        (NumberTarget(-200, NumberMetric.RELATIVE), -210, -210.1),
        (NumberTarget(200, NumberMetric.RELATIVE, 0.25), 150, 149),
        (NumberTarget(0, NumberMetric.RELATIVE), 0, 1e-9),
    ],
)
def test_tolerances(target: NumberTarget, right: float, wrong: float) -> None:
    assert (accuracy(right, target), accuracy(wrong, target)) == (1, 0)


@pytest.mark.parametrize(
    "answered, expected", [(100, 1), (96, 1), (95, 0.9), (104, 1), (80, 0.6), (51, 0.1), (150, 0), (0, 0), (-100, 0)]
)
def test_mean_relative_accuracy_counts_the_thresholds(answered: float, expected: float) -> None:
    """For 80, the relative error 0.2 is below 1 - t for t = 0.5, 0.55, ... 0.75: six of ten thresholds."""
    assert mean_relative_accuracy(answered, 100) == pytest.approx(expected)
    assert mean_relative_accuracy(-answered, -100) == pytest.approx(expected)


def test_mean_relative_accuracy_of_zero() -> None:
    assert (mean_relative_accuracy(0, 0), mean_relative_accuracy(0.1, 0)) == (1, 0)


@pytest.mark.parametrize(
    "answer, accuracy, reason",
    [("12.5", 1, None), ("12 s", 1, None), ("11", 0, "wrong number"), ("12 or 13", 0, "several numbers")],
)
def test_reward_within_five_percent(answer: str, accuracy: float, reason: str | None) -> None:
    reward = score(sample("numeric"), f"<answer>{answer}</answer>", thinking=False)
    assert parts_of(reward) == {"format": 1, "accuracy": accuracy}
    assert reward.reasons.get("accuracy") == reason


def test_a_graded_reward() -> None:
    graded = sample("numeric", NumberTarget(100, NumberMetric.MEAN_RELATIVE_ACCURACY))
    assert score(graded, "<answer>80</answer>", thinking=False).total == pytest.approx(1.6)


def test_metrics_take_the_first_number_of_an_untagged_output() -> None:
    values = {"accuracy": 1, "mean relative accuracy": pytest.approx(1)}
    assert TASK.metrics(sample("numeric"), "12.5 seconds, of 24").values == values
    unreadable = TASK.metrics(sample("numeric"), "<answer>twelve</answer>")
    assert (set(unreadable.values.values()), unreadable.reasons) == ({0}, {"accuracy": "no number"})


def test_defaults_of_a_row() -> None:
    read = sample_from_row({**ROW, "target": {"value": 3}})
    assert read.target == NumberTarget(3.0, NumberMetric.EXACT, None)
    assert row_from_sample(read)["target"] == {"value": 3.0, "metric": "exact"}


@pytest.mark.parametrize(
    "target, message",
    [
        ({}, "'target.value' is missing"),
        ({"value": "3"}, "'target.value': expected a number"),
        ({"value": 3, "metric": "near"}, "'target.metric': \"near\" is not one of exact, relative, mean_relative_acc"),
        ({"value": 3, "metric": ["exact"]}, "'target.metric': .* is not one of"),
        ({"value": 3, "tolerance": -1}, "tolerance is -1.0; it must be 0 or positive"),
        ({"value": 3, "metric": "mean_relative_accuracy", "tolerance": 1}, "mean_relative_accuracy has none"),
        ({"value": float("inf")}, "it must be finite"),
    ],
)
def test_bad_targets_name_the_key(target: dict[str, object], message: str) -> None:
    with pytest.raises(RowError, match=message):
        sample_from_row({**ROW, "target": target})
