from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.training.grpo.rewarding import Response, Rewarder
from megatron_vcr1.types import FinishReason, Rollout, Task
from tests.rewards.samples import sample


def _config(rewards: Sequence[str] = (), overlong_buffer_tokens: int = 0) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "model"},
            "data": {
                "sources": [
                    {"manifest": "a.jsonl", "thinking": False, "rewards": list(rewards)},
                    {"manifest": "b.jsonl"},
                ]
            },
            "grpo": {"overlong_buffer_tokens": overlong_buffer_tokens},
            "rollout": {"max_new_tokens": 20},
        }
    )


def _response(task: Task, text: str, *, source: int = 0, num_tokens: int = 5) -> Response:
    rollout = Rollout((1,) * num_tokens, (-1.0,) * num_tokens, FinishReason.STOP, 0)
    return Response(sample(task), source, text, rollout)


def test_each_source_has_its_prompt_variant_and_its_own_rewards(tmp_path: Path) -> None:
    name = "tests.training.own_rewards:letters"
    rewarder = Rewarder(_config([name]), [[], []], tmp_path)
    answer = "<answer>A</answer>"
    thought = f"<think>so</think>{answer}"
    task = Task.MULTIPLE_CHOICE_QA
    texts = [(answer, 0), (answer, 1), (thought, 1)]
    short, unthought, whole = rewarder.rewards([_response(task, text, source=source) for text, source in texts])
    assert short.extra == {name: pytest.approx(12 / 18)} and short.total == pytest.approx(2 + 12 / 18)
    assert (unthought.format, unthought.accuracy, unthought.extra) == (0.0, 1.0, {})
    assert whole.total == 2.0


def test_the_judge_reads_captions_and_nothing_else(tmp_path: Path) -> None:
    caption = sample(Task.CAPTIONING)
    rewarder = Rewarder(_config(), [[sample(Task.QUALITY)], [caption]], tmp_path)
    right, other, empty, quality = rewarder.rewards(
        [
            _response(Task.CAPTIONING, "<answer>A dog barks.</answer>"),
            _response(Task.CAPTIONING, "<answer>Snow falls on hills.</answer>"),
            _response(Task.CAPTIONING, "A dog barks."),
            _response(Task.QUALITY, "<answer>low quality</answer>"),
        ]
    )
    assert right.recall == 1.0 and right.total == 2.0
    assert other.recall == 0.0 and other.total == 1.0
    assert empty.recall == 0.0 and empty.total == 0.0  # nothing to read is worth nothing, without a judge
    assert quality.recall is None and quality.total == 2.0


def test_without_captions_there_is_no_judge(tmp_path: Path) -> None:
    config = _config().model_copy(
        update={
            "judge": RunConfig.model_validate(
                {"model": {"path": "m"}, "judge": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1"}}
            ).judge
        }
    )
    rewarder = Rewarder(config, [[sample(Task.QUALITY)]], tmp_path)
    (reward,) = rewarder.rewards([_response(Task.QUALITY, "<answer>low quality</answer>")])
    assert reward.total == 2.0


def test_overlong_responses_lose_reward(tmp_path: Path) -> None:
    rewarder = Rewarder(_config(overlong_buffer_tokens=10), [[]], tmp_path)
    rewards = rewarder.rewards([_response(Task.QUALITY, "", num_tokens=length) for length in (10, 15, 20)])
    assert [reward.extra["overlong"] for reward in rewards] == [0.0, -0.5, -1.0]


def test_a_reward_that_is_not_there_is_the_users_to_correct(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no function nothing"):
        Rewarder(_config(["tests.training.own_rewards:nothing"]), [[]], tmp_path)
