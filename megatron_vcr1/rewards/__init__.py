"""Verifiable rewards of VideoChat-R1: pure functions of a sample and a completion, without torch."""

from megatron_vcr1.rewards.scoring import RewardBreakdown, score
from megatron_vcr1.rewards.user_reward import load_reward

__all__ = ["RewardBreakdown", "load_reward", "score"]
