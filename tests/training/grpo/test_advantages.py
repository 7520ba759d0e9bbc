from __future__ import annotations

import statistics

import pytest

from megatron_vcr1.training.grpo.advantages import group_advantages, has_reward_variance, overlong_penalty


def test_advantages_are_normalized_by_mean_and_standard_deviation() -> None:
    rewards = [0.0, 1.0, 2.0, 0.5, 1.25]
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    expected = [(reward - mean) / (deviation + 1e-4) for reward in rewards]
    assert group_advantages(rewards, divide_by_std=True) == pytest.approx(expected, rel=1e-12)
    assert group_advantages(rewards, divide_by_std=False) == pytest.approx([reward - mean for reward in rewards])


def test_equal_rewards_have_zero_advantages() -> None:
    for divide_by_std in (True, False):
        assert group_advantages([1.3] * 8, divide_by_std=divide_by_std) == (0.0,) * 8
    assert not has_reward_variance([1.3] * 8)
    assert has_reward_variance([1.3, 1.3, 1.2])


def test_responses_without_a_reward_do_not_change_the_statistics() -> None:
    advantages = group_advantages([None, 1.0, None, 3.0], divide_by_std=False)
    assert advantages == (None, -1.0, None, 1.0)
    assert group_advantages([None, 2.0], divide_by_std=True) == (None, 0.0)
    assert group_advantages([None, None], divide_by_std=True) == (None, None)
    assert not has_reward_variance([None, 2.0]) and not has_reward_variance([None, None])


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (101, -1.0)]
)
def test_overlong_penalty_ramps_linearly_through_the_buffer(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(num_tokens, buffer_tokens=20, max_new_tokens=100) == penalty
