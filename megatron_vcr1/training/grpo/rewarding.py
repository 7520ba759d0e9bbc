"""From sampled responses to rewards: the task's, the user's own, and what the judge says of captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.judge import Judge, build_judge
from megatron_vcr1.rewards import RewardBreakdown, load_reward, score
from megatron_vcr1.rewards.parsing import UnparsableError, parse_caption
from megatron_vcr1.training.grpo.advantages import overlong_penalty
from megatron_vcr1.types import CaptionTarget, Rollout, Task, VideoSample

OVERLONG = "overlong"
"""Name of the overlong penalty among a reward's extra parts."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response to be rewarded."""

    sample: VideoSample
    source: int  # index in data.sources
    text: str
    rollout: Rollout


class Rewarder:
    """Rewards responses as the settings say."""

    def __init__(self, config: RunConfig, samples: Sequence[Sequence[VideoSample]], run_dir: Path) -> None:
        """
        Args:
            samples: of each source; a judge is made only if there are captions to read.

        Raises:
            UserError: a reward of the user's own cannot be loaded, or the judge's client or key is missing.
        """
        self._sources = config.data.sources
        self._own = [[load_reward(name) for name in source.rewards] for source in self._sources]
        self._overlong_buffer = config.grpo.overlong_buffer_tokens
        self._max_new_tokens = config.rollout.max_new_tokens
        has_captions = any(sample.task == Task.CAPTIONING for some in samples for sample in some)
        self._judge: Judge | None = build_judge(config.judge, run_dir / "judge_cache") if has_captions else None

    def rewards(self, responses: Sequence[Response]) -> list[RewardBreakdown]:
        """One for each response, in order; without a total where the judge gave no verdict."""
        recalls = self._recalls(responses)
        return [self._reward(response, recall) for response, recall in zip(responses, recalls, strict=True)]

    def _recalls(self, responses: Sequence[Response]) -> list[float | None]:
        """The judge reads what holds a caption; the rest is worth 0 without it."""
        recalls: list[float | None] = [None] * len(responses)
        captions = {index: caption for index, one in enumerate(responses) if (caption := _caption(one)) is not None}
        if captions and self._judge is not None:
            verdicts = self._judge.recalls([responses[index].sample for index in captions], list(captions.values()))
            for index, verdict in zip(captions, verdicts, strict=True):
                recalls[index] = verdict
        return recalls

    def _reward(self, response: Response, recall: float | None) -> RewardBreakdown:
        thinking = self._sources[response.source].thinking
        reward = score(response.sample, response.text, thinking=thinking, recall=recall)
        extra = {own.name: own(response.sample, response.text) for own in self._own[response.source]}
        if self._overlong_buffer:
            num_tokens = len(response.rollout.token_ids)
            extra[OVERLONG] = overlong_penalty(
                num_tokens, buffer=self._overlong_buffer, max_new_tokens=self._max_new_tokens
            )
        return replace(reward, extra={**reward.extra, **extra}) if extra else reward


def _caption(response: Response) -> str | None:
    if not isinstance(response.sample.target, CaptionTarget):
        return None
    try:
        return parse_caption(response.text)
    except UnparsableError:
        return None
