"""The loop around a trainer: steps that are not finite, signals, checkpoints, what is on record."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcr1.checkpoint import run_store
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives
from megatron_vcr1.training import run as loop
from megatron_vcr1.training import train as train_module
from megatron_vcr1.training.optimizer import Learner, Update
from megatron_vcr1.training.run import EXIT_STOPPED_BY_SIGNAL
from megatron_vcr1.training.sft import SftTrainer
from megatron_vcr1.training.train import train
from megatron_vcr1.training.trainer import StepResult, TrainingStopped
from tests.training import workspace

TIMED = ("time/", "tokens_per_s", "tflops_per_s", "memory/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("loop"), num_videos=6)


def _config(folder: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    run = {"stage": "sft", "run_dir": run_dir, "num_steps": 4, "prompts_per_step": 2}
    return workspace.config(folder, "sft", **{**sections, "train": {**run, **sections.get("train", {})}})


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    rows = workspace.metrics(run_dir)
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def test_a_run_stops_after_too_many_steps_that_are_not_finite_and_names_their_samples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update
    calls: list[int] = []

    def sometimes_not_finite(self: Learner, *args: Any) -> Update:
        calls.append(len(calls))
        return update(self, *args) if len(calls) in (1, 3) else Update(float("nan"), float("inf"), False, [])

    monkeypatch.setattr(Learner, "update", sometimes_not_finite)
    # As where ranks share a copy of the model, and have the same samples.
    monkeypatch.setattr(collectives, "gather_objects", lambda mine: [mine, mine])
    config = _config(folder, tmp_path / "run", train={"num_steps": 9, "max_skipped_steps": 1})
    with pytest.raises(TrainingStopped, match=r"2 steps in a row .* samples are train_0\d+, train_0\d+\. Lower"):
        train(config)
    rows = _curve(tmp_path / "run")
    assert [row["update_skipped"] for row in rows] == [0, 1, 0, 1, 1]  # one that is applied starts the count anew
    assert rows[1]["loss"] is None and rows[1]["grad_norm"] is None


def test_weights_of_a_step_that_is_not_finite_are_not_saved_before_one_that_is(
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
    assert run_store.saved_steps(tmp_path / "checkpoints") == [3, 4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_behind_a_checkpoint_and_the_next_start_goes_on(
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
    assert train(config) == 0  # there is nothing left to do
    assert _curve(tmp_path / "run") == _curve(tmp_path / "alone")


def test_weights_and_biases_is_told_of_a_run_that_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    fake = ModuleType("wandb")
    run = SimpleNamespace(log=lambda row, step: None, finish=lambda exit_code: codes.append(exit_code))
    fake.init = lambda **settings: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = _config(folder, tmp_path / "run", train={"num_steps": 1}, logging={"wandb_project": "p"})
    assert train(config) == 0
    monkeypatch.setattr(SftTrainer, "step", mock.Mock(side_effect=TrainingStopped("no more")))
    with pytest.raises(TrainingStopped):
        train(_config(folder, tmp_path / "other", train={"num_steps": 1}, logging={"wandb_project": "p"}))
    assert codes == [0, 1]


def test_what_was_opened_is_closed_when_the_rest_cannot_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(UserError, match="pip install wandb"):
        train(_config(folder, tmp_path / "run", logging={"wandb_project": "p"}))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_videos_that_were_made_smaller_are_counted(folder: Path, tmp_path: Path) -> None:
    data = {"total_pixels": 64 * 28 * 28, "max_prompt_tokens": 60}
    assert train(_config(folder, tmp_path / "run", data=data, train={"num_steps": 1})) == 0
    assert [row["downscaled_videos"] for row in _curve(tmp_path / "run")] == [2]
    data["max_prompt_tokens"] = 4096
    assert train(_config(folder, tmp_path / "other", data=data, train={"num_steps": 1})) == 0
    assert [row["downscaled_videos"] for row in _curve(tmp_path / "other")] == [0]


def test_videos_that_cannot_be_read_are_listed(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(folder / "data" / row["video"])
    rows[0]["video"] = "nowhere.mp4"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        **workspace.config(folder, "sft").data.model_dump(),
        "sources": [{"manifest": tmp_path / "train.jsonl", "thinking": False}],
    }
    config = _config(folder, tmp_path / "run", data=data, train={"num_steps": None, "num_epochs": 2})
    assert train(config) == 0
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["id"] for row in skipped} == {rows[0]["id"]} and "nowhere.mp4" in skipped[0]["reason"]
    curve = _curve(tmp_path / "run")
    assert len(curve) == -(-2 * len(rows) // 2)
    assert sum(row["skipped_samples"] for row in curve) == len(skipped) >= 2


def test_thinking_that_is_asked_for_must_be_there_to_learn(folder: Path, tmp_path: Path) -> None:
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": True}
    data = {**workspace.config(folder, "sft").data.model_dump(), "sources": [source]}
    with pytest.raises(UserError, match=r"6 of 6 samples have no 'thinking'.*set thinking = false"):
        train(_config(folder, tmp_path / "run", data=data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"warmup_steps": 4}}, "warmup_steps = 4 must be below the run's 4 steps"),
        ({"model": {"path": "nowhere"}}, "nowhere"),
        (
            {"train": {"stage": "grpo"}, "grpo": {"num_minibatches": 4}},
            "2 does not divide into grpo.num_minibatches = 4",
        ),
        (
            {"train": {"stage": "grpo"}, "grpo": {"overlong_buffer_tokens": 9}},
            r"overlong_buffer_tokens = 9 .*max_new_tokens = 8\)",
        ),
        ({"data": {"sources": []}}, "name at least one manifest"),
        ({"data": {"sources": [{"manifest": "nowhere.jsonl"}]}}, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_the_users_to_correct_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(train_module, "build_model", lambda *_: pytest.fail("a large one takes minutes to load"))
    with pytest.raises(UserError, match=message):
        train(_config(folder, tmp_path / "run", **settings))


def test_ranks_that_are_not_there_have_no_profile(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile\.ranks = 0, 1: the job has ranks 0 to 0"):
        train(_config(folder, tmp_path, profile={"enabled": True, "ranks": [0, 1]}))


def test_an_engine_that_does_not_agree_sets_off_an_alarm(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"stage": "grpo", "num_steps": 1}
    for alarm, warned in ((1e-12, True), (0.1, False)):
        caplog.clear()
        logs = {"tensorboard": False, "mismatch_threshold": alarm}
        train(_config(folder, tmp_path / str(alarm), train=keys, logging=logs, grpo={"group_size": 2}))
        assert ("log-probs of rollout and training differ by" in caplog.text) == warned


def test_checkpoints_are_kept_and_exported_as_asked(folder: Path, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 1, "keep_last": 1, "keep_every": 3, "export": "always"}
    assert train(_config(folder, tmp_path / "run", checkpoint=checkpoint)) == 0
    assert sorted(one.name for one in (tmp_path / "run" / "checkpoints").glob("step_*")) == ["step_3", "step_4"]
    assert sorted(one.name for one in (tmp_path / "run" / "export").iterdir()) == [f"step_{n}" for n in (1, 2, 3, 4)]


def test_a_checkpoint_that_fails_while_training_goes_on_stops_it_soon(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "_write_share", mock.Mock(side_effect=OSError(errno.ENOSPC, "no space left")))
    step = SftTrainer.step

    def when_the_writer_is_done(self: SftTrainer, *args: Any) -> StepResult:
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint of step"):
                thread.join()
        return step(self, *args)

    monkeypatch.setattr(SftTrainer, "step", when_the_writer_is_done)
    with pytest.raises(UserError, match="disk full while step 2 was saved"):
        train(_config(folder, tmp_path, train={"num_steps": 6}, checkpoint={"every_steps": 2, "export": "never"}))
    assert len(_curve(tmp_path)) == 3


@pytest.mark.parametrize(("first", "second"), [("sft", "grpo"), ("grpo", "sft")])
def test_a_folder_with_a_run_of_the_other_stage_is_not_gone_on_with(
    folder: Path, tmp_path: Path, first: str, second: str
) -> None:
    grpo = {"group_size": 2}
    assert train(_config(folder, tmp_path, train={"num_steps": 1, "stage": first}, grpo=grpo)) == 0
    with pytest.raises(UserError, match=f"holds a run with train.stage = '{first}', not '{second}'; choose another"):
        train(_config(folder, tmp_path, train={"num_steps": 2, "stage": second}, grpo=grpo))


def _export_time_ns(run_dir: Path) -> int:
    return (run_dir / "export" / "model.safetensors").stat().st_mtime_ns


def test_a_finished_run_says_so_and_leaves_its_export_alone(
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
    assert train(longer) == 0  # the schedule is constant: the steps are those of a run that was longer from the start
    assert train(_config(folder, tmp_path / "alone")) == 0
    assert _curve(run_dir) == _curve(tmp_path / "alone")
    assert _export_time_ns(run_dir) > exported_ns
    shutil.rmtree(run_dir / "export")
    assert train(longer) == 0
    assert (run_dir / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(("when", "directory"), [("end", "export"), ("always", "export/step_2")])
def test_what_was_not_exported_before_the_end_came_is_exported_by_the_next_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, directory: str
) -> None:
    """Also where an export of an earlier end is there."""
    run_dir = tmp_path / "run"
    assert train(_config(folder, run_dir, train={"num_steps": 1}, checkpoint={"export": when})) == 0
    config = _config(folder, run_dir, train={"num_steps": 2}, checkpoint={"export": when})
    monkeypatch.setattr(loop, "export_checkpoint", mock.Mock(side_effect=OSError("killed here")))
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


def test_a_folder_that_is_taken_is_told_before_anything_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "build", lambda config: pytest.fail("servers take minutes to start"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.run_dir = .*file/run: cannot be written to"):
        train(_config(folder, tmp_path / "file" / "run"))
    monkeypatch.setattr(run_store, "LOCK_PATIENCE_S", 0.0)
    monkeypatch.setattr(run_store.RunStore, "_lock_is_ours", lambda self: False)
    with pytest.raises(UserError, match="another process is training here"):
        train(_config(folder, tmp_path / "run"))
