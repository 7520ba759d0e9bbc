"""Scored groups: the responses to a prompt with their rewards and advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.rows import row_from_sample
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rewards import RewardBreakdown
from megatron_vcr1.tasks import task_of
from megatron_vcr1.training.grpo.advantages import group_advantages, has_reward_variance
from megatron_vcr1.training.grpo.rewarding import Response, Rewarder
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.prompts import DrawnPrompt
from megatron_vcr1.training.trainer import TrainingStopped
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A prompt and its responses; the tuples have one entry per response.

    Attributes:
        texts: the decoded responses.
        advantages: None for a response without a reward; it is not trained on.
        has_reward_variance: whether the rewards differ, so that not all advantages are 0.
    """

    prompt: DrawnPrompt
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    rewards: tuple[RewardBreakdown, ...]
    advantages: tuple[float | None, ...]
    has_reward_variance: bool

    @property
    def scored_indices(self) -> list[int]:
        """Indices of the responses that have an advantage and can be trained on."""
        return [index for index, advantage in enumerate(self.advantages) if advantage is not None]


class GroupScorer:
    """Turns the engine's responses into scored groups. All ranks of the job must call `score` together."""

    def __init__(
        self, rewarder: Rewarder, processor: PromptProcessor, judge: JudgeSection, *, divide_by_std: bool
    ) -> None:
        """
        Args:
            judge: its max_unscored_fraction limits how many captions may remain without a verdict.
            divide_by_std: whether advantages are divided by the group's standard deviation.
        """
        self._rewarder = rewarder
        self._processor = processor
        self._judge = judge
        self._divide_by_std = divide_by_std

    def score(
        self, prompts: Sequence[DrawnPrompt], responses: Sequence[RolloutGroup], metrics: Metrics
    ) -> list[ScoredGroup]:
        """Decode and reward responses, compute their advantages, and add the statistics of the groups to the metrics.

        Args:
            prompts: prompts of this replica.
            responses: the engine's responses to each of them.

        Raises:
            TrainingStopped: the judge gave no verdict on too many captions.
        """
        with metrics.time_phase("judge"):
            texts = [
                tuple(self._processor.decode(rollout.token_ids) for rollout in group.rollouts) for group in responses
            ]
            to_reward = [
                Response(prompt.sample, prompt.source, text, rollout)
                for prompt, group, group_texts in zip(prompts, responses, texts, strict=True)
                for rollout, text in zip(group.rollouts, group_texts, strict=True)
            ]
            # Only the leader computes rewards: the judge and the user's rewards need not be deterministic.
            rewards = iter(collectives.broadcast_within_replica(lambda: self._rewarder.rewards(to_reward)))
        groups = [
            self._scored_group(prompt, group, group_texts, tuple(next(rewards) for _ in group_texts))
            for prompt, group, group_texts in zip(prompts, responses, texts, strict=True)
        ]
        if mesh.is_replica_leader():
            _add_group_metrics(groups, metrics)
            _add_cache_metrics(prompts, responses, metrics)
        self._check_judge(groups)
        return groups

    def _scored_group(
        self, prompt: DrawnPrompt, group: RolloutGroup, texts: tuple[str, ...], rewards: tuple[RewardBreakdown, ...]
    ) -> ScoredGroup:
        totals = [reward.total for reward in rewards]
        advantages = group_advantages(totals, divide_by_std=self._divide_by_std)
        return ScoredGroup(prompt, group.rollouts, texts, rewards, advantages, has_reward_variance(totals))

    def _check_judge(self, groups: Sequence[ScoredGroup]) -> None:
        """Raise TrainingStopped if too many captions, counted over all replicas, have no verdict."""
        judged_groups = [group for group in groups if task_of(group.prompt.sample).needs_judge(group.prompt.sample)]
        captions = [reward for group in judged_groups for reward in group.rewards]
        counts = [sum(reward.total is None for reward in captions), len(captions)]
        num_unscored, num_captions = collectives.sum_over_ranks(counts if mesh.is_replica_leader() else [0, 0])
        limit = self._judge.max_unscored_fraction
        if num_unscored > limit * num_captions:
            raise TrainingStopped(
                f"the judge gave no verdict on {num_unscored:.0f} of {num_captions:.0f} captions of a step, more than "
                f"judge.max_unscored_fraction = {limit} allows. Check that {self._judge.base_url} is up, then run the "
                "same command again to resume from the last checkpoint"
            )


def all_positions(groups: Sequence[ScoredGroup]) -> list[int]:
    """Return the prompt positions of the groups of all replicas, in ascending order, on every rank.

    All ranks of the job must call it.
    """
    local = [group.prompt.position for group in groups] if mesh.is_replica_leader() else []
    return sorted(position for positions in collectives.gather_objects(local) for position in positions)


def rollout_row(step: int, group: ScoredGroup, *, thinking: bool, trained: bool) -> dict[str, Any]:
    """Return a group's row in rollouts/step_N.jsonl.

    Args:
        thinking: whether the prompt asks for reasoning.
        trained: whether the group was part of an update.
    """
    responses = [
        {
            "text": text,
            "num_tokens": len(rollout.token_ids),
            "finish_reason": str(rollout.finish_reason),
            "advantage": advantage,
            "reward": {
                **reward.parts,
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


def _add_group_metrics(groups: Sequence[ScoredGroup], metrics: Metrics) -> None:
    """Add the statistics of sampled groups, including those that dynamic sampling drops later."""
    for group in groups:
        task = group.prompt.sample.task
        metrics.add_to_sum("groups/zero_variance", int(not group.has_reward_variance))
        metrics.add_to_sum("downscaled_videos", int(group.prompt.reduction is not None))
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True):
            num_tokens = len(rollout.token_ids)
            metrics.add_to_mean("response_tokens/mean", num_tokens)
            metrics.update_max("response_tokens/max", num_tokens)
            metrics.add_to_mean("truncated_fraction", rollout.finish_reason == FinishReason.LENGTH)
            metrics.add_to_sum("responses/unscored", int(reward.total is None))
            if reward.total is not None:
                metrics.add_to_mean("reward/total", reward.total)
            for part, value in _reward_parts(reward):
                if value is not None:
                    metrics.add_to_mean(f"reward/{task}/{part}", value)
            for part, reason in reward.reasons.items():
                metrics.add_to_sum(f"zero_rewards/{task}/{part}/{reason}")


def _add_cache_metrics(prompts: Sequence[DrawnPrompt], responses: Sequence[RolloutGroup], metrics: Metrics) -> None:
    """Add the fraction of prompt tokens that the engine found in its prefix cache, if the engine reports it."""
    for prompt, group in zip(prompts, responses, strict=True):
        if group.cached_tokens is not None:
            num_tokens = len(prompt.prompt.token_ids) * len(group.cached_tokens)
            metrics.add_to_mean("cached_prompt_fraction", sum(group.cached_tokens), num_tokens)


def _reward_parts(reward: RewardBreakdown) -> Iterator[tuple[str, float | None]]:
    yield "total", reward.total
    yield from reward.parts.items()
    yield from reward.extra.items()
