"""What a trainer is to the loop that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.training.metrics import Metrics


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a step, beside its metrics.

    Attributes:
        applied: False if an update was skipped because its loss or gradient was not finite.
        loss, grad_norm: over all ranks; of several updates, the mean.
        learning_rate: of its updates.
        samples: ids of what this copy of the model trained on.
        rollouts: rows for rollouts/step_N.jsonl by the prompt's position, on the copy's first rank.
    """

    applied: bool
    loss: float
    grad_norm: float
    learning_rate: float
    samples: tuple[str, ...]
    rollouts: Mapping[int, dict[str, Any]] = field(default_factory=dict)


class Trainer(Protocol):
    """GRPO or SFT. The ranks of the job call the methods together."""

    def step(self, step: int, metrics: Metrics) -> StepResult:
        """Take the run one step on; `step` counts from 1."""
        ...

    @property
    def is_out_of_data(self) -> bool:
        """Whether the run has had its passes over the data, though not all of its steps."""
        ...

    def take_skipped(self) -> list[SkippedSample]:
        """Samples that could not be used since the last call, on the first rank of this copy of the model."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values that `load_state_dict` goes on from; those of the job's first rank count."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """Give back engines and processes."""
        ...


class TrainingStopped(RuntimeError):
    """The run cannot go on in earnest; the message says why, and what can be done. Earlier checkpoints stand."""
