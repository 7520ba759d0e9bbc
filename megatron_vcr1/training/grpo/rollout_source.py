"""One step off: the next step's responses are sampled while this one trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, cast

from megatron_vcr1 import timeline
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams, WeightsNeeded
from megatron_vcr1.training.grpo.scoring import Rollouts
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.types import RolloutGroup

logger = logging.getLogger(__name__)


class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that can sample beside the training."""

    def sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """`generate` on the copy's first rank alone, without collectives."""
        ...

    def abort(self) -> None:
        """Stop what is being sampled; nobody wants it any more."""
        ...


class Ahead:
    """The next step's rollouts under way, by a thread of each copy's first rank. All its ranks call the methods."""

    def __init__(self, engine: RolloutEngine, rollouts: Rollouts, stream: PromptStream) -> None:
        """Raises UserError if the engine is the trained model itself, which cannot do both at once."""
        if not (hasattr(engine, "sample") and hasattr(engine, "abort")):
            raise UserError("grpo.one_step_off needs rollout.engine = 'sglang': set that, or turn it off")
        self._engine = cast(BackgroundEngine, engine)
        self._rollouts = rollouts
        self._stream = stream
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._answers: Future[list[RolloutGroup]] | None = None
        self._prompts: list[DrawnPrompt] = []
        self._state_before: dict[str, Any] | None = None
        self._skipped: list[SkippedSample] = []  # by the steps before the prompts under way

    @property
    def is_under_way(self) -> bool:
        return self._state_before is not None

    def start(self, metrics: Metrics) -> None:
        """Draw the next step's prompts, and begin to sample."""
        self._state_before = self._stream.state_dict()
        self._skipped += self._stream.take_skipped()
        self._prompts = self._rollouts.draw(metrics)
        if mesh.is_replica_leader():
            requests = self._rollouts.requests(self._prompts)
            self._answers = self._thread.submit(self._sample, requests)

    def _sample(self, requests: Sequence[GenerationRequest]) -> list[RolloutGroup]:
        with timeline.span("rollout"):  # on the thread's own track: the metrics count what training waits for
            return self._engine.sample(requests, self._rollouts.sampling)

    def finish(self, metrics: Metrics) -> tuple[list[DrawnPrompt], list[RolloutGroup] | None]:
        """The prompts of the last `start` and their answers, when they are there; the wait counts as rollout.

        There are no answers where the engine has lost the weights that it was to sample from: the model has changed
        since, and the engine can only get its present ones.

        Raises:
            EngineError: the engine could not answer; on all ranks of the copy.
        """
        answers: list[RolloutGroup] | None
        with metrics.timed("rollout"):
            try:
                answers = collectives.broadcast_within_replica(self._result)
            except WeightsNeeded as error:
                logger.warning("the next step's responses were not sampled: %s", error)
                answers = None
        self._answers = self._state_before = None
        return self._prompts, answers

    def take_skipped(self) -> list[SkippedSample]:
        """`PromptStream.take_skipped` without those of the prompts under way: they belong to the step that trains on
        these, which a run that goes on from a checkpoint draws again.
        """
        skipped, self._skipped = self._skipped, []
        return skipped if self.is_under_way else skipped + self._stream.take_skipped()

    def stream_state(self) -> dict[str, Any]:
        """The state of the prompts' stream without those that are under way."""
        return self._stream.state_dict() if self._state_before is None else self._state_before

    def close(self) -> None:
        """Leave nothing behind that samples."""
        if self._answers is not None and not self._answers.done():
            self._engine.abort()
        self._thread.shutdown(cancel_futures=True)

    def _result(self) -> list[RolloutGroup]:
        assert self._answers is not None
        return self._answers.result()
