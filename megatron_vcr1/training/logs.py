"""Where a run's metrics are shown while it goes on: the terminal, TensorBoard, Weights & Biases."""

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

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError

logger = logging.getLogger(__name__)

SHOWN = (  # in this order, where a step has them: metric, its short name, its format
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
_LINE_EVERY_S = 10.0


class Sink(Protocol):
    """Takes each step's metrics."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None:
        """Show no more; `failed`: the run ends with an error."""


def open_sinks(config: RunConfig, first_step: int, num_steps: int) -> list[Sink]:
    """What the settings ask for and the machine has; called by the job's first rank.

    Args:
        first_step: steps done before.

    Raises:
        UserError: Weights & Biases is asked for and not installed.
    """
    sinks: list[Sink] = []
    if config.logging.wandb_project is not None:
        sinks.append(_WeightsAndBiases(config))
    if config.logging.tensorboard:
        sinks += _tensorboard(config.train.run_dir, first_step)
    # Last: what fails before, or writes to the terminal, finds it as it was.
    console = Console(stderr=True)
    sinks.append(Screen(console, first_step, num_steps) if console.is_terminal else Lines(num_steps))
    return sinks


def shown(metrics: Mapping[str, float]) -> dict[str, str]:
    """The few numbers that people watch, by short name."""
    return {short: format(metrics[name], style) for name, short, style in SHOWN if name in metrics}


class Lines:
    """One line every ten seconds, and for the first and the last step, whichever that is: for log files."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._last = float("-inf")
        self._line = ""  # of the newest step, until it is shown

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        values = ", ".join(f"{name} {value}" for name, value in shown(metrics).items())
        self._line = f"step {step}/{self._num_steps}: {values}"
        if step == self._num_steps or time.monotonic() - self._last >= _LINE_EVERY_S:
            self._show()

    def close(self, *, failed: bool) -> None:
        self._show()

    def _show(self) -> None:
        if self._line:
            logger.info("%s", self._line)
        self._last, self._line = time.monotonic(), ""


class Screen:
    """A progress bar above the newest numbers, redrawn in place."""

    def __init__(self, console: Console, first_step: int, num_steps: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("train"), *columns, console=console)
        self._task = self._progress.add_task("train", total=num_steps, completed=first_step)
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        stderr = sys.stderr
        self._handlers = [one for one in logging.getLogger().handlers if getattr(one, "stream", None) is stderr]
        self._live.start()
        self._redirect()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step)
        values = shown(metrics)
        table = Table(box=None, pad_edge=False)
        for name in values:
            table.add_column(name, justify="right")
        table.add_row(*values.values())
        self._live.update(Group(self._progress, table))

    def close(self, *, failed: bool) -> None:
        self._live.stop()
        self._redirect()

    def _redirect(self) -> None:
        """Logs go where stderr goes now: above the display while it is on, as they went before when it is not."""
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
        logger.info("TensorBoard: no events (tensorboard is not installed)")
        return []
    # Events of steps behind the checkpoint that the run goes on from are hidden.
    return [_TensorBoard(SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1))]


class _WeightsAndBiases:
    def __init__(self, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb_project is set, but wandb cannot be imported ({error}): pip install wandb"
            ) from error
        run_dir = config.train.run_dir
        self._run = wandb.init(
            project=config.logging.wandb_project,
            dir=str(run_dir),
            id=_wandb_id(run_dir),
            name=run_dir.name,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(run_dir: Path) -> str:
    """Found again when the run is resumed. Not made of the folder's name, which another user's run, or one that began
    anew, has too: Weights & Biases would take both for one, and drop the steps that it has.
    """
    file = run_dir / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text()
