"""The whole demo, from videos to result tables, with only a few steps of each job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo.__main__ import build_parser
from demo.results import COLUMNS, ROWS

from tests.examples.demo.conftest import RunDemo

pytestmark = pytest.mark.xdist_group("demo")


def test_every_model_is_trained_and_tested(out: Path) -> None:
    results = json.loads((out / "report.json").read_text())
    assert set(results["metrics"]) == set(ROWS)
    assert all(set(cells) == set(COLUMNS) for cells in results["metrics"].values())
    values = [value for cells in results["metrics"].values() for seeds in cells.values() for value in seeds]
    assert all(0 <= value <= 100 for value in values)
    for name in ("base-3", "grpo_joint-3", "sft_small-0"):
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert sum("loss" in row for row in rows) == 2, name  # the other rows are of validations
    assert (out / "report.html").stat().st_size > 10_000


def test_a_second_call_runs_no_jobs(out: Path, run_demo: RunDemo) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "done").iterdir()}
    again = run_demo("--quick", "--seeds", "3", "--out", str(out))
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "done").iterdir()} == before


def test_results_of_another_demo_are_not_mixed_in(out: Path, run_demo: RunDemo) -> None:
    other = run_demo("--seeds", "3", "--out", str(out))
    assert other.returncode == 2
    assert f"{out} holds results of another demo" in other.stderr


@pytest.mark.parametrize("arguments", [("--workers", "-1"), ("--workers", "0"), ("--seeds", "-1"), ("--seeds", "")])
def test_invalid_numbers_are_rejected(arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(arguments)
