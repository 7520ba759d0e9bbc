"""Verifiable rewards of VideoChat-R1: pure functions of a sample and a completion, without torch.

`parsing` extracts answers from a completion, `choices` reads option letters, `formats` checks the form, `overlap`
computes IoUs, `recall` turns a judge's verdicts into a number, `scoring` combines the parts into a reward, and
`user_reward` loads rewards that the settings name. `answer_parsing` and `lenient` read outputs for metrics.
"""

from megatron_vcr1.rewards.scoring import RewardBreakdown, score
from megatron_vcr1.rewards.user_reward import load_reward

__all__ = ["RewardBreakdown", "load_reward", "score"]
