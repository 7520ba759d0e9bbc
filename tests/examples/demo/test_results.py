"""The demo's expected results, and its findings about the models."""

from __future__ import annotations

import json

from demo.__main__ import MEASURED
from demo.results import COLUMNS, EXPECTATIONS, ROWS, SMALL_COLUMNS, Expectation, findings, print_results, verdict
from rich.console import Console


def test_an_expectation_is_an_upper_or_a_lower_bound() -> None:
    assert Expectation("low", "base", "row", at_most=20).is_met(20.0)
    assert not Expectation("high", "base", "row", at_least=45).is_met(44.9)
    assert {expectation.column for expectation in EXPECTATIONS} <= set(COLUMNS)
    assert {expectation.row for expectation in EXPECTATIONS} <= set(ROWS)


def test_findings_that_are_not_reproduced_are_reported() -> None:
    verdicts = [verdict(differences) for differences in ([1.0, 2.0], [1.0, -1.0], [0.0, -1.0])]
    assert verdicts == ["reproduced", "partly reproduced", "NOT reproduced"]
    measured = json.loads(MEASURED.read_text())
    metrics, small = measured["metrics"], measured["small_labels"]["metrics"]
    better = {row: cells | {"grpo_grounding": [99.0], "grpo_joint": [100.0]} for row, cells in metrics.items()}
    claim = "GRPO on three tasks grounds better"
    assert any(sentence.startswith(f"reproduced: {claim}") for sentence in findings(better, small))
    worse = {row: cells | {"grpo_joint": [0.0]} for row, cells in better.items()}
    assert any(sentence.startswith(f"NOT reproduced: {claim}") for sentence in findings(worse, small))
    assert any(sentence.startswith("NOT met: GRPO on three tasks tracks") for sentence in findings(worse, small))


def test_the_measured_results_are_complete_and_can_be_printed() -> None:
    measured = json.loads(MEASURED.read_text())
    assert set(measured["metrics"]) == set(ROWS)
    assert measured["findings"] == findings(measured["metrics"], measured["small_labels"]["metrics"])
    console = Console(width=120)
    with console.capture() as capture:
        print_results(measured, console)
    text = capture.get()
    assert all(name.split()[0] in text for name in (*COLUMNS.values(), *SMALL_COLUMNS.values()))
    assert "NOT met" not in text
    assert " 53.0 (54 52) " in text  # no cell is wrapped
