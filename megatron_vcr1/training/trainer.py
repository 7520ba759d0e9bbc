"""The interface that the training loop expects of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.training.metrics import Metrics


@dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of a training step, apart from its metrics.

    Attributes:
        applied: False if an update was skipped because its loss or gradient norm was not finite.
        loss, grad_norm: over all ranks; the mean if the step has several updates.
        learning_rate: the rate that the updates used.
        samples: ids of the samples that this replica trained on.
        rollouts: rows of rollouts/step_N.jsonl by their prompt's position; on replica leaders, empty on other ranks.
    """

    applied: bool
    loss: float
    grad_norm: float
    learning_rate: float
    samples: tuple[str, ...]
    rollouts: Mapping[int, dict[str, Any]] = field(default_factory=dict)


class Trainer(Protocol):
    """A GRPO or SFT trainer. All ranks of the job must call the methods together."""

    def step(self, step: int, metrics: Metrics) -> StepResult:
        """Do a training step.

        Args:
            step: number of the step, counted from 1.
            metrics: the trainer adds the metrics of the step to it.
        """
        ...

    def engine_with_policy(self) -> RolloutEngine:
        """Return the engine of the run, which generates with the policy's present weights until the next step.

        Every rank of the job takes part in the weight sync. Called only if the run has validation.
        """
        ...

    @property
    def is_out_of_data(self) -> bool:
        """Whether train.num_epochs passes over the data are done, possibly in fewer steps than planned."""
        ...

    def take_skipped(self) -> list[SkippedSample]:
        """Return the samples that could not be read since the last call; on replica leaders, empty on other ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from, as JSON values. Checkpoints store the state of rank 0."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, whose weights are loaded already.

        Raises:
            UserError: the checkpoint was written with other data.
        """
        ...

    def close(self) -> None:
        """Release engines and end processes."""
        ...


class TrainingStopped(RuntimeError):
    """The run cannot continue sensibly; the message says why and what to do. Earlier checkpoints remain valid."""
