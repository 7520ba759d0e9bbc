"""Rollout sources supply the GRPO trainer with the scored groups of each step."""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.rollout_sections import RolloutSection
from megatron_vcr1.config.training_sections import GrpoSection, TrainSection
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.training.grpo.scoring import GroupScorer, ScoredGroup, all_positions
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.types import RolloutGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepGroups:
    """This replica's groups of a step, in the order of their prompts.

    Attributes:
        kept: groups to train on.
        dropped: groups that dynamic sampling rejected: they have no reward variance, or the step has enough groups.
    """

    kept: tuple[ScoredGroup, ...]
    dropped: tuple[ScoredGroup, ...] = ()


class RolloutSource(ABC):
    """Supplies every training step with scored groups of responses.

    A source owns the prompt stream, the rollout engine, dynamic sampling and the weight sync between the trained model
    and the engine. Subclasses decide when responses are sampled: see `SynchronousSource` and
    `one_step_off.OneStepOffSource`.

    All ranks of the job must call the methods together and in the same order. The ranks of a replica get the same
    groups.
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
    ) -> None:
        """Sync the initial weights to the engine.

        Args:
            policy: the trained model, with the weights that training starts from.
        """
        self._engine = engine
        self._policy = policy
        self._stream = stream
        self._scorer = scorer
        self._train = train
        self._grpo = grpo
        self._sampling_params = SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.stop
        )
        # Limit on the prompts of all replicas, if the length of the run is given in epochs.
        self._max_prompts = math.ceil(train.num_epochs * stream.epoch_size) if train.num_steps is None else None
        self._num_used_prompts = 0  # by all replicas; does not count prompts that are being sampled in the background
        self._policy_version = 0
        # Servers that the user started may hold other weights, and servers of an imported model start without weights.
        self._engine.update_weights(stream_hf_tensors(policy), self._policy_version)

    @property
    def policy_version(self) -> int:
        """Number of training steps that led to the policy's present weights."""
        return self._policy_version

    @property
    def is_exhausted(self) -> bool:
        """Whether the run has used train.num_epochs passes over the data.

        With dynamic sampling a step uses more prompts than it trains on, so such a run has fewer steps.
        """
        return self._max_prompts is not None and self._num_used_prompts >= self._max_prompts

    @abstractmethod
    def next_groups(self, step: int, metrics: Metrics) -> StepGroups:
        """Return the groups that a step trains on. Call it before the first update of the step.

        Args:
            step: number of the step, counted from 1.

        Raises:
            EngineError: the engine cannot sample.
            TrainingStopped: the judge failed too often.
        """

    @abstractmethod
    def policy_updated(self, version: int, metrics: Metrics) -> None:
        """Note that the policy's weights now have `version`. Call it after the last update of a step."""

    @abstractmethod
    def engine_with_policy(self) -> RolloutEngine:
        """Return the engine for validation between two steps. See `Trainer.engine_with_policy`."""

    def take_skipped(self) -> list[SkippedSample]:
        """Return the samples that could not be read since the last call; on replica leaders, empty on other ranks."""
        return self._stream.take_skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return the prompt stream's position and the policy version, as JSON values."""
        return {"prompts": self._stream_state(), "policy_version": self._policy_version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, whose weights the policy must hold already, and sync them to the engine."""
        self._stream.load_state_dict(state["prompts"])
        self._num_used_prompts = self._stream.num_drawn
        self._policy_version = state["policy_version"]
        self._engine.update_weights(stream_hf_tensors(self._policy), self._policy_version)

    def close(self) -> None:
        """Stop the decoding processes and release the engine's servers, processes and memory."""
        self._stream.close()
        self._engine.close()

    def _stream_state(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def _sync_weights(self, metrics: Metrics) -> None:
        """Make the engine sample from the policy's present weights. Every rank of the job takes part."""
        with metrics.time_phase("sync"):
            self._engine.update_weights(stream_hf_tensors(self._policy), self._policy_version)

    def _draw_prompts(self, metrics: Metrics, number: int | None = None) -> list[DrawnPrompt]:
        """Return this replica's next prompts: `number`, or as many as a step needs."""
        with metrics.time_phase("decode"):
            return self._stream.take(number or self._train.prompts_per_step // mesh.num_replicas())

    def _requests(self, prompts: Sequence[DrawnPrompt]) -> list[GenerationRequest]:
        """Return the engine's requests for prompts.

        The sampling seed of a prompt depends only on the run's seed and the prompt's position, so the responses do not
        depend on the number of replicas.
        """
        return [
            GenerationRequest(
                prompt.id, prompt.prompt, self._grpo.group_size, _sampling_seed(self._train.seed, prompt.position)
            )
            for prompt in prompts
        ]

    def _generate(self, prompts: Sequence[DrawnPrompt], metrics: Metrics) -> list[RolloutGroup]:
        """Sample the responses to prompts, in their order, and wait for them. Raises EngineError."""
        with metrics.time_phase("rollout"):
            return self._engine.generate(self._requests(prompts), self._sampling_params)

    def _complete_step(
        self, prompts: Sequence[DrawnPrompt], responses: Sequence[RolloutGroup], metrics: Metrics
    ) -> StepGroups:
        """Score a step's first responses and refill them with dynamic sampling."""
        groups = self._refill(self._scorer.score(prompts, responses, metrics), metrics)
        self._num_used_prompts = self._stream.num_drawn
        return groups

    def _refill(self, groups: list[ScoredGroup], metrics: Metrics) -> StepGroups:
        """With dynamic sampling, replace groups without reward variance by groups of new prompts (DAPO).

        The step keeps the first train.prompts_per_step groups with reward variance, in the order of their prompts'
        positions, whichever replicas have them. After grpo.max_refills rounds it continues with fewer. Without dynamic
        sampling all groups are kept.
        """
        if not self._grpo.dynamic_sampling:
            return StepGroups(tuple(groups))
        needed, max_refills = self._train.prompts_per_step, self._grpo.max_refills
        for refill in range(max_refills + 1):
            # Gathered over all ranks, so every rank takes the same decision to stop or to sample once more.
            positions = all_positions([group for group in groups if group.has_reward_variance])
            if len(positions) >= needed or refill == max_refills:
                break
            prompts = self._draw_prompts(metrics, math.ceil((needed - len(positions)) / mesh.num_replicas()))
            groups = groups + self._scorer.score(prompts, self._generate(prompts, metrics), metrics)
        if len(positions) < needed:
            logger.info(
                "dynamic sampling: %d of %d groups have reward variance after %d refills (grpo.max_refills); "
                "the step continues with these",
                len(positions),
                needed,
                max_refills,
            )
        kept_positions = set(positions[:needed])
        kept = tuple(group for group in groups if group.prompt.position in kept_positions)
        dropped = tuple(group for group in groups if group.prompt.position not in kept_positions)
        return StepGroups(kept, dropped)


class SynchronousSource(RolloutSource):
    """Samples each step's responses at the start of the step, from the policy that the step trains."""

    def next_groups(self, step: int, metrics: Metrics) -> StepGroups:
        """Draw the step's prompts, sample responses to them and wait. See `RolloutSource.next_groups`."""
        prompts = self._draw_prompts(metrics)
        return self._complete_step(prompts, self._generate(prompts, metrics), metrics)

    def policy_updated(self, version: int, metrics: Metrics) -> None:
        """Sync the new weights to the engine at once: the next step samples from them."""
        self._policy_version = version
        self._sync_weights(metrics)

    def engine_with_policy(self) -> RolloutEngine:
        """Return the engine, which has the policy's weights at all times between two steps."""
        return self._engine


def _sampling_seed(seed: int, position: int) -> int:
    """Hash the run's seed and a prompt's position to 31 bits, a seed that every engine accepts."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
