from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from megatron_vcr1.config.training_sections import LoggingSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.training import sinks
from megatron_vcr1.training.sinks import LogFileSink, Sink, TerminalSink, format_metrics, open_sinks

METRICS = {"loss": 0.12345, "reward/total": 1.5, "kl": 0.001, "clip_fraction": 0.02, "lr": 1e-6, "time/total_s": 3.0}


def _open(run_dir: Path, *, tensorboard: bool = False, wandb_project: str | None = None) -> list[Sink]:
    section = LoggingSection(tensorboard=tensorboard, wandb_project=wandb_project)
    return open_sinks(section, run_dir, {"train": {"seed": 0}}, first_step=0, num_steps=2)


def test_terminal_metrics_have_short_names_and_formats() -> None:
    assert format_metrics(METRICS) == {
        "loss": "0.1235",
        "reward": "1.500",
        "KL": "0.0010",
        "clipped": "2.0%",
        "lr": "1e-06",
        "s/step": "3.00",
    }


def test_log_file_gets_the_first_and_last_step_and_skips_steps_between(caplog: pytest.LogCaptureFixture) -> None:
    sink = LogFileSink(num_steps=1000)
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        for step in (1, 2, 3, 1000):
            sink.step(step, METRICS)
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1/1000", "step 1000/1000"]
    assert "reward 1.500" in caplog.text


@pytest.mark.parametrize("last", [1, 3])
def test_log_file_gets_the_last_step_of_a_run_that_ends_early(caplog: pytest.LogCaptureFixture, last: int) -> None:
    sink = LogFileSink(num_steps=1000)
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        for step in range(1, last + 1):
            sink.step(step, METRICS)
        sink.close(failed=True)
    assert [record.message.split("/")[0] for record in caplog.records] == [f"step {n}" for n in sorted({1, last})]


def test_terminal_shows_a_progress_bar_and_the_newest_metrics() -> None:
    output = io.StringIO()
    sink = TerminalSink(Console(file=output, force_terminal=True, width=100), first_step=2, num_steps=5)
    sink.step(3, METRICS)
    sink.close(failed=False)
    assert "3/5" in output.getvalue() and "1.500" in output.getvalue()


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = _open(tmp_path, tensorboard=True)
    for step in (1, 2):
        for sink in opened:
            sink.step(step, {"loss": step / 10})
    for sink in opened:
        sink.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [(1, 0.1), (2, 0.2)]


def test_wandb_project_without_wandb_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        _open(tmp_path, wandb_project="p")


def test_terminal_is_untouched_if_wandb_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: object) -> None:
        raise ConnectionError("no route to the server")

    fake = ModuleType("wandb")
    fake.init = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    terminal = io.StringIO()
    monkeypatch.setattr(sinks, "Console", lambda stderr: Console(file=terminal, force_terminal=True))
    with pytest.raises(ConnectionError):
        _open(tmp_path, wandb_project="p")
    assert terminal.getvalue() == ""  # no progress bar, no hidden cursor


def test_wandb_resumes_the_same_run_and_separates_runs_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    fake = ModuleType("wandb")
    fake.init = lambda **settings: started.append(settings["id"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for user in ("ann", "ann", "bob"):
        run_dir = tmp_path / user / "runs" / "joint"
        run_dir.mkdir(parents=True, exist_ok=True)
        _open(run_dir, wandb_project="p")
    assert started[0] == started[1] != started[2]
