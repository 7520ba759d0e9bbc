"""Building and opening a run: mistakes are found before the model is loaded, and everything is closed afterwards."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_vcr1.checkpoint import run_lock
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.config.training_sections import TrainSection
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.training import train as train_module
from megatron_vcr1.training.inputs import steps_of_epochs
from megatron_vcr1.training.lifecycle import STOP_SIGNALS
from megatron_vcr1.training.sft import SftTrainer
from megatron_vcr1.training.train import train
from megatron_vcr1.training.trainer import TrainingStopped
from tests.training import workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("train"), num_videos=6)


def _config(folder: Path, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    run = {"stage": "sft", "run_dir": run_dir, "num_steps": 4, "prompts_per_step": 2}
    return workspace.config(folder, "sft", **{**sections, "train": {**run, **sections.get("train", {})}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"warmup_steps": 4}}, "warmup_steps = 4 must be less than the run's 4 steps"),
        ({"model": {"path": "nowhere"}}, "nowhere"),
        (
            {"train": {"stage": "grpo"}, "grpo": {"num_minibatches": 4}},
            "2 is not a multiple of grpo.num_minibatches = 4",
        ),
        (
            {"train": {"stage": "grpo"}, "grpo": {"overlong_buffer_tokens": 9}},
            r"overlong_buffer_tokens = 9 .*max_new_tokens = 8",
        ),
        ({"data": {"sources": []}}, "name at least one manifest"),
        ({"data": {"sources": [{"manifest": "nowhere.jsonl"}]}}, "nowhere.jsonl"),
    ],
)
def test_mistakes_in_the_settings_are_found_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(train_module, "build_model", lambda *_: pytest.fail("loading a large model takes minutes"))
    with pytest.raises(UserError, match=message):
        train(_config(folder, tmp_path / "run", **settings))


def test_missing_user_reward_is_found_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "build_model", lambda *_: pytest.fail("loading a large model takes minutes"))
    source = {"manifest": folder / "data" / "train.jsonl", "rewards": ["tests.training.own_rewards:nowhere"]}
    with pytest.raises(UserError, match="no function nowhere"):
        train(workspace.config(folder, "grpo", data={"sources": [source]}, train={"run_dir": tmp_path / "run"}))


def test_one_step_off_needs_servers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one_step_off needs rollout\.engine = 'sglang'"):
        train(workspace.config(folder, "grpo", grpo={"one_step_off": True}, train={"run_dir": tmp_path / "run"}))


def test_profile_ranks_must_exist(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile\.ranks = 0, 1: the job has ranks 0 to 0"):
        train(_config(folder, tmp_path, profile={"enabled": True, "ranks": [0, 1]}))


def test_unusable_run_directory_is_found_before_anything_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "build", lambda *_: pytest.fail("starting servers takes minutes"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.run_dir = .*file/run: cannot be written to"):
        train(_config(folder, tmp_path / "file" / "run"))
    monkeypatch.setattr(run_lock, "LOCK_TIMEOUT_S", 0.0)
    monkeypatch.setattr(run_lock, "_try_lock", lambda *args: False)
    with pytest.raises(UserError, match="another process is training here"):
        train(_config(folder, tmp_path / "run"))


def test_signal_handlers_are_restored_if_a_sink_cannot_be_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(UserError, match="pip install wandb"):
        train(_config(folder, tmp_path / "run", logging={"wandb_project": "p"}))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_wandb_gets_the_exit_code_of_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    fake = ModuleType("wandb")
    run = SimpleNamespace(log=lambda row, step: None, finish=lambda exit_code: codes.append(exit_code))
    fake.init = lambda **settings: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    keys: dict[str, Any] = {"train": {"num_steps": 1}, "logging": {"wandb_project": "p"}}
    assert train(_config(folder, tmp_path / "run", **keys)) == 0
    monkeypatch.setattr(SftTrainer, "step", mock.Mock(side_effect=TrainingStopped("diverged")))
    with pytest.raises(TrainingStopped):
        train(_config(folder, tmp_path / "other", **keys))
    assert codes == [0, 1]


def test_mismatch_threshold_of_the_settings_is_used(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"stage": "grpo", "num_steps": 1}
    for threshold, warns in ((1e-12, True), (0.1, False)):
        caplog.clear()
        logs = {"tensorboard": False, "mismatch_threshold": threshold}
        train(_config(folder, tmp_path / str(threshold), train=keys, logging=logs, grpo={"group_size": 2}))
        assert ("log-probs of rollout and training differ by" in caplog.text) == warns


def test_gradients_have_no_memory_when_colocated_servers_start_and_when_a_run_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def build_local_engine(
        config: RunConfig, model: VideoLanguageModel, processor: PromptProcessor, tokens: SpecialTokens
    ) -> RolloutEngine:
        sizes.append(sum(parameter.main_grad.untyped_storage().nbytes() for parameter in model.parameters()))
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "local"})})
        return build_engine(config, model, processor, tokens)

    monkeypatch.setattr(train_module, "build_engine", build_local_engine)

    def run(name: str, engine: str, num_steps: int) -> list[dict[str, Any]]:
        keys = {"stage": "grpo", "num_steps": num_steps}
        source = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
        data = {"sources": [{**source, "rewards": ["tests.training.own_rewards:variety"]}]}
        settings = {"rollout": {"engine": engine}, "sglang": {"colocated": True}, "data": data}
        assert train(_config(folder, tmp_path / name, train=keys, **settings)) == 0
        return workspace.metrics(tmp_path / name)

    expected = run("local", "local", 2)
    assert sizes.pop() > 0
    run("sglang", "sglang", 1)
    resumed = run("sglang", "sglang", 2)
    assert sizes == [0, 0]
    assert resumed[1]["kl"] > 0
    for key in ("loss", "grad_norm", "kl", "reward/total"):
        assert [row[key] for row in resumed] == [row[key] for row in expected]


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(1.0, 3), (2.0, 5), (0.1, 1)])
def test_steps_of_epochs_are_rounded_up(num_epochs: float, num_steps: int) -> None:
    assert steps_of_epochs(TrainSection(num_epochs=num_epochs, prompts_per_step=4), epoch_size=10) == num_steps
