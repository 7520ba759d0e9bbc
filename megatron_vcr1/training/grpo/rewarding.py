"""Rewards of sampled responses: the task's rewards, the user's own rewards and the judge's verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.config.training_sections import RewardsSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.judge import Judge, build_judge
from megatron_vcr1.rewards import RewardBreakdown, load_reward, score
from megatron_vcr1.rewards.parsing import UnparsableError, parse_caption
from megatron_vcr1.rewards.scoring import FORMAT
from megatron_vcr1.tasks import task_of
from megatron_vcr1.training.grpo.advantages import overlong_penalty
from megatron_vcr1.types import Rollout, Sample
from megatron_vcr1.user_modules import call_user_code

OVERLONG = "overlong"
"""Name of the overlong penalty among the extra parts of a reward."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response to be rewarded.

    Attributes:
        sample: the sample that its prompt was made from.
        source: index of the sample's source in data.sources.
        text: the decoded response.
        rollout: its tokens.
    """

    sample: Sample
    source: int
    text: str
    rollout: Rollout


class Rewarder:
    """Computes the rewards of responses."""

    def __init__(
        self,
        sources: Sequence[DataSource],
        judge: Judge | None,
        *,
        weights: Mapping[str, float],
        overlong_buffer_tokens: int,
        max_new_tokens: int,
    ) -> None:
        """Load the user's own rewards.

        Args:
            sources: data.sources; each names the user's own rewards and whether its prompts ask for reasoning.
            judge: compares captions. None if no sample needs a judge (see `judge_for_samples`).
            weights: rewards.weights, by name of the part.
            overlong_buffer_tokens: length of the overlong penalty's ramp, in tokens; 0: no penalty.
            max_new_tokens: response limit of the rollout.

        Raises:
            UserError: one of the user's own rewards cannot be loaded.
        """
        self._sources = sources
        self._judge = judge
        self._user_rewards = [[load_reward(name) for name in source.rewards] for source in sources]
        self._weights = weights
        self._overlong_buffer_tokens = overlong_buffer_tokens
        self._max_new_tokens = max_new_tokens

    def rewards(self, responses: Sequence[Response]) -> list[RewardBreakdown]:
        """Return one reward per response, in order. A response that the judge gave no verdict on has no total."""
        values = self._judged_values(responses)
        return [self._reward(response, value) for response, value in zip(responses, values, strict=True)]

    def _judged_values(self, responses: Sequence[Response]) -> list[float | None]:
        """Ask the judge about all responses that it has to read, in one batch.

        The other responses get None, also those without an answer: their part is 0 without a judge.
        """
        values: list[float | None] = [None] * len(responses)
        texts = {
            index: text for index, response in enumerate(responses) if (text := _judged_text(response)) is not None
        }
        if texts and self._judge is not None:
            verdicts = self._judge.recalls([responses[index].sample for index in texts], list(texts.values()))
            for index, verdict in zip(texts, verdicts, strict=True):
                values[index] = verdict
        return values

    def _reward(self, response: Response, judged: float | None) -> RewardBreakdown:
        thinking = self._sources[response.source].thinking
        sample, text = response.sample, response.text
        reward = call_user_code(
            lambda: score(sample, text, thinking=thinking, judged=judged),
            f"sample {sample.id}: the reward of task {sample.task}",
        )
        parts, extra, reasons = dict(reward.parts), dict(reward.extra), dict(reward.reasons)
        for user_reward in self._user_rewards[response.source]:
            name, part = user_reward.part, user_reward(sample, text)
            assert part.value is not None  # UserReward returns numbers only
            if name in parts:
                parts[name] = part.value
                reasons.pop(name, None)
            else:
                extra[name] = part.value
            if part.reason:
                reasons[name] = part.reason
        if self._overlong_buffer_tokens:
            extra[OVERLONG] = overlong_penalty(
                len(response.rollout.token_ids),
                buffer_tokens=self._overlong_buffer_tokens,
                max_new_tokens=self._max_new_tokens,
            )
        return RewardBreakdown(parts, reasons, extra, self._weights)


def check_weights(section: RewardsSection, sources: Sequence[DataSource], samples: Sequence[Sequence[Sample]]) -> None:
    """Check that every weight belongs to a part that some response of the run can have.

    Args:
        sources: data.sources.
        samples: the samples of each source.

    Raises:
        UserError: a weight names an unknown part; names the known ones.
    """
    if not section.weights:
        return
    by_task = {sample.task: sample for source_samples in samples for sample in source_samples}
    known = {FORMAT: None, OVERLONG: None}
    for sample in by_task.values():
        where = f"sample {sample.id}: the reward of task {sample.task}"
        known |= dict.fromkeys(call_user_code(partial(task_of(sample).reward_parts, sample, "", None), where))
    known |= {load_reward(name).part: None for source in sources for name in source.rewards}
    if unknown := [name for name in section.weights if name not in known]:
        raise UserError(
            f"rewards.weights: no reward of the run has a part {unknown[0]!r}; the parts are {', '.join(known)}"
        )


def judge_for_samples(section: JudgeSection, samples: Sequence[Sequence[Sample]], cache_dir: Path) -> Judge | None:
    """Build the judge if any sample needs one; return None otherwise.

    Args:
        samples: the samples of each source.
        cache_dir: folder for the verdicts of a language model, unless the settings name one.

    Raises:
        UserError: the judge's client is not installed or its API key is missing.
    """
    needed = any(task_of(sample).needs_judge(sample) for source_samples in samples for sample in source_samples)
    return build_judge(section, cache_dir) if needed else None


def _judged_text(response: Response) -> str | None:
    """Return the answer that a judge has to read; None if the sample needs no judge, or there is no answer."""
    if not task_of(response.sample).needs_judge(response.sample):
        return None
    try:
        return parse_caption(response.text)
    except UnparsableError:
        return None
