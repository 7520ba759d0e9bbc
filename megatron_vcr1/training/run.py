"""The training loop: steps, checkpoints and exports of a run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from megatron_vcr1 import timeline
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.evaluation_sections import ValidationSection
from megatron_vcr1.config.training_sections import CheckpointSection, TrainSection
from megatron_vcr1.parallel import collectives
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.training.lifecycle import EXIT_STOPPED_BY_SIGNAL, Lifecycle
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.profiling import StepProfile
from megatron_vcr1.training.reporter import Reporter
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.settings_checks import check_stage
from megatron_vcr1.training.trainer import StepResult, Trainer, TrainingStopped
from megatron_vcr1.training.validation import BestStep, Validator

logger = logging.getLogger(__name__)


class Run:
    """A training run and its run directory. All ranks of the job must call the methods together.

    Attributes:
        step: steps done, including those before a resume.
        validated_step: step of the last complete validation; None before the first.
    """

    def __init__(
        self,
        train: TrainSection,
        checkpoint: CheckpointSection,
        validation: ValidationSection,
        model_dir: Path,
        *,
        run_dir: RunDir,
        store: RunStore,
        learner: Learner,
        trainer: Trainer,
        validator: Validator | None,
        num_steps: int,
    ) -> None:
        """Resume from the newest complete checkpoint of the run directory, if there is one.

        Args:
            model_dir: model.path, whose configuration and tokenizer files are copied into checkpoints.
            run_dir, store: train.run_dir and its checkpoints.
            validator: None without validation.
            num_steps: length of the run; it may end earlier if the trainer is out of data.

        Raises:
            UserError: the checkpoint was written by a run of another model, other data or the other stage.
        """
        self._train = train
        self._checkpoint = checkpoint
        self._validation = validation
        self._model_dir = model_dir
        self._run_dir = run_dir
        self._store = store
        self._learner = learner
        self._trainer = trainer
        self._validator = validator
        self._num_steps = num_steps
        self.step = 0
        self.validated_step: int | None = None
        self._best = BestStep(checkpoint.keep_best)
        self._consecutive_skipped = 0  # steps in a row whose update was not applied
        self._save_is_due = False
        self._save_s = 0.0  # time of the last save, reported with the next step
        self._resume()

    def _resume(self) -> None:
        newest = self._store.latest()
        if newest is None:
            return
        state = self._store.load(newest, self._learner.model, self._learner.optimizer, self._learner.scheduler)
        check_stage(state["stage"], self._train)
        self.step, self._consecutive_skipped = newest, state["skipped_in_a_row"]
        self._trainer.load_state_dict(state["trainer"])
        self.validated_step = state.get("validated_step")
        self._best.load_state_dict(state.get("best", self._best.state_dict()))
        best = self._best.step
        if best is not None and not run_on_first_rank(lambda: self._store.path(best).is_dir()):
            logger.warning("the best checkpoint, of step %d, is gone: the next validation starts over", best)
            self._best = BestStep(self._checkpoint.keep_best)
        logger.info("resumed from %s", self._store.path(newest))

    def run(self, lifecycle: Lifecycle, reporter: Reporter, profile: StepProfile) -> int:
        """Do all remaining steps.

        Returns:
            0, or `EXIT_STOPPED_BY_SIGNAL` if a stop signal ended the run, after a checkpoint of the last step.

        Raises:
            TrainingStopped: too many steps in a row had a loss or a gradient that is not finite, or the trainer cannot
                continue.
        """
        if self._stops_early():
            logger.info(
                "finished: stopped early after step %d; raise or unset validation.patience to continue", self.step
            )
        elif self._is_finished():
            logger.info(
                "finished: step %d was the last one; raise train.num_steps or num_epochs to continue", self.step
            )
        lifecycle.expect_progress()
        if self._checkpoint.export == "always" and self.step > 0:
            self._export_unless_done()  # the last start may have ended between the checkpoint and its export
        # The initial model, or the step of the checkpoint if a stop signal came before or during its validation.
        if self._validation_is_due():
            logger.info("validating the model of step %d", self.step)
            if not self._validate(lifecycle, reporter, may_be_best=self.step > 0):
                # There is nothing to save. No step may follow, either: colocated servers may still have the GPU memory.
                self._store.finish()
                logger.info("validation stopped by a signal; run the same command again to repeat it")
                return EXIT_STOPPED_BY_SIGNAL
            # The checkpoint of this step exists already. If the run is finished, nothing stores the outcome: another
            # start of the finished run validates once more.
            self._save_is_due = False
        if not self._is_finished():
            logger.info("step %d starts", self.step + 1)
        while not self._is_finished():
            lifecycle.expect_progress()
            profile.next_step()
            result = self._do_step(reporter)
            self._abort_if_not_finite(result)
            is_stopping = self._agree_to_stop(lifecycle)
            # Before the checkpoint, whose state contains the best step. A stop signal leaves no time for a validation:
            # the next start repeats it.
            if self._validation_is_due() and not is_stopping:
                is_stopping = not self._validate(lifecycle, reporter, may_be_best=result.applied)
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
        if self._checkpoint.export in ("end", "best"):
            self._export_unless_done()
        return 0

    def _is_finished(self) -> bool:
        return self.step >= self._num_steps or self._trainer.is_out_of_data or self._stops_early()

    def _stops_early(self) -> bool:
        patience = self._validation.patience
        return patience is not None and self._best.num_worse >= patience

    def _validation_is_due(self) -> bool:
        if self._validator is None or self.step == self.validated_step:
            return False
        return self.step % self._validation.every_steps == 0 or self._is_finished()

    @timeline.span("validation")
    def _validate(self, lifecycle: Lifecycle, reporter: Reporter, *, may_be_best: bool) -> bool:
        """Validate the policy's present weights, and note whether it is the best so far.

        Args:
            may_be_best: False for weights that get no checkpoint of their own.

        Returns:
            Whether the validation is complete: False if a stop signal ended it.
        """
        assert self._validator is not None
        start = time.perf_counter()

        def is_stopping() -> bool:
            lifecycle.expect_progress()
            return self._agree_to_stop(lifecycle)

        result = self._validator.run(self._trainer.engine_with_policy(), self.step, is_stopping=is_stopping)
        if result is None:
            return False
        self.validated_step = self.step
        keep_best, note = self._checkpoint.keep_best, ""
        if keep_best is not None and may_be_best and self._best.update(self.step, result.metrics.get(keep_best)):
            self._save_is_due, note = True, f"; best {keep_best} so far"
        reporter.report_validation(self.step, result, time.perf_counter() - start, note=note)
        if self._stops_early():
            logger.info("early stop: %d validations in a row without a better %s", self._best.num_worse, keep_best)
        return True

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
            "validated_step": self.validated_step,
            "best": self._best.state_dict(),
        }
        learner = self._learner
        learner.wait_for_parameters()
        self._store.save(
            self.step,
            learner.model,
            learner.optimizer,
            learner.scheduler,
            state,
            self._model_dir,
            best_step=self._best.step,
        )
        if self._checkpoint.export == "always":
            self._store.finish()
            self._export()
        self._save_is_due = False
        self._save_s = time.perf_counter() - start

    def _export(self) -> None:
        """Export a checkpoint as a Hugging Face directory, replacing an earlier export of that name."""
        step = self._step_to_export()
        directory = self._run_dir.export_dir(step, self._checkpoint.export)
        run_on_first_rank(lambda: self._run_dir.remove_old_export(directory))
        export_checkpoint(self._store.path(step), directory)
        run_on_first_rank(lambda: self._run_dir.note_export(step, directory))
        logger.info("exported: step %d to %s", step, directory)

    def _step_to_export(self) -> int:
        """Return the newest step, or the best one if checkpoint.export asks for it."""
        if self._checkpoint.export != "best":
            return self.step
        if self._best.step is None:
            logger.warning("no validation has a value of %s: the last step is exported", self._checkpoint.keep_best)
        return self._best.step if self._best.step is not None else self.step

    def _export_unless_done(self) -> None:
        step = self._step_to_export()
        directory = self._run_dir.export_dir(step, self._checkpoint.export)
        if not run_on_first_rank(lambda: self._run_dir.is_exported(step, directory)):
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
