"""A step's groups: prompts to the engine, its responses to rewards, rewards to advantages."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import row_from_sample
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rewards import RewardBreakdown
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.training.grpo.advantages import group_advantages, has_reward_variance
from megatron_vcr1.training.grpo.rewarding import Response, Rewarder
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.training.trainer import TrainingStopped
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The responses to a prompt with what they are worth; one entry each in the tuples.

    Attributes:
        advantages: None for a response without a reward, which is not trained on.
        has_reward_variance: its rewards are not all equal.
    """

    prompt: DrawnPrompt
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    rewards: tuple[RewardBreakdown, ...]
    advantages: tuple[float | None, ...]
    has_reward_variance: bool

    @property
    def scored(self) -> list[int]:
        """Indices of the responses that are trained on."""
        return [index for index, advantage in enumerate(self.advantages) if advantage is not None]


@dataclass(frozen=True, slots=True)
class StepGroups:
    """What was sampled for a step, in the order of the prompts.

    Attributes:
        kept: to be trained on.
        dropped: without a signal, or more than the step needs; dynamic sampling only.
    """

    kept: tuple[ScoredGroup, ...]
    dropped: tuple[ScoredGroup, ...] = ()


class Rollouts:
    """Makes the groups of this copy of the model. Its ranks call the methods together and get the same groups."""

    def __init__(
        self,
        config: RunConfig,
        engine: RolloutEngine,
        stream: PromptStream,
        processor: PromptProcessor,
        rewarder: Rewarder,
    ) -> None:
        self._config = config
        self._engine = engine
        self._stream = stream
        self._processor = processor
        self._rewarder = rewarder
        rollout = config.rollout
        self.sampling = SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.stop
        )

    def draw(self, metrics: Metrics, number: int | None = None) -> list[DrawnPrompt]:
        """The next prompts of this copy of the model: as many as a step takes, or `number`."""
        with metrics.timed("decode"):
            return self._stream.take(number or self._config.train.prompts_per_step // mesh.num_replicas())

    def requests(self, prompts: Sequence[DrawnPrompt]) -> list[GenerationRequest]:
        """What the engine is asked. A prompt's seed depends on the run's seed and on its position alone, so that the
        number of copies changes nothing.
        """
        seed, num_responses = self._config.train.seed, self._config.grpo.group_size
        return [
            GenerationRequest(one.id, one.prompt, num_responses, _sampling_seed(seed, one.position)) for one in prompts
        ]

    def sample(self, prompts: Sequence[DrawnPrompt], metrics: Metrics) -> list[RolloutGroup]:
        """The engine's answers to prompts, in order. Raises EngineError if it cannot go on."""
        with metrics.timed("rollout"):
            return self._engine.generate(self.requests(prompts), self.sampling)

    def score(
        self, prompts: Sequence[DrawnPrompt], answers: Sequence[RolloutGroup], metrics: Metrics
    ) -> list[ScoredGroup]:
        """Rewards and advantages; counts what the metrics say of them.

        Raises:
            TrainingStopped: the judge failed too often.
        """
        with metrics.timed("judge"):
            texts = [[self._processor.decode(one.token_ids) for one in answer.rollouts] for answer in answers]
            responses = [
                Response(prompt.sample, prompt.source, text, rollout)
                for prompt, answer, of_prompt in zip(prompts, answers, texts, strict=True)
                for rollout, text in zip(answer.rollouts, of_prompt, strict=True)
            ]
            rewards = iter(collectives.broadcast_within_replica(lambda: self._rewarder.rewards(responses)))
        groups = [
            self._group(prompt, answer, of_prompt, tuple(next(rewards) for _ in of_prompt))
            for prompt, answer, of_prompt in zip(prompts, answers, texts, strict=True)
        ]
        if mesh.is_replica_leader():
            _count(groups, metrics)
            _count_cached(prompts, answers, metrics)
        self._check_judge(groups)
        return groups

    def refill(self, groups: list[ScoredGroup], metrics: Metrics) -> StepGroups:
        """With dynamic sampling: drop groups without a signal and sample further prompts, until there are enough.

        Kept are the first prompts_per_step with a signal, in the order of their prompts, whichever copies of the model
        have them; after grpo.max_refills rounds the step goes on with fewer. Without dynamic sampling all are kept.
        """
        if not self._config.grpo.dynamic_sampling:
            return StepGroups(tuple(groups))
        wanted, num_replicas = self._config.train.prompts_per_step, mesh.num_replicas()
        for refills in range(self._config.grpo.max_refills + 1):
            positions = all_positions([group for group in groups if group.has_reward_variance])
            if len(positions) >= wanted or refills == self._config.grpo.max_refills:
                break
            prompts = self.draw(metrics, -(-(wanted - len(positions)) // num_replicas))
            groups = groups + self.score(prompts, self.sample(prompts, metrics), metrics)
        if len(positions) < wanted:
            logger.info(
                "dynamic sampling: %d of %d groups have a signal after %d refills (grpo.max_refills); the step goes on",
                len(positions),
                wanted,
                self._config.grpo.max_refills,
            )
        used = set(positions[:wanted])
        kept = tuple(group for group in groups if group.prompt.position in used)
        dropped = tuple(group for group in groups if group.prompt.position not in used)
        return StepGroups(kept, dropped)

    def _group(
        self,
        prompt: DrawnPrompt,
        answer: RolloutGroup,
        texts: Sequence[str],
        rewards: tuple[RewardBreakdown, ...],
    ) -> ScoredGroup:
        totals = [reward.total for reward in rewards]
        advantages = group_advantages(totals, divide_by_std=self._config.grpo.divide_by_std)
        return ScoredGroup(prompt, answer.rollouts, tuple(texts), rewards, advantages, has_reward_variance(totals))

    def _check_judge(self, groups: Sequence[ScoredGroup]) -> None:
        """Raises TrainingStopped if too many captions of all copies are without a verdict."""
        captions = [one for group in groups if group.prompt.sample.task == Task.CAPTIONING for one in group.rewards]
        mine = [sum(one.total is None for one in captions), len(captions)] if mesh.is_replica_leader() else [0, 0]
        num_unscored, num_captions = collectives.sum_over_ranks(mine)
        limit = self._config.judge.max_unscored_fraction
        if num_unscored > limit * num_captions:
            raise TrainingStopped(
                f"the judge gave no verdict on {num_unscored:.0f} of {num_captions:.0f} captions of a step, more than "
                f"judge.max_unscored_fraction = {limit} allows; is {self._config.judge.base_url} up? Start the run "
                "again to resume from its last checkpoint"
            )


def all_positions(groups: Sequence[ScoredGroup]) -> list[int]:
    """The positions of the groups of all copies of the model, in ascending order, on every rank."""
    mine = [group.prompt.position for group in groups] if mesh.is_replica_leader() else []
    return sorted(position for some in collectives.gather_objects(mine) for position in some)


def rollout_row(step: int, group: ScoredGroup, *, thinking: bool, trained: bool) -> dict[str, Any]:
    """A line of rollouts/step_N.jsonl."""
    responses = [
        {
            "text": text,
            "num_tokens": len(rollout.token_ids),
            "finish_reason": str(rollout.finish_reason),
            "advantage": advantage,
            "reward": {
                "format": reward.format,
                "iou": reward.iou,
                "accuracy": reward.accuracy,
                "recall": reward.recall,
                "total": reward.total,
                "reasons": dict(reward.reasons),
                "extra": dict(reward.extra),
            },
        }
        for text, rollout, advantage, reward in zip(
            group.texts, group.rollouts, group.advantages, group.rewards, strict=True
        )
    ]
    return {
        "step": step,
        "sample": row_from_sample(group.prompt.sample),
        "reduction": group.prompt.reduction,
        "thinking": thinking,
        "policy_version": group.rollouts[0].policy_version,
        "trained": trained,
        "responses": responses,
    }


def _count(groups: Sequence[ScoredGroup], metrics: Metrics) -> None:
    """What the metrics say of sampled groups, whether they are trained on or not."""
    for group in groups:
        task = group.prompt.sample.task
        metrics.count("groups/zero_variance", int(not group.has_reward_variance))
        metrics.count("downscaled_videos", int(group.prompt.reduction is not None))
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            num_tokens = len(rollout.token_ids)
            metrics.add("response_tokens/mean", num_tokens)
            metrics.high("response_tokens/max", num_tokens)
            metrics.add("truncated_fraction", rollout.finish_reason == FinishReason.LENGTH)
            metrics.count("responses/unscored", int(reward.total is None))
            if reward.total is not None:
                metrics.add("reward/total", reward.total)
            for part, value in _parts(reward):
                if value is not None:
                    metrics.add(f"reward/{task}/{part}", value)
            for part, reason in reward.reasons.items():
                metrics.count(f"zero_rewards/{task}/{part}/{reason}")


def _count_cached(prompts: Sequence[DrawnPrompt], answers: Sequence[RolloutGroup], metrics: Metrics) -> None:
    """The share of the prompts' tokens that the engine had in its cache, where it tells."""
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.cached_tokens is not None:
            num_tokens = len(prompt.prompt.token_ids) * len(answer.cached_tokens)
            metrics.add("cached_prompt_fraction", sum(answer.cached_tokens), num_tokens)


def _parts(reward: RewardBreakdown) -> Iterator[tuple[str, float | None]]:
    yield "total", reward.total
    yield "format", reward.format
    yield "iou", reward.iou
    yield "accuracy", reward.accuracy
    yield "recall", reward.recall
    yield from reward.extra.items()


def _sampling_seed(seed: int, position: int) -> int:
    """31 bits, which every engine takes."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
