"""From rewards to advantages (VideoChat-R1, equation 1) and what shapes the rewards before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

STD_EPSILON = 1e-4
"""Added to the standard deviation, as the paper's code does."""


def group_advantages(rewards: Sequence[float | None], *, divide_by_std: bool) -> tuple[float | None, ...]:
    """Each response's reward relative to those of the other responses to its prompt.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the sample's standard deviation (over G - 1). Without the division
    it is Dr.GRPO's (arXiv:2503.20783).

    Args:
        rewards: of a group; None for a response that could not be scored, which the statistics leave out.

    Returns:
        One for each reward; None where that is None.
    """
    scored = torch.tensor([reward for reward in rewards if reward is not None], dtype=torch.float64)
    if not len(scored):
        return (None,) * len(rewards)
    advantages = scored - scored.mean()
    if divide_by_std and len(scored) > 1:
        advantages /= scored.std() + STD_EPSILON
    values = iter(advantages.tolist())
    return tuple(None if reward is None else next(values) for reward in rewards)


def has_reward_variance(rewards: Sequence[float | None]) -> bool:
    """Whether the rewards of a group differ: equal ones have advantages of 0 and teach nothing."""
    return len({reward for reward in rewards if reward is not None}) > 1


def overlong_penalty(num_tokens: int, *, buffer: int, max_new_tokens: int) -> float:
    """What a long response loses of its reward (DAPO, arXiv:2503.14476, equation 13), in [-1, 0].

    Nothing up to max_new_tokens - buffer tokens, from there on in proportion, 1 at the limit.
    """
    return -min(1.0, max(0.0, (num_tokens - (max_new_tokens - buffer)) / buffer))
