from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.config.training_sections import RewardsSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.judge import Judge
from megatron_vcr1.tasks import find_task
from megatron_vcr1.training.grpo.rewarding import Response, Rewarder, check_weights, judge_for_samples
from megatron_vcr1.types import FinishReason, Rollout
from megatron_vcr1.user_modules import UserCodeError
from tests.rewards.samples import sample


def _rewarder(
    rewards: Sequence[str] = (),
    judge: Judge | None = None,
    overlong_buffer_tokens: int = 0,
    weights: Mapping[str, float] | None = None,
) -> Rewarder:
    sources = [
        DataSource.model_validate({"manifest": "a.jsonl", "thinking": False, "rewards": list(rewards)}),
        DataSource.model_validate({"manifest": "b.jsonl"}),
    ]
    return Rewarder(
        sources,
        judge,
        weights=weights or {},
        overlong_buffer_tokens=overlong_buffer_tokens,
        max_new_tokens=20,
    )


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


def test_a_user_reward_replaces_a_part_with_its_reasons_and_weights_apply_to_the_total() -> None:
    name = "accuracy=tests.training.own_rewards:half_right"
    weights = {"format": 0.5, "accuracy": 4.0, "overlong": 2.0}
    rewarder = _rewarder([name], overlong_buffer_tokens=10, weights=weights)
    half, none = rewarder.rewards(
        [_response("quality", text, num_tokens=15) for text in ("<answer>low</answer>", "<answer>high</answer>")]
    )
    assert half.parts == {"format": 1.0, "accuracy": 0.5} and half.reasons == {}
    assert half.total == 0.5 * 1 + 4 * 0.5 - 2 * 0.5
    assert none.parts == {"format": 1.0, "accuracy": 0.0} and none.reasons == {"accuracy": "not even half right"}


def test_a_weight_of_an_unknown_part_is_a_user_error() -> None:
    sources = [DataSource.model_validate({"manifest": "a.jsonl", "rewards": ["tests.training.own_rewards:letters"]})]
    samples = [[sample("quality"), sample("captioning")]]
    known = ("format", "overlong", "accuracy", "recall", "tests.training.own_rewards:letters")
    check_weights(RewardsSection(weights=dict.fromkeys(known, 2.0)), sources, samples)
    with pytest.raises(UserError, match="no reward of the run has a part 'iou'; the parts are format, overlong, acc"):
        check_weights(RewardsSection(weights={"iou": 2.0}), sources, samples)


def test_a_failing_task_ends_the_run_with_its_traceback_and_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise KeyError("colour")

    monkeypatch.setattr(type(find_task("quality")), "reward_parts", fails)
    with pytest.raises(
        UserCodeError, match=r"sample clip-7: the reward of task quality(.|\n)*Traceback(.|\n)*KeyError"
    ):
        _rewarder().rewards([_response("quality", "x")])
