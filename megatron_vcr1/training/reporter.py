"""The reporter: records each step's metrics, rollouts and skipped samples, and shows the metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.training.metrics import Metrics, device_name, peak_memory_gb, throughput
from megatron_vcr1.training.run_dir import VALIDATION_PREFIX, RunDir
from megatron_vcr1.training.sinks import Sink
from megatron_vcr1.training.trainer import StepResult
from megatron_vcr1.training.validation import ValidationResult

logger = logging.getLogger(__name__)


class Reporter:
    """Writes a step's outcome to the run directory and to the metric sinks.

    A context manager. All ranks of the job must enter it and call `report` together; only rank 0 writes.
    """

    def __init__(self, run_dir: RunDir, open_sinks: Callable[[], list[Sink]], *, mismatch_threshold: float) -> None:
        """
        Args:
            open_sinks: prepares the run directory and opens the sinks. Called on rank 0 when the reporter is entered.
            mismatch_threshold: logging.mismatch_threshold.
        """
        self._run_dir = run_dir
        self._open_sinks = open_sinks
        self._mismatch_threshold = mismatch_threshold
        self._sinks: list[Sink] = []

    def __enter__(self) -> Self:
        """Open the sinks. Raises UserError or OSError, on all ranks."""
        run_on_first_rank(self._open)
        return self

    def _open(self) -> None:
        self._sinks = self._open_sinks()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # closes every sink, in reverse order, even if another one fails
            for sink in self._sinks:
                stack.callback(sink.close, failed=error is not None)

    def report(self, step: int, result: StepResult, metrics: Metrics, skipped: list[SkippedSample]) -> None:
        """Record and show a step.

        Args:
            metrics: this rank's metrics of the step; they are reduced over all ranks here.
            skipped: samples that could not be read, on replica leaders.
        """
        metrics.update_max("memory/peak_gb", peak_memory_gb())
        metrics.add_to_sum("skipped_samples", len(skipped))
        reduced = metrics.reduce()
        row = {
            "step": step,
            "loss": result.loss,
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            "update_skipped": int(not result.applied),
            **reduced,
            **throughput(reduced, dist.get_world_size(), device_name()),
        }
        rollouts = {
            position: rollout
            for rank_rollouts in collectives.gather_objects(result.rollouts)
            for position, rollout in rank_rollouts.items()
        }
        all_skipped = [
            (sample.id, sample.reason)
            for rank_skipped in collectives.gather_objects(skipped)
            for sample in rank_skipped
        ]
        if mesh.is_first_rank():
            if rollouts:
                self._run_dir.write_rollouts(step, [rollout for _, rollout in sorted(rollouts.items())])
            self._run_dir.add_skipped(step, all_skipped)
            self._run_dir.add_metrics(row)
            for sink in self._sinks:
                sink.step(step, row)
            self._warn_about_mismatch(step, reduced)

    def report_validation(self, step: int, result: ValidationResult, seconds: float, *, note: str = "") -> None:
        """Record and show a validation.

        Args:
            step: training steps done.
            seconds: its duration.
            note: ends the line of the log.
        """
        if not mesh.is_first_rank():
            return
        values = {f"{VALIDATION_PREFIX}{name}": value for name, value in result.metrics.items()}
        self._run_dir.add_metrics({"step": step, **values, "time/validation_s": seconds})
        for label, id, reason in result.unanswered:
            self._run_dir.add_skipped(step, [(id, reason)], benchmark=label)
            logger.warning("validation at step %d: %s: sample %s counts as wrong: %s", step, label, id, reason)
        for sink in self._sinks:
            sink.validation(step, {**values, "time/validation_s": seconds}, result.shown)
        # The counts and the lenient readings are in metrics.jsonl.
        names = [name for name in result.metrics if "/num_" not in name and not name.endswith(" (lenient)")]
        shown = ", ".join(f"{name} {result.metrics[name]:.4g}" for name in names)
        logger.info("validation at step %d: %s (%.1f s)%s", step, shown, seconds, note)

    def _warn_about_mismatch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn if the log-probs of the rollout engine and of training differ too much."""
        difference = metrics.get("mismatch/mean_abs", 0.0)
        if difference <= self._mismatch_threshold:  # NaN compares false, so it also warns
            return
        lag = "; part of it comes from the older policy that sampled the responses" if metrics.get("policy_lag") else ""
        logger.warning(
            "step %d: log-probs of rollout and training differ by %.3g on average, more than "
            "logging.mismatch_threshold = %g. Possible causes: old weights in the engine, different arithmetic, or "
            "different positions of the same tokens%s",
            step,
            difference,
            self._mismatch_threshold,
            lag,
        )
