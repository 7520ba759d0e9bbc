"""The lifecycle of a training process: stop signals, the hang watchdog, and the save that must finish at the end."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Self

from megatron_vcr1.training.trainer import TrainingStopped

EXIT_STOPPED_BY_SIGNAL = 85
"""Exit code after SIGTERM or SIGUSR1: the run has saved the steps that it has done, and can be started again. Slurm
scripts requeue on it.
"""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_STDERR_FD = 2


class Lifecycle:
    """Context manager that handles stop signals and detects hangs of this process while a run trains."""

    def __init__(self, *, step_timeout_s: float, finish_saving: Callable[[], None]) -> None:
        """
        Args:
            step_timeout_s: time without `expect_progress` after which the process counts as hung.
            finish_saving: completes the checkpoint that is being written. Called, on every rank, when the run ends with
                TrainingStopped: the error was raised on all ranks, so the save can be completed together. After other
                errors the ranks may have diverged, and waiting for each other could hang.
        """
        self._step_timeout_s = step_timeout_s
        self._finish_saving = finish_saving
        self._cleanup = ExitStack()
        self.stop_requested = False  # a stop signal has arrived in this process

    def __enter__(self) -> Self:
        """Install the signal handlers."""
        self._cleanup.callback(faulthandler.cancel_dump_traceback_later)
        for number in STOP_SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._cleanup.callback(signal.signal, number, previous)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the signal handlers, disarm the watchdog, and finish saving after TrainingStopped."""
        self._cleanup.close()
        if isinstance(error, TrainingStopped):
            self._finish_saving()

    def expect_progress(self) -> None:
        """Arm the watchdog: if this is not called again in time, the process ends with exit code 1.

        It writes the stacks of all its threads to stderr first. A hung collective leaves every rank waiting, so all
        ranks report where they are, including the one that caused the hang.

        faulthandler's timer is a C thread that does not need the GIL. A Python thread would not do: a rank that waits
        for its GPU may hold the GIL.
        """
        faulthandler.dump_traceback_later(self._step_timeout_s, exit=True, file=_STDERR_FD)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a flag: the training loop saves and ends after the step, on all ranks together.
        self.stop_requested = True
