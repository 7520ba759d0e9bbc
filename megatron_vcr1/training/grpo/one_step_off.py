"""One step off: a thread samples the next step's responses while the current step trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, cast

from megatron_vcr1 import timeline
from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.rollout_sections import RolloutSection
from megatron_vcr1.config.training_sections import GrpoSection, TrainSection
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams, WeightsNeeded
from megatron_vcr1.training.grpo.rollout_source import RolloutSource, StepGroups
from megatron_vcr1.training.grpo.scoring import GroupScorer
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.types import RolloutGroup

logger = logging.getLogger(__name__)


class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that can sample in a background thread while the main thread trains."""

    def sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """Do what `generate` does, but on the replica leader alone and without collectives."""
        ...

    def abort(self) -> None:
        """Stop the sampling in progress; its result is no longer needed."""
        ...


class OneStepOffSource(RolloutSource):
    """Samples the responses of step N + 1 while step N trains, from the policy before step N's updates.

    Weights are synced *before* the updates of a step, and sampling starts right after that. The engine then holds a
    fixed copy of the policy while training changes the model. The first step of a run, and the first one after a
    resume, find nothing in progress and sample synchronously.

    The thread runs on replica leaders only and calls no collectives: those of the main thread would interleave with
    them. The main thread shares the result with the other ranks in `_finish_sampling`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: VideoLanguageModel,
        stream: PromptStream,
        scorer: GroupScorer,
        *,
        train: TrainSection,
        grpo: GrpoSection,
        rollout: RolloutSection,
        num_steps: int,
    ) -> None:
        """Sync the initial weights to the engine, as `RolloutSource` does.

        Args:
            num_steps: length of the run; nothing is sampled during its last step.
        """
        super().__init__(engine, policy, stream, scorer, train=train, grpo=grpo, rollout=rollout)
        # `check_grpo_settings` has refused the in-process engine, which cannot sample while its model is trained.
        self._background_engine = cast(BackgroundEngine, engine)
        self._num_steps = num_steps
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._prompts: list[DrawnPrompt] = []  # prompts that are being sampled
        self._responses: Future[list[RolloutGroup]] | None = None  # their responses, on replica leaders
        self._state_before: dict[str, Any] | None = None  # the stream's state before these prompts; None: no sampling
        self._skipped: list[SkippedSample] = []  # samples skipped before these prompts were drawn

    def next_groups(self, step: int, metrics: Metrics) -> StepGroups:
        """Wait for the step's responses, then start to sample those of the next step.

        See `RolloutSource.next_groups`.
        """
        if self._is_sampling:
            prompts, responses = self._finish_sampling(metrics)
            # A weight sync is a collective of the whole job: if one replica needs it, all of them take part.
            if any(collectives.gather_objects(responses is None)):
                self._sync_weights(metrics)
        else:
            prompts, responses = self._draw_prompts(metrics), None
        if responses is None:
            responses = self._generate(prompts, metrics)
        groups = self._complete_step(prompts, responses, metrics)
        if step < self._num_steps and not self.is_exhausted:
            self._sync_weights(metrics)
            self._start_sampling(metrics)
        return groups

    def policy_updated(self, version: int, metrics: Metrics) -> None:
        """Record the new version, but sync no weights: the engine needs the old ones until its sampling has ended."""
        self._policy_version = version

    def engine_with_policy(self) -> RolloutEngine:
        """Wait for the responses in progress, which the next step will train on, and sync the weights."""
        if self._responses is not None:
            wait([self._responses])  # an error in it is raised by the next step
        self._engine.update_weights(stream_hf_tensors(self._policy), self._policy_version)
        return self._engine

    @property
    def _is_sampling(self) -> bool:
        return self._state_before is not None

    def _start_sampling(self, metrics: Metrics) -> None:
        """Draw the next step's prompts and let the thread sample the responses to them."""
        self._state_before = self._stream.state_dict()
        self._skipped += self._stream.take_skipped()
        self._prompts = self._draw_prompts(metrics)
        if mesh.is_replica_leader():
            self._responses = self._executor.submit(self._sample, self._requests(self._prompts))

    def _sample(self, requests: Sequence[GenerationRequest]) -> list[RolloutGroup]:
        # Recorded on the thread's own track of a profile. The metric time/rollout_s counts only the time that the main
        # thread waits.
        with timeline.span("rollout"):
            return self._background_engine.sample(requests, self._sampling_params)

    def _finish_sampling(self, metrics: Metrics) -> tuple[list[DrawnPrompt], list[RolloutGroup] | None]:
        """Wait for the responses in progress and share them within the replica.

        Returns:
            The prompts and their responses. The responses are None if the engine lost the weights that it sampled from:
            the model has changed since, so the engine can only get the present weights.

        Raises:
            EngineError: the engine could not sample; on all ranks of the replica.
        """
        responses: list[RolloutGroup] | None
        with metrics.time_phase("rollout"):
            try:
                responses = collectives.broadcast_within_replica(self._wait_for_responses)
            except WeightsNeeded as error:
                logger.warning("the responses of this step could not be sampled ahead and are sampled now: %s", error)
                responses = None
        self._responses = self._state_before = None
        return self._prompts, responses

    def _wait_for_responses(self) -> list[RolloutGroup]:
        assert self._responses is not None
        return self._responses.result()

    def take_skipped(self) -> list[SkippedSample]:
        """Return the skipped samples of finished steps.

        Samples that were skipped while the prompts in progress were drawn belong to the step that trains on these
        prompts: a run that resumes from a checkpoint draws them again.
        """
        skipped, self._skipped = self._skipped, []
        return skipped if self._is_sampling else skipped + self._stream.take_skipped()

    def _stream_state(self) -> dict[str, Any]:
        """Return the stream's state without the prompts in progress: a resumed run draws and samples them again."""
        return self._stream.state_dict() if self._state_before is None else self._state_before

    def close(self) -> None:
        """Abort the sampling in progress, end the thread and release the stream and the engine."""
        if self._responses is not None and not self._responses.done():
            self._background_engine.abort()
        self._executor.shutdown(cancel_futures=True)  # waits for the thread
        super().close()
