from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from tests.report.runs import report_run


def test_the_page_and_its_numbers_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = report_run(tmp_path / "run", {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}).path
    assert main(["report", str(run), "--json", str(tmp_path / "numbers.json")]) == 0
    printed = capsys.readouterr()
    assert f"{run / 'report.html'}: 0.0 MB, 0 samples" in printed.out
    assert "note: nothing was evaluated on held-out samples" in printed.err
    assert json.loads((tmp_path / "numbers.json").read_text())["runs"][0]["key_metrics"]["Steps"] == "2"


def test_several_runs_need_a_file_for_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "name one with --out FILE" in capsys.readouterr().err


def test_a_negative_number_of_samples_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", "run", "--max-samples", "-1"])
    assert stopped.value.code == 2
    assert "-1 is below 0" in capsys.readouterr().err
