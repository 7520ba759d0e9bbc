"""Advantages from rewards (VideoChat-R1, equation 1), and the overlong penalty that is a part of the rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in the paper's code."""


def group_advantages(rewards: Sequence[float | None], *, divide_by_std: bool) -> tuple[float | None, ...]:
    """Compute each response's reward relative to its group.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the sample standard deviation (divided by G - 1). Without the division
    by the standard deviation this is Dr.GRPO's advantage (arXiv:2503.20783).

    Args:
        rewards: rewards of a group. None for a response without a reward; mean and deviation leave it out.

    Returns:
        One advantage per reward; None where the reward is None.
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
    """Return whether the rewards of a group differ. If they do not, all advantages are 0: there is no gradient."""
    return len({reward for reward in rewards if reward is not None}) > 1


def overlong_penalty(num_tokens: int, *, buffer_tokens: int, max_new_tokens: int) -> float:
    """Compute the penalty for a long response (DAPO, arXiv:2503.14476, equation 13), in [-1, 0].

    0 for up to max_new_tokens - buffer_tokens tokens, then a linear ramp down to -1 at max_new_tokens.
    """
    return -min(1.0, max(0.0, (num_tokens - (max_new_tokens - buffer_tokens)) / buffer_tokens))
