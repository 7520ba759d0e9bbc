from __future__ import annotations

import json
import os

import numpy as np
import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.report.run_record import read_json_lines, read_run, read_runs


def test_metrics_become_columns_and_values_that_are_not_finite_are_missing(tmp_path):
    rows = ['{"step": 1, "loss": 0.5, "kl": null}', '{"step": 2, "loss": NaN, "kl": 0.1, "note": "text"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    metrics = read_run(tmp_path).metrics
    assert metrics.steps.tolist() == [1, 2] and set(metrics.columns) == {"loss", "kl"}
    np.testing.assert_array_equal(metrics.columns["loss"], [0.5, np.nan])
    np.testing.assert_array_equal(metrics.columns["kl"], [np.nan, 0.1])


def test_incomplete_lines_and_repeated_steps_are_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\nnonsense\n{"step": 2, "loss": 3}\n{"step": 3, "lo'
    )
    run = read_run(tmp_path)
    assert run.metrics.columns["loss"].tolist() == [1, 3]
    assert len(run.problems) == 3
    reported = " ".join(run.problems)
    assert (
        "last line is incomplete" in reported
        and "1 lines are not JSON objects" in reported
        and "1 steps were repeated" in reported
    )


def test_every_other_file_may_be_damaged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "config.toml").write_text("[train\n")
    (tmp_path / "starts.jsonl").write_bytes(b"\xff\xfe\n")
    (tmp_path / "skipped.jsonl").write_text('{"step": 1, "id": "a", "reason": "crashed"}\n{"step"')
    for label, text in {
        "cut": '{"metrics": {"mIoU": {"val',
        "empty": "{}",
        "list": "[]",
        "odd": '{"metrics": [1]}',
    }.items():
        (tmp_path / "evaluation" / label).mkdir(parents=True)
        (tmp_path / "evaluation" / label / "metrics.json").write_text(text)
    run = read_run(tmp_path)
    assert run.config == {} and run.starts == run.evaluations == () and run.skipped == {"a": "crashed"}
    reported = "\n".join(run.problems)
    for name in (
        "config.toml",
        "starts.jsonl",
        "skipped.jsonl",
        *(f"{label}/" for label in ("cut", "empty", "list", "odd")),
    ):
        assert name in reported


def test_an_evaluation_without_intervals_is_read(tmp_path):
    folder = tmp_path / "evaluation" / "test"
    folder.mkdir(parents=True)
    metrics = {"mIoU": {"value": 0.5, "low": None, "high": None}, "bad": {"value": "x"}}
    (folder / "metrics.json").write_text(json.dumps({"benchmark": "charades_sta", "metrics": metrics}))
    (result,) = read_run(tmp_path).evaluations
    assert (result.label, result.benchmark, result.thinking) == ("test", "charades_sta", None)
    assert list(result.metrics) == ["mIoU"] and result.metrics["mIoU"].low is None


def test_rollout_files_are_in_order_of_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "rollouts").mkdir()
    for name in ("step_10.jsonl", "step_9.jsonl", "step_x.jsonl", "step_11.part"):
        (tmp_path / "rollouts" / name).touch()
    assert list(read_run(tmp_path).rollout_files) == [9, 10]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(UserError, match="neither metrics"):
        read_run(tmp_path)


def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path):
    paths = [tmp_path / parent / "latest" for parent in "ab"]
    for path in paths:
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
    with pytest.raises(UserError, match="given twice"):
        read_runs([paths[0], paths[0] / ".." / "latest"])


def test_a_missing_file_has_no_lines(tmp_path):
    problems: list[str] = []
    assert list(read_json_lines(tmp_path / "absent.jsonl", problems)) == [] and not problems


def test_hostile_lines_and_files_are_counted_and_the_rest_is_shown(tmp_path):
    lines = [
        '{"step": 1, "loss": 1}',
        "[" * 100_000,
        "9" * 5_000,
        '{"step": 1e400}',
        '{"step": 2, "loss": 2, "big": 1%s}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines).replace("%s", "0" * 400) + "\n")
    (tmp_path / "config.toml").write_text("a = " + "[" * 100_000)
    os.mkfifo(tmp_path / "skipped.jsonl")
    for label, text in {
        "deep": "[" * 100_000,
        "long": "9" * 5_000,
        "count": '{"num_samples": [], "metrics": {"m": {"value": 1}}}',
    }.items():
        (tmp_path / "evaluation" / label).mkdir(parents=True)
        (tmp_path / "evaluation" / label / "metrics.json").write_text(text)
    run = read_run(tmp_path)
    assert run.metrics.steps.tolist() == [1, 2] and set(run.metrics.columns) == {"loss"}
    assert [result.num_samples for result in run.evaluations] == [0]
    reported = "\n".join(run.problems)
    assert "metrics.jsonl: 2 lines are not JSON objects and are left out (the first is line 2)" in reported
    for name in ("config.toml", "skipped.jsonl", "evaluation/deep/metrics.json", "evaluation/long/metrics.json"):
        assert name in reported


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('\ufeff{"step": 1}\n', encoding="utf-8")
    (tmp_path / "config.toml").write_text("\ufeff[train]\nseed = 3\n", encoding="utf-8")
    assert read_run(tmp_path).setting("train", "seed") == 3


def test_a_missing_module_of_a_task_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "config.toml").write_text('[data]\ntasks = ["absent_task"]\n')
    assert "there is no module absent_task" in " ".join(read_run(tmp_path).problems)
