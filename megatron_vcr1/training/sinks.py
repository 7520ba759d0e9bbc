"""Metric sinks show or store a run's metrics while it trains: terminal, log, TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_vcr1.config.training_sections import LoggingSection
from megatron_vcr1.errors import UserError

logger = logging.getLogger(__name__)

# Metrics that the terminal shows, in this order: metric, short name, format. Those that a step lacks are left out.
TERMINAL_METRICS = (
    ("loss", "loss", ".4f"),
    ("reward/total", "reward", ".3f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("clip_fraction", "clipped", ".1%"),
    ("response_tokens/mean", "tokens", ".0f"),
    ("truncated_fraction", "truncated", ".1%"),
    ("grad_norm", "gradient", ".3g"),
    ("lr", "lr", ".2g"),
    ("tokens_per_s", "tokens/s", ".0f"),
    ("time/total_s", "s/step", ".2f"),
)
_LINE_INTERVAL_S = 10.0


class Sink(Protocol):
    """The interface of a metric sink."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show or store the metrics of a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flush and release the sink. `failed` tells whether the run ends with an error."""
        ...


def open_sinks(
    section: LoggingSection, run_dir: Path, settings: Mapping[str, Any], *, first_step: int, num_steps: int
) -> list[Sink]:
    """Open the sinks that [logging] enables, and the sink for the terminal or the log. Only rank 0 calls it.

    Args:
        run_dir: the run's directory, for TensorBoard events and Weights & Biases files.
        settings: the settings of the whole run as JSON values, for Weights & Biases.
        first_step: steps done before this start; 0 for a new run.
        num_steps: length of the run.

    Raises:
        UserError: logging.wandb_project is set, but wandb is not installed.
    """
    sinks: list[Sink] = []
    if section.wandb_project is not None:
        sinks.append(_WeightsAndBiases(section.wandb_project, run_dir, settings))
    if section.tensorboard:
        sinks += _tensorboard(run_dir, first_step)
    # The terminal comes last: if another sink fails or writes to the terminal, no progress bar is in the way yet.
    console = Console(stderr=True)
    sinks.append(TerminalSink(console, first_step, num_steps) if console.is_terminal else LogFileSink(num_steps))
    return sinks


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the formatted values of `TERMINAL_METRICS` by short name."""
    return {short_name: format(metrics[name], style) for name, short_name, style in TERMINAL_METRICS if name in metrics}


class LogFileSink:
    """The sink for output that is not a terminal: logs the first and the last step, and a line every ten seconds."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._logged_s = float("-inf")
        self._pending_line = ""  # line of the newest step, until it is logged

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        values = ", ".join(f"{name} {value}" for name, value in format_metrics(metrics).items())
        self._pending_line = f"step {step}/{self._num_steps}: {values}"
        if step == self._num_steps or time.monotonic() - self._logged_s >= _LINE_INTERVAL_S:
            self._log()

    def close(self, *, failed: bool) -> None:
        self._log()  # the run may end before its planned last step

    def _log(self) -> None:
        if self._pending_line:
            logger.info("%s", self._pending_line)
        self._logged_s, self._pending_line = time.monotonic(), ""


class TerminalSink:
    """A progress bar above a table of the newest metrics, redrawn in place."""

    def __init__(self, console: Console, first_step: int, num_steps: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("train"), *columns, console=console)
        self._task = self._progress.add_task("train", total=num_steps, completed=first_step)
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        stderr = sys.stderr
        self._handlers = [
            handler for handler in logging.getLogger().handlers if getattr(handler, "stream", 0) is stderr
        ]
        self._live.start()
        self._redirect_logs()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step)
        values = format_metrics(metrics)
        table = Table(box=None, pad_edge=False)
        for name in values:
            table.add_column(name, justify="right")
        table.add_row(*values.values())
        self._live.update(Group(self._progress, table))

    def close(self, *, failed: bool) -> None:
        self._live.stop()
        self._redirect_logs()

    def _redirect_logs(self) -> None:
        """Send the log handlers of stderr to the present `sys.stderr`.

        While the display is live, rich replaces `sys.stderr` so that log lines appear above the display. The handlers
        hold the stream that they were created with, so they must be told when it is replaced and when it comes back.
        """
        for handler in self._handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


def _tensorboard(run_dir: Path, first_step: int) -> list[Sink]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard: no events are written (tensorboard is not installed)")
        return []
    # purge_step hides the events of steps after the checkpoint that the run resumes from.
    return [_TensorBoard(SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1))]


class _WeightsAndBiases:
    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb_project is set, but wandb cannot be imported ({error}): pip install wandb"
            ) from error
        self._run = wandb.init(
            project=project,
            dir=str(run_dir),
            id=_wandb_id(run_dir),
            name=run_dir.name,
            resume="allow",
            config=dict(settings),
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(run_dir: Path) -> str:
    """Return the run's id in Weights & Biases, from a file in the run directory so that a resumed run finds it.

    The id is random instead of derived from the directory's name. Another user's run, or a run that was started over,
    may have the same name; Weights & Biases would take both for one run and drop the steps that it has already.
    """
    file = run_dir / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text()
