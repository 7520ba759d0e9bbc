from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from megatron_vcr1 import timeline
from megatron_vcr1.config.training_sections import LoggingSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.training import sinks
from megatron_vcr1.training.shown_samples import ShownSample
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


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still: the log gets a line every few seconds."""
    monkeypatch.setattr(sinks, "time", SimpleNamespace(monotonic=lambda: 0.0))


def test_log_file_gets_the_first_and_last_step_and_skips_steps_between(
    stopped_clock: None, caplog: pytest.LogCaptureFixture
) -> None:
    sink = LogFileSink(first_step=0, num_steps=1000)
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        for step in (1, 2, 3, 1000):
            sink.step(step, METRICS)
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1/1000", "step 1000/1000"]
    assert "reward 1.500" in caplog.text


@pytest.mark.parametrize("last", [1, 3])
def test_log_file_gets_the_last_step_of_a_run_that_ends_early(
    stopped_clock: None, caplog: pytest.LogCaptureFixture, last: int
) -> None:
    sink = LogFileSink(first_step=0, num_steps=1000)
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        for step in range(1, last + 1):
            sink.step(step, METRICS)
        sink.close(failed=True)
    assert [record.message.split("/")[0] for record in caplog.records] == [f"step {n}" for n in sorted({1, last})]


def test_log_lines_have_labelled_times(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "time", SimpleNamespace(monotonic=iter([0.0, 100.0, 100.0, 100.0]).__next__))
    with caplog.at_level(logging.INFO, "megatron_vcr1"):
        LogFileSink(first_step=10, num_steps=40).step(12, METRICS)  # resumed at step 10: 50 s per step
    assert "step 12/40: elapsed 0:01:40, ETA 0:23:20, loss 0.1235" in caplog.text


def test_terminal_shows_progress_phase_and_the_newest_metrics_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # with "dumb", rich shows no progress
    output = io.StringIO()
    everything = {name: 1234.5678 for name, _, _ in sinks.TERMINAL_METRICS}
    with timeline.span("rollout"):
        sink = TerminalSink(Console(file=output, force_terminal=True, width=80), first_step=2, num_steps=50_000)
        assert "now: rollout" in output.getvalue() and "no step yet" in output.getvalue()
        sink.step(3, everything)
    sink.close(failed=False)
    lines = [Text.from_ansi(line).plain for line in output.getvalue().replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) <= 80 and not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    shown = "\n".join(lines)
    assert "3/50000" in shown and "elapsed" in shown and "ETA" in shown
    for name, value in format_metrics(everything).items():
        assert f"{name} {value}" in shown


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


SHOWN = [ShownSample("a", "1", "when?", "<b>|x</b>\ny", "IoU 0.5", np.zeros((4, 6, 3), np.uint8))]


def test_tensorboard_shows_validation_samples_as_a_table_and_frames(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = _open(tmp_path, tensorboard=True)
    for sink in opened:
        sink.validation(5, {"validation/a/mIoU": 0.5}, SHOWN)
        sink.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("validation/a/mIoU")[0].value == 0.5
    (table,) = events.Tensors("validation/a/text_summary")
    assert "| 1 | when? | &lt;b&gt;&#124;x&lt;/b&gt;<br>y | IoU 0.5 |" in table.tensor_proto.string_val[0].decode()
    (image,) = events.Images("validation/a/1")
    assert (image.width, image.height) == (6, 4)


def test_wandb_shows_validation_samples_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **_: SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda **_: None),
        Table=lambda columns, data: (columns, data),
        Image=lambda frames: frames.shape,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for sink in _open(tmp_path, wandb_project="p"):
        sink.validation(5, {"validation/a/mIoU": 0.5}, SHOWN)
        sink.close(failed=False)
    columns = ["id", "prompt", "response", "metrics", "frames"]
    table = (columns, [["1", "when?", "<b>|x</b>\ny", "IoU 0.5", (4, 6, 3)]])
    assert logged == [(5, {"validation/a/mIoU": 0.5, "validation/a/samples": table})]


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
