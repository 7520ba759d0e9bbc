from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from megatron_vcr1.config.rendering import default_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.training import logs
from megatron_vcr1.training.logs import Lines, Screen, open_sinks, shown

METRICS = {"loss": 0.12345, "reward/total": 1.5, "kl": 0.001, "clip_fraction": 0.02, "lr": 1e-6, "time/total_s": 3.0}


def test_the_numbers_that_people_watch() -> None:
    assert shown(METRICS) == {
        "loss": "0.1235",
        "reward": "1.500",
        "KL": "0.0010",
        "clipped": "2.0%",
        "lr": "1e-06",
        "s/step": "3.00",
    }


def test_a_log_file_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(num_steps=1000)
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        for step in (1, 2, 3, 1000):
            lines.step(step, METRICS)
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1/1000", "step 1000/1000"]
    assert "reward 1.500" in caplog.text


@pytest.mark.parametrize("last", [1, 3])
def test_a_log_file_gets_the_last_step_of_a_run_that_ends_before_its_time(
    caplog: pytest.LogCaptureFixture, last: int
) -> None:
    lines = Lines(num_steps=1000)
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        for step in range(1, last + 1):
            lines.step(step, METRICS)
        lines.close(failed=True)
    assert [record.message.split("/")[0] for record in caplog.records] == [f"step {n}" for n in sorted({1, last})]


def test_a_terminal_gets_a_bar_and_the_newest_numbers() -> None:
    output = io.StringIO()
    screen = Screen(Console(file=output, force_terminal=True, width=100), first_step=2, num_steps=5)
    screen.step(3, METRICS)
    screen.close(failed=False)
    assert "3/5" in output.getvalue() and "1.500" in output.getvalue()


def _config(run_dir: Path, **settings: object) -> RunConfig:
    return RunConfig.model_validate(
        {**default_config().model_dump(), "train": {"run_dir": run_dir}, "logging": settings}
    )


def test_tensorboard_has_every_metric_of_a_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = open_sinks(_config(tmp_path), 0, 2)
    for step in (1, 2):
        for sink in sinks:
            sink.step(step, {"loss": step / 10})
    for sink in sinks:
        sink.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, pytest.approx(one.value)) for one in events.Scalars("loss")] == [(1, 0.1), (2, 0.2)]


def test_weights_and_biases_must_be_installed_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_sinks(_config(tmp_path, tensorboard=False, wandb_project="p"), 0, 2)


def test_a_terminal_is_left_as_it_was_when_weights_and_biases_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: object) -> None:
        raise ConnectionError("no route to the server")

    fake = ModuleType("wandb")
    fake.init = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    terminal = io.StringIO()
    monkeypatch.setattr(logs, "Console", lambda stderr: Console(file=terminal, force_terminal=True))
    with pytest.raises(ConnectionError):
        open_sinks(_config(tmp_path, tensorboard=False, wandb_project="p"), 0, 2)
    assert terminal.getvalue() == ""  # no bar, no hidden cursor


def test_a_resumed_run_goes_on_in_weights_and_biases_and_another_of_that_name_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    fake = ModuleType("wandb")
    fake.init = lambda **settings: started.append(settings["id"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for user in ("ann", "ann", "bob"):
        run_dir = tmp_path / user / "runs" / "joint"
        run_dir.mkdir(parents=True, exist_ok=True)
        open_sinks(_config(run_dir, tensorboard=False, wandb_project="p"), 0, 2)
    assert started[0] == started[1] != started[2]
