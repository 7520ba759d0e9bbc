"""Rewards of sampled responses: the task's rewards, the user's own rewards and the judge's verdicts on captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.judge import Judge, build_judge
from megatron_vcr1.rewards import RewardBreakdown, load_reward, score
from megatron_vcr1.rewards.parsing import UnparsableError, parse_caption
from megatron_vcr1.tasks import task_of
from megatron_vcr1.training.grpo.advantages import overlong_penalty
from megatron_vcr1.types import Rollout, Sample

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
        self, sources: Sequence[DataSource], judge: Judge | None, *, overlong_buffer_tokens: int, max_new_tokens: int
    ) -> None:
        """Load the user's own rewards.

        Args:
            sources: data.sources; each names the user's own rewards and whether its prompts ask for reasoning.
            judge: compares captions. None if no sample needs a judge (see `judge_for_samples`).
            overlong_buffer_tokens: length of the overlong penalty's ramp, in tokens; 0: no penalty.
            max_new_tokens: response limit of the rollout.

        Raises:
            UserError: one of the user's own rewards cannot be loaded.
        """
        self._sources = sources
        self._judge = judge
        self._user_rewards = [[load_reward(name) for name in source.rewards] for source in sources]
        self._overlong_buffer_tokens = overlong_buffer_tokens
        self._max_new_tokens = max_new_tokens

    def rewards(self, responses: Sequence[Response]) -> list[RewardBreakdown]:
        """Return one reward per response, in order. A caption that the judge gave no verdict on has no total."""
        recalls = self._caption_recalls(responses)
        return [self._reward(response, recall) for response, recall in zip(responses, recalls, strict=True)]

    def _caption_recalls(self, responses: Sequence[Response]) -> list[float | None]:
        """Ask the judge for the event recall of all responses that contain a caption, in one batch.

        The other responses get None: their caption reward, if any, is 0 without a judge.
        """
        recalls: list[float | None] = [None] * len(responses)
        captions = {
            index: caption for index, response in enumerate(responses) if (caption := _caption_of(response)) is not None
        }
        if captions and self._judge is not None:
            verdicts = self._judge.recalls([responses[index].sample for index in captions], list(captions.values()))
            for index, verdict in zip(captions, verdicts, strict=True):
                recalls[index] = verdict
        return recalls

    def _reward(self, response: Response, recall: float | None) -> RewardBreakdown:
        thinking = self._sources[response.source].thinking
        reward = score(response.sample, response.text, thinking=thinking, recall=recall)
        extra = {
            user_reward.name: user_reward(response.sample, response.text)
            for user_reward in self._user_rewards[response.source]
        }
        if self._overlong_buffer_tokens:
            extra[OVERLONG] = overlong_penalty(
                len(response.rollout.token_ids),
                buffer_tokens=self._overlong_buffer_tokens,
                max_new_tokens=self._max_new_tokens,
            )
        return replace(reward, extra={**reward.extra, **extra}) if extra else reward


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


def _caption_of(response: Response) -> str | None:
    """Return the caption in a response that a judge has to read; None for other and for unparsable responses."""
    if not task_of(response.sample).needs_judge(response.sample):
        return None
    try:
        return parse_caption(response.text)
    except UnparsableError:
        return None
