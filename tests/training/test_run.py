"""The training loop: steps that are not finite, stop signals, checkpoints, exports and resumed runs."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcr1.checkpoint import run_store
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives
from megatron_vcr1.training import run as run_module
from megatron_vcr1.training.lifecycle import EXIT_STOPPED_BY_SIGNAL
from megatron_vcr1.training.optimizer import Learner, Update
from megatron_vcr1.training.sft import SftTrainer
from megatron_vcr1.training.train import train
from megatron_vcr1.training.trainer import StepResult, TrainingStopped
from tests.training import workspace

TIMED = ("time/", "tokens_per_s", "tflops_per_s", "memory/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("run"), num_videos=6)


def _config(folder: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    run = {"stage": "sft", "run_dir": run_dir, "num_steps": 4, "prompts_per_step": 2}
    return workspace.config(folder, "sft", **{**sections, "train": {**run, **sections.get("train", {})}})


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    rows = workspace.metrics(run_dir)
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def test_run_stops_after_too_many_steps_that_are_not_finite_and_names_their_samples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update
    calls: list[int] = []

    def sometimes_not_finite(self: Learner, *args: Any) -> Update:
        calls.append(len(calls))
        return update(self, *args) if len(calls) in (1, 3) else Update(float("nan"), float("inf"), False, [])

    monkeypatch.setattr(Learner, "update", sometimes_not_finite)
    # As if two ranks shared a replica: both report the same samples.
    monkeypatch.setattr(collectives, "gather_objects", lambda mine: [mine, mine])
    config = _config(folder, tmp_path / "run", train={"num_steps": 9, "max_skipped_steps": 1})
    with pytest.raises(TrainingStopped, match=r"2 steps in a row .* samples are train_0\d+, train_0\d+\. Lower"):
        train(config)
    rows = _curve(tmp_path / "run")
    assert [row["update_skipped"] for row in rows] == [0, 1, 0, 1, 1]  # an applied step resets the count
    assert rows[1]["loss"] is None and rows[1]["grad_norm"] is None


def test_due_save_waits_for_a_step_that_is_finite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update
    calls: list[int] = []

    def not_finite_at_two(self: Learner, *args: Any) -> Update:
        calls.append(len(calls))
        return Update(float("nan"), float("nan"), False, []) if len(calls) == 2 else update(self, *args)

    monkeypatch.setattr(Learner, "update", not_finite_at_two)
    checkpoint = {"every_steps": 2, "keep_last": 9, "export": "never"}
    assert train(_config(folder, tmp_path, train={"num_steps": 6}, checkpoint=checkpoint)) == 0
    assert saved_steps(tmp_path / "checkpoints") == [3, 4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_saves_and_the_next_start_resumes_bitwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = _config(folder, tmp_path / "run")
    assert train(_config(folder, tmp_path / "alone")) == 0
    step = SftTrainer.step

    def signalled(self: SftTrainer, step_number: int, metrics: Any) -> StepResult:
        if step_number == 2:
            os.kill(os.getpid(), number)
        return step(self, step_number, metrics)

    monkeypatch.setattr(SftTrainer, "step", signalled)
    before = signal.getsignal(number)
    assert train(config) == EXIT_STOPPED_BY_SIGNAL
    assert signal.getsignal(number) is before
    assert [row["step"] for row in _curve(tmp_path / "run")] == [1, 2]
    monkeypatch.undo()
    assert train(config) == 0
    assert _curve(tmp_path / "run") == _curve(tmp_path / "alone")
    assert train(config) == 0  # nothing is left to do
    assert _curve(tmp_path / "run") == _curve(tmp_path / "alone")


def test_checkpoints_are_kept_and_exported_as_set(folder: Path, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 1, "keep_last": 1, "keep_every": 3, "export": "always"}
    assert train(_config(folder, tmp_path / "run", checkpoint=checkpoint)) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == ["step_3", "step_4"]
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == [f"step_{n}" for n in (1, 2, 3, 4)]


def test_failed_asynchronous_save_stops_the_run_after_the_next_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "write_rank_file", mock.Mock(side_effect=OSError(errno.ENOSPC, "no space left")))
    step = SftTrainer.step

    def step_after_the_writer_ended(self: SftTrainer, *args: Any) -> StepResult:
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint of step"):
                thread.join()
        return step(self, *args)

    monkeypatch.setattr(SftTrainer, "step", step_after_the_writer_ended)
    with pytest.raises(UserError, match="disk full while step 2 was saved"):
        train(_config(folder, tmp_path, train={"num_steps": 6}, checkpoint={"every_steps": 2, "export": "never"}))
    assert len(_curve(tmp_path)) == 3


@pytest.mark.parametrize(("first", "second"), [("sft", "grpo"), ("grpo", "sft")])
def test_run_of_the_other_stage_is_not_resumed(folder: Path, tmp_path: Path, first: str, second: str) -> None:
    grpo = {"group_size": 2}
    assert train(_config(folder, tmp_path, train={"num_steps": 1, "stage": first}, grpo=grpo)) == 0
    with pytest.raises(UserError, match=f"holds a run with train.stage = '{first}', not '{second}'; choose another"):
        train(_config(folder, tmp_path, train={"num_steps": 2, "stage": second}, grpo=grpo))


def _export_time_ns(run_dir: Path) -> int:
    return (run_dir / "export" / "model.safetensors").stat().st_mtime_ns


def test_finished_run_does_nothing_and_a_higher_num_steps_continues_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    config = _config(folder, run_dir, train={"num_steps": 2}, checkpoint={"export": "end"})
    assert train(config) == 0
    exported_ns, curve = _export_time_ns(run_dir), _curve(run_dir)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert train(config) == 0
    assert "finished: step 2 was the last one" in caplog.text and "exported" not in caplog.text
    assert _export_time_ns(run_dir) == exported_ns and _curve(run_dir) == curve
    longer = _config(folder, run_dir, train={"num_steps": 4}, checkpoint={"export": "end"})
    assert train(longer) == 0  # the constant schedule makes both runs equal
    assert train(_config(folder, tmp_path / "alone")) == 0
    assert _curve(run_dir) == _curve(tmp_path / "alone")
    assert _export_time_ns(run_dir) > exported_ns
    shutil.rmtree(run_dir / "export")
    assert train(longer) == 0
    assert (run_dir / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(("when", "directory"), [("end", "export"), ("always", "export/step_2")])
def test_missing_export_is_written_by_the_next_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, directory: str
) -> None:
    """Also if the directory holds the export of an earlier last step."""
    run_dir = tmp_path / "run"
    assert train(_config(folder, run_dir, train={"num_steps": 1}, checkpoint={"export": when})) == 0
    config = _config(folder, run_dir, train={"num_steps": 2}, checkpoint={"export": when})
    monkeypatch.setattr(run_module, "export_checkpoint", mock.Mock(side_effect=OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        train(config)
    monkeypatch.undo()
    assert not (run_dir / directory).exists()
    assert train(config) == 0
    assert [row["step"] for row in _curve(run_dir)] == [1, 2]
    exported = load_file(run_dir / directory / "model.safetensors")
    export_checkpoint(run_dir / "checkpoints" / "step_2", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in exported.items())
