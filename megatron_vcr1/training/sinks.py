"""Metric sinks show or store a run's metrics while it trains: terminal, log, TensorBoard, Weights & Biases."""

from __future__ import annotations

import html
import logging
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from megatron_vcr1 import timeline
from megatron_vcr1.config.training_sections import LoggingSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.training.shown_samples import COLUMNS, ShownSample

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

    def validation(self, step: int, metrics: Mapping[str, float], samples: Sequence[ShownSample]) -> None:
        """Show or store the metrics of a validation, and some of its samples. The log has a line with the metrics."""
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
    sinks.append(
        TerminalSink(console, first_step, num_steps) if console.is_terminal else LogFileSink(first_step, num_steps)
    )
    return sinks


def format_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the formatted values of `TERMINAL_METRICS` by short name."""
    return {short_name: format(metrics[name], style) for name, short_name, style in TERMINAL_METRICS if name in metrics}


class LogFileSink:
    """The sink for output that is not a terminal: logs the first and the last step, and a line every ten seconds."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._first_step, self._num_steps = first_step, num_steps
        self._start_s = time.monotonic()
        self._logged_s = float("-inf")
        self._pending_line = ""  # line of the newest step, until it is logged

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        elapsed_s = time.monotonic() - self._start_s
        eta_s = elapsed_s / (step - self._first_step) * (self._num_steps - step)
        values = ", ".join(f"{name} {value}" for name, value in format_metrics(metrics).items())
        times = f"elapsed {format_duration(elapsed_s)}, ETA {format_duration(eta_s)}"
        self._pending_line = f"step {step}/{self._num_steps}: {times}, {values}"
        if step == self._num_steps or time.monotonic() - self._logged_s >= _LINE_INTERVAL_S:
            self._log()

    def validation(self, step: int, metrics: Mapping[str, float], samples: Sequence[ShownSample]) -> None:
        self._log()  # the line of its step comes first

    def close(self, *, failed: bool) -> None:
        self._log()  # the run may end before its planned last step

    def _log(self) -> None:
        if self._pending_line:
            logger.info("%s", self._pending_line)
        self._logged_s, self._pending_line = time.monotonic(), ""


def format_duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class TerminalSink:
    """A progress bar with the current phase, above the newest metrics, redrawn in place. It fits into 80 columns."""

    def __init__(self, console: Console, first_step: int, num_steps: int) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=first_step)
        self._metrics: RenderableType = Text("no step yet")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)
        stderr = sys.stderr
        self._handlers = [
            handler for handler in logging.getLogger().handlers if getattr(handler, "stream", 0) is stderr
        ]
        self._live.start(refresh=True)
        self._redirect_logs()

    def _render(self) -> Group:
        # The refresh thread asks for it, so the phase is shown before the first step ends, too.
        return Group(self._progress, Text(f"now: {timeline.current() or 'between steps'}", style="dim"), self._metrics)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step)
        pairs = [Text(f"{name} {value}", no_wrap=True) for name, value in format_metrics(metrics).items()]
        self._metrics = Columns(pairs, padding=(0, 3))
        self._live.refresh()

    def validation(self, step: int, metrics: Mapping[str, float], samples: Sequence[ShownSample]) -> None:
        """Do nothing: the line of the log appears above the display."""

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

    def validation(self, step: int, metrics: Mapping[str, float], samples: Sequence[ShownSample]) -> None:
        self.step(step, metrics)
        for label in dict.fromkeys(sample.label for sample in samples):
            mine = [sample for sample in samples if sample.label == label]
            self._writer.add_text(f"validation/{label}", _markdown_table(mine), step)
            for sample in mine:
                if sample.frames is not None:
                    self._writer.add_image(f"validation/{label}/{sample.id}", sample.frames, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


def _markdown_table(samples: Sequence[ShownSample]) -> str:
    """Return a Markdown table; the texts of models and data sets cannot break out of their cells."""
    rows = [
        [html.escape(text).replace("|", "&#124;").replace("\n", "<br>") for text in sample.texts] for sample in samples
    ]
    lines = [" | ".join(row) for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


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
        self._wandb = wandb
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

    def validation(self, step: int, metrics: Mapping[str, float], samples: Sequence[ShownSample]) -> None:
        row: dict[str, Any] = dict(metrics)
        for label in dict.fromkeys(sample.label for sample in samples):
            rows = [
                [*sample.texts, None if sample.frames is None else self._wandb.Image(sample.frames)]
                for sample in samples
                if sample.label == label
            ]
            row[f"validation/{label}/samples"] = self._wandb.Table(columns=[*COLUMNS, "frames"], data=rows)
        self._run.log(row, step=step)

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
