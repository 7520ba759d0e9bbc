"""The loop around a trainer: steps, metrics, checkpoints, signals."""

from __future__ import annotations

import faulthandler
import logging
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from megatron_vcr1 import timeline
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.training.logs import Sink, open_sinks
from megatron_vcr1.training.metrics import Metrics, derived, device_name, peak_memory_gb
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.profiling import StepProfile
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.trainer import StepResult, Trainer, TrainingStopped

logger = logging.getLogger(__name__)

EXIT_STOPPED_BY_SIGNAL = 85
"""SIGTERM or SIGUSR1 came: the run has saved itself and wants to be started again. Slurm scripts requeue on it."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_STDERR = 2


class Run:
    """A run in its folder. The ranks of the job call the methods together."""

    def __init__(
        self, config: RunConfig, folder: RunDir, store: RunStore, learner: Learner, trainer: Trainer, num_steps: int
    ) -> None:
        """Goes on from the newest whole checkpoint of train.run_dir, if there is one.

        Args:
            folder, store: train.run_dir and the checkpoints in it.
            num_steps: at which it ends, at the latest.

        Raises:
            UserError: the checkpoint is of another model, of other data or of the other stage.
        """
        self._config = config
        self._learner = learner
        self._trainer = trainer
        self._num_steps = num_steps
        self._folder = folder
        self._store = store
        self._step = 0
        self._skipped_in_a_row = 0
        self._save_is_due = False
        self._save_s = 0.0
        self._sinks: list[Sink] = []
        self._cleanup = ExitStack()
        self._stop_requested = False
        self._profile = StepProfile(config.profile, self._folder.profile)
        self._resume()

    def _resume(self) -> None:
        newest = self._store.latest()
        if newest is None:
            return
        state = self._store.load(newest, self._learner.model, self._learner.optimizer, self._learner.scheduler)
        if state["stage"] != self._config.train.stage:
            raise UserError(
                f"train.run_dir = {self._folder.path} holds a run with train.stage = '{state['stage']}', not "
                f"'{self._config.train.stage}'; choose another folder (model.path can be this one's export, or one of "
                "its checkpoints)"
            )
        self._step, self._skipped_in_a_row = newest, state["skipped_in_a_row"]
        self._trainer.load_state_dict(state["trainer"])
        logger.info("resumed from %s", self._store.path(newest))

    def __enter__(self) -> Self:
        """Open the folder and the displays, and listen to signals. Raises UserError or OSError, on all ranks."""
        with ExitStack() as opened:  # closed again if the rest cannot be opened
            opened.callback(faulthandler.cancel_dump_traceback_later)
            opened.callback(self._profile.close)
            for number in _SIGNALS:
                opened.callback(signal.signal, number, signal.signal(number, self._on_signal))
            run_on_first_rank(self._open_displays)
            for sink in self._sinks:
                opened.push(partial(_close, sink))
            self._cleanup = opened.pop_all()
        return self

    def _open_displays(self) -> None:
        self._folder.open(self._config, self._step)
        self._sinks = open_sinks(self._config, self._step, self._num_steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.__exit__(kind, error, trace)
        if isinstance(error, TrainingStopped):  # on every rank, so that the save under way can end
            self._store.finish()

    def run_steps(self) -> int:
        """All steps that are left; 0, or `EXIT_STOPPED_BY_SIGNAL`.

        Raises:
            TrainingStopped: too many steps in a row were not finite, or the trainer cannot go on.
        """
        if self._is_over():
            logger.info(
                "finished: step %d was the last one; a higher train.num_steps or num_epochs goes on", self._step
            )
        self._expect_progress()
        if self._config.checkpoint.export == "always" and self._step > 0:
            self._export_unless_done()  # a signal or an accident may have come between the checkpoint and its export
        while not self._is_over():
            self._expect_progress()
            self._profile.next_step()
            metrics = Metrics()
            with metrics.timed("total"):
                result = self._trainer.step(self._step + 1, metrics)
            self._step += 1
            # Before the checkpoint: what is on record must reach at least as far as what a run goes on from.
            self._report(result, metrics)
            self._abort_if_not_finite(result)
            stop = self._stop_is_requested()
            self._save_is_due |= self._step % self._config.checkpoint.every_steps == 0
            # A step that is not finite may be the weights' fault: the checkpoints before are not given up for these.
            if (self._save_is_due and result.applied) or self._is_over() or stop:
                self._save()
            if stop:
                self._store.finish()
                logger.info("step %d: a signal came; saved, and the same command goes on from here", self._step)
                return EXIT_STOPPED_BY_SIGNAL
        self._expect_progress()
        self._store.finish()
        if self._config.checkpoint.export == "end":
            self._export_unless_done()
        return 0

    def _is_over(self) -> bool:
        return self._step >= self._num_steps or self._trainer.is_out_of_data

    def _expect_progress(self) -> None:
        """Unless this is called again in time, end the process with its threads' stacks on stderr.

        A hung collective leaves every rank waiting, so all of them tell where, the guilty one too. The clock runs
        outside of the interpreter, which a rank that waits for its GPU may hold.
        """
        faulthandler.dump_traceback_later(self._config.train.step_timeout_s, exit=True, file=_STDERR)

    @timeline.span("save")
    def _save(self) -> None:
        start = time.perf_counter()
        state = {
            "stage": self._config.train.stage,
            "skipped_in_a_row": self._skipped_in_a_row,
            "trainer": self._trainer.state_dict(),
        }
        learner = self._learner
        model_dir = self._config.model.path
        self._store.save(self._step, learner.model, learner.optimizer, learner.scheduler, state, model_dir)
        if self._config.checkpoint.export == "always":
            self._store.finish()
            self._export()
        self._save_is_due = False
        self._save_s = time.perf_counter() - start

    def _export(self) -> None:
        """The newest checkpoint as a Hugging Face directory; one that a run exported before makes way."""
        directory = self._folder.export_of(self._step, self._config.checkpoint.export)
        run_on_first_rank(lambda: self._folder.make_way_for(directory))
        export_checkpoint(self._store.path(self._step), directory)
        run_on_first_rank(lambda: self._folder.note_export(self._step, directory))
        logger.info("exported: %s", directory)

    def _export_unless_done(self) -> None:
        directory = self._folder.export_of(self._step, self._config.checkpoint.export)
        if not run_on_first_rank(lambda: self._folder.is_exported(self._step, directory)):
            self._export()

    def _report(self, result: StepResult, metrics: Metrics) -> None:
        """One row of metrics over all ranks; rollouts and skipped samples of all copies of the model."""
        metrics.add_seconds("save", self._save_s)
        self._save_s = 0.0
        metrics.high("memory/peak_gb", peak_memory_gb())
        skipped = self._trainer.take_skipped()
        metrics.count("skipped_samples", len(skipped))
        reduced = metrics.reduce()
        row = {
            "step": self._step,
            "loss": result.loss,
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            "update_skipped": int(not result.applied),
            **reduced,
            **derived(reduced, dist.get_world_size(), device_name()),
        }
        rollouts = dict(one for rows in collectives.gather_objects(result.rollouts) for one in rows.items())
        all_skipped = [(one.id, one.reason) for some in collectives.gather_objects(skipped) for one in some]
        if mesh.is_first_rank():
            if rollouts:
                self._folder.write_rollouts(self._step, [row for _, row in sorted(rollouts.items())])
            self._folder.add_skipped(self._step, all_skipped)
            self._folder.add_metrics(row)
            for sink in self._sinks:
                sink.step(self._step, row)
            self._warn_of_mismatch(reduced)

    def _warn_of_mismatch(self, metrics: Mapping[str, float]) -> None:
        difference, alarm = metrics.get("mismatch/mean_abs", 0.0), self._config.logging.mismatch_threshold
        if difference <= alarm:  # what is no number is not
            return
        age = "; the responses are from an older policy, which is part of it" if metrics.get("policy_lag") else ""
        logger.warning(
            "step %d: log-probs of rollout and training differ by %.3g on average, more than "
            "logging.mismatch_threshold = %g: old weights in the engine, other arithmetic, or other "
            "positions of the same tokens%s",
            self._step,
            difference,
            alarm,
            age,
        )

    def _abort_if_not_finite(self, result: StepResult) -> None:
        if result.applied:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        of_ranks = collectives.gather_objects(result.samples)  # those that share a copy of the model have the same
        samples = list(dict.fromkeys(name for some in of_ranks for name in some))
        logger.warning(
            "step %d: loss %s, gradient norm %s: not finite, so this update was left out; samples: %s",
            self._step,
            result.loss,
            result.grad_norm,
            ", ".join(samples),
        )
        if self._skipped_in_a_row > self._config.train.max_skipped_steps:
            raise TrainingStopped(
                f"{self._skipped_in_a_row} steps in a row had a loss or a gradient that is not finite "
                f"(train.max_skipped_steps = {self._config.train.max_skipped_steps}); the last one's samples are "
                f"{', '.join(samples)}. Lower the learning rate, or look at these samples"
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _stop_is_requested(self) -> bool:
        """Whether a signal has reached any rank. Raises what a checkpoint under way has failed with: steps that no
        checkpoint will hold are not worth their time.
        """
        mine = [float(self._stop_requested), float(self._store.has_failed)]
        num_stopped, num_failed = collectives.sum_over_ranks(mine)
        if num_failed:
            self._store.finish()
        return num_stopped > 0


def _close(sink: Sink, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    sink.close(failed=error is not None)
