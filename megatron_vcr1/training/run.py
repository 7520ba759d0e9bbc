"""The training loop: steps, checkpoints and exports of a run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from megatron_vcr1 import timeline
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.training_sections import CheckpointSection, TrainSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.training.lifecycle import EXIT_STOPPED_BY_SIGNAL, Lifecycle
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.profiling import StepProfile
from megatron_vcr1.training.reporter import Reporter
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.trainer import StepResult, Trainer, TrainingStopped

logger = logging.getLogger(__name__)


class Run:
    """A training run and its run directory. All ranks of the job must call the methods together.

    Attributes:
        step: steps done, including those before a resume.
    """

    def __init__(
        self,
        train: TrainSection,
        checkpoint: CheckpointSection,
        model_dir: Path,
        *,
        run_dir: RunDir,
        store: RunStore,
        learner: Learner,
        trainer: Trainer,
        num_steps: int,
    ) -> None:
        """Resume from the newest complete checkpoint of the run directory, if there is one.

        Args:
            model_dir: model.path, whose configuration and tokenizer files are copied into checkpoints.
            run_dir, store: train.run_dir and its checkpoints.
            num_steps: length of the run; it may end earlier if the trainer is out of data.

        Raises:
            UserError: the checkpoint was written by a run of another model, other data or the other stage.
        """
        self._train = train
        self._checkpoint = checkpoint
        self._model_dir = model_dir
        self._run_dir = run_dir
        self._store = store
        self._learner = learner
        self._trainer = trainer
        self._num_steps = num_steps
        self.step = 0
        self._consecutive_skipped = 0  # steps in a row whose update was not applied
        self._save_is_due = False
        self._save_s = 0.0  # time of the last save, reported with the next step
        self._resume()

    def _resume(self) -> None:
        newest = self._store.latest()
        if newest is None:
            return
        state = self._store.load(newest, self._learner.model, self._learner.optimizer, self._learner.scheduler)
        if state["stage"] != self._train.stage:
            raise UserError(
                f"train.run_dir = {self._run_dir.path} holds a run with train.stage = '{state['stage']}', not "
                f"'{self._train.stage}'; choose another folder (model.path can be the export of that run, or one of "
                "its checkpoints)"
            )
        self.step, self._consecutive_skipped = newest, state["skipped_in_a_row"]
        self._trainer.load_state_dict(state["trainer"])
        logger.info("resumed from %s", self._store.path(newest))

    def run(self, lifecycle: Lifecycle, reporter: Reporter, profile: StepProfile) -> int:
        """Do all remaining steps.

        Returns:
            0, or `EXIT_STOPPED_BY_SIGNAL` if a stop signal ended the run after a checkpoint.

        Raises:
            TrainingStopped: too many steps in a row had a loss or a gradient that is not finite, or the trainer cannot
                continue.
        """
        if self._is_finished():
            logger.info(
                "finished: step %d was the last one; raise train.num_steps or num_epochs to continue", self.step
            )
        lifecycle.expect_progress()
        if self._checkpoint.export == "always" and self.step > 0:
            self._export_unless_done()  # the last start may have ended between the checkpoint and its export
        while not self._is_finished():
            lifecycle.expect_progress()
            profile.next_step()
            result = self._do_step(reporter)
            self._abort_if_not_finite(result)
            is_stopping = self._agree_to_stop(lifecycle)
            self._save_is_due |= self.step % self._checkpoint.every_steps == 0
            # A loss that is not finite may come from damaged weights. Saving them could push the last good checkpoint
            # out of keep_last, so a due save waits for a step that is applied.
            if (self._save_is_due and result.applied) or self._is_finished() or is_stopping:
                self._save()
            if is_stopping:
                self._store.finish()
                logger.info("step %d: stopped by a signal and saved; run the same command again to resume", self.step)
                return EXIT_STOPPED_BY_SIGNAL
        lifecycle.expect_progress()
        self._store.finish()
        if self._checkpoint.export == "end":
            self._export_unless_done()
        return 0

    def _is_finished(self) -> bool:
        return self.step >= self._num_steps or self._trainer.is_out_of_data

    def _do_step(self, reporter: Reporter) -> StepResult:
        metrics = Metrics()
        with metrics.time_phase("total"):
            result = self._trainer.step(self.step + 1, metrics)
        self.step += 1
        metrics.add_seconds("save", self._save_s)
        self._save_s = 0.0
        # Report before the checkpoint: a resumed run drops the records of steps after its checkpoint, but it cannot
        # restore records that are missing before it.
        reporter.report(self.step, result, metrics, self._trainer.take_skipped())
        return result

    @timeline.span("save")
    def _save(self) -> None:
        start = time.perf_counter()
        state = {
            "stage": self._train.stage,
            "skipped_in_a_row": self._consecutive_skipped,
            "trainer": self._trainer.state_dict(),
        }
        learner = self._learner
        self._store.save(self.step, learner.model, learner.optimizer, learner.scheduler, state, self._model_dir)
        if self._checkpoint.export == "always":
            self._store.finish()
            self._export()
        self._save_is_due = False
        self._save_s = time.perf_counter() - start

    def _export(self) -> None:
        """Export the newest checkpoint as a Hugging Face directory, replacing an earlier export of that name."""
        directory = self._run_dir.export_dir(self.step, self._checkpoint.export)
        run_on_first_rank(lambda: self._run_dir.remove_old_export(directory))
        export_checkpoint(self._store.path(self.step), directory)
        run_on_first_rank(lambda: self._run_dir.note_export(self.step, directory))
        logger.info("exported: %s", directory)

    def _export_unless_done(self) -> None:
        directory = self._run_dir.export_dir(self.step, self._checkpoint.export)
        if not run_on_first_rank(lambda: self._run_dir.is_exported(self.step, directory)):
            self._export()

    def _abort_if_not_finite(self, result: StepResult) -> None:
        """Warn about a step that was not applied; raise TrainingStopped after too many of them in a row."""
        if result.applied:
            self._consecutive_skipped = 0
            return
        self._consecutive_skipped += 1
        # The ranks of a replica report the same samples; dict.fromkeys drops duplicates and keeps the order.
        gathered = collectives.gather_objects(result.samples)
        samples = ", ".join(dict.fromkeys(sample for rank_samples in gathered for sample in rank_samples))
        logger.warning(
            "step %d: loss %s, gradient norm %s: not finite, so the update was skipped; samples: %s",
            self.step,
            result.loss,
            result.grad_norm,
            samples,
        )
        if self._consecutive_skipped > self._train.max_skipped_steps:
            raise TrainingStopped(
                f"{self._consecutive_skipped} steps in a row had a loss or a gradient that is not finite "
                f"(train.max_skipped_steps = {self._train.max_skipped_steps}); the last step's samples are {samples}. "
                "Lower the learning rate, or check these samples"
            )

    def _agree_to_stop(self, lifecycle: Lifecycle) -> bool:
        """Return whether any rank has received a stop signal, the same on every rank.

        Raises the error of an asynchronous save that has failed on any rank: there is no point in computing steps that
        cannot be saved.
        """
        num_stopping, num_failed = collectives.sum_over_ranks(
            [float(lifecycle.stop_requested), float(self._store.has_failed)]
        )
        if num_failed:
            self._store.finish()
        return num_stopping > 0
