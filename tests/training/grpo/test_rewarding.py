from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.judge import Judge
from megatron_vcr1.training.grpo.rewarding import Response, Rewarder, judge_for_samples
from megatron_vcr1.types import FinishReason, Rollout
from tests.rewards.samples import sample


def _rewarder(rewards: Sequence[str] = (), judge: Judge | None = None, overlong_buffer_tokens: int = 0) -> Rewarder:
    sources = [
        DataSource.model_validate({"manifest": "a.jsonl", "thinking": False, "rewards": list(rewards)}),
        DataSource.model_validate({"manifest": "b.jsonl"}),
    ]
    return Rewarder(sources, judge, overlong_buffer_tokens=overlong_buffer_tokens, max_new_tokens=20)


def _response(task: str, text: str, *, source: int = 0, num_tokens: int = 5) -> Response:
    rollout = Rollout((1,) * num_tokens, (-1.0,) * num_tokens, FinishReason.STOP, 0)
    return Response(sample(task), source, text, rollout)


def test_sources_have_their_own_thinking_setting_and_user_rewards() -> None:
    name = "tests.training.own_rewards:letters"
    answer = "<answer>A</answer>"
    thought = f"<think>so</think>{answer}"
    task = "multiple_choice_qa"
    texts = [(answer, 0), (answer, 1), (thought, 1)]
    short, without_thinking, complete = _rewarder([name]).rewards(
        [_response(task, text, source=source) for text, source in texts]
    )
    assert short.extra == {name: pytest.approx(12 / 18)} and short.total == pytest.approx(2 + 12 / 18)
    assert (without_thinking.format, without_thinking.accuracy, without_thinking.extra) == (0.0, 1.0, {})
    assert complete.total == 2.0


def test_judge_compares_captions_and_nothing_else(tmp_path: Path) -> None:
    samples = [[sample("quality")], [sample("captioning")]]
    judge = judge_for_samples(JudgeSection(kind="lexical"), samples, tmp_path)
    right, wrong, unparsable, quality = _rewarder(judge=judge).rewards(
        [
            _response("captioning", "<answer>A dog barks.</answer>"),
            _response("captioning", "<answer>Snow falls on hills.</answer>"),
            _response("captioning", "A dog barks."),
            _response("quality", "<answer>low quality</answer>"),
        ]
    )
    assert right.recall == 1.0 and right.total == 2.0
    assert wrong.recall == 0.0 and wrong.total == 1.0
    assert unparsable.recall == 0.0 and unparsable.total == 0.0  # a missing caption has no reward, without a judge
    assert quality.recall is None and quality.total == 2.0


def test_no_judge_is_built_without_captions(tmp_path: Path) -> None:
    section = JudgeSection(kind="openai", base_url="http://127.0.0.1:9/v1")
    assert judge_for_samples(section, [[sample("quality")]], tmp_path) is None
    (reward,) = _rewarder().rewards([_response("quality", "<answer>low quality</answer>")])
    assert reward.total == 2.0


def test_overlong_responses_lose_reward() -> None:
    rewarder = _rewarder(overlong_buffer_tokens=10)
    rewards = rewarder.rewards([_response("quality", "", num_tokens=length) for length in (10, 15, 20)])
    assert [reward.extra["overlong"] for reward in rewards] == [0.0, -0.5, -1.0]


def test_missing_user_reward_is_a_user_error() -> None:
    with pytest.raises(UserError, match="has no function nothing"):
        _rewarder(["tests.training.own_rewards:nothing"])
