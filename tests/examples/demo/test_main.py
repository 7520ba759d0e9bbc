"""The demo from videos to tables, with a few steps of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo.__main__ import MEASURED, build_parser
from demo.plan import ROOT
from demo.results import COLUMNS, PROMISES, ROWS, Promise, findings, verdict


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT / "tools"), str(ROOT / "examples")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-W", "ignore", "-m", "demo", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has run once."""
    out = tmp_path_factory.mktemp("demo") / "out"
    first = _demo("--quick", "--seeds", "3", "--workers", "2", "--out", str(out))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "GRPO joint" in first.stdout
    return out


def test_every_model_is_trained_and_tested(out: Path) -> None:
    results = json.loads((out / "report.json").read_text())
    assert set(results["figures"]) == set(ROWS)
    assert all(set(cells) == set(COLUMNS) for cells in results["figures"].values())
    assert all(
        0 <= value <= 100 for cells in results["figures"].values() for seeds in cells.values() for value in seeds
    )
    for name in ("base-3", "grpo_joint-3", "sft_small-0"):
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 2
    assert (out / "report.html").stat().st_size > 10_000


def test_transformers_gives_the_answers_that_were_measured(out: Path) -> None:
    (verified,) = json.loads((out / "report.json").read_text())["export_in_transformers"]
    assert verified["num_answers"] == verified["num_equal"] > 0


def test_a_second_call_has_nothing_left_to_do(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "done").iterdir()}
    again = _demo("--quick", "--seeds", "3", "--out", str(out))
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "done").iterdir()} == before


def test_results_of_another_recipe_are_no_results(out: Path) -> None:
    whole = _demo("--seeds", "3", "--out", str(out))
    assert whole.returncode == 2
    assert f"{out} holds results of another demo" in whole.stderr


def test_the_model_answers_about_any_clip(out: Path) -> None:
    clip = next((out / "data" / "videos").rglob("*.mp4"))
    answered = _demo("--seeds", "3", "--out", str(out), "--real", str(clip), "--ask", "purple dog")
    assert answered.returncode == 0, answered.stderr
    assert "not among the few that it knows" in answered.stdout
    assert "prompt tokens" in answered.stdout
    assert (out / "real.png").exists()


@pytest.mark.parametrize("arguments", [("--workers", "-1"), ("--workers", "0"), ("--seeds", "-1"), ("--seeds", "")])
def test_numbers_that_no_demo_has(arguments: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(arguments)


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    missing = _demo("--out", str(tmp_path), "--real", "clip.mp4")
    assert missing.returncode == 2
    assert "run `bash tools/demo.sh` first" in missing.stderr


def test_a_promise_has_two_sides() -> None:
    assert Promise("low", "base", "row", most=20).is_kept(20.0)
    assert not Promise("high", "base", "row", least=45).is_kept(44.9)
    assert {promise.column for promise in PROMISES} <= set(COLUMNS)
    assert {promise.row for promise in PROMISES} <= set(ROWS)


def test_what_is_not_seen_is_said() -> None:
    assert [verdict(differences) for differences in ([1.0, 2.0], [1.0, -1.0], [0.0, -1.0])] == [
        "seen",
        "seen in part",
        "NOT seen",
    ]
    measured = json.loads(MEASURED.read_text())
    figures, small = measured["figures"], measured["small_labels"]["figures"]
    ahead = {row: cells | {"grpo_grounding": [99.0], "grpo_joint": [100.0]} for row, cells in figures.items()}
    sentences = findings(ahead, small)
    assert any(sentence.startswith("seen: GRPO on three tasks grounds better") for sentence in sentences)
    ahead = {row: cells | {"grpo_joint": [0.0]} for row, cells in ahead.items()}
    assert any(sentence.startswith("NOT seen: GRPO on three tasks grounds") for sentence in findings(ahead, small))
    assert any(sentence.startswith("NOT reached: GRPO on three tasks tracks") for sentence in findings(ahead, small))
