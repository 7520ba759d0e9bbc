"""Predicts how much more work the busiest replica has than the average one."""

from __future__ import annotations

import random
from functools import cache

from megatron_vcr1.model.flops import Workload, training_flops
from megatron_vcr1.parallel.balance import imbalance, longest_first
from megatron_vcr1.planning.job import Job, square_video

MIN_GROUPS = 1024  # that are drawn for a mean over several steps


@cache
def work_imbalance(job: Job, num_replicas: int, longest_response: int) -> float:
    """Predict the FLOPs of the replica with the most work in an optimizer step over the mean of all replicas.

    All replicas wait for that replica at the gradient reduction. Groups are dealt by FLOPs, as in training. All prompts
    have the same length, and the lengths of responses have a beta distribution with the job's mean between 0 and the
    longest response; for means far below the longest response it is close to an exponential distribution.

    Args:
        longest_response: tokens of the longest response of a step.
    """
    mean = job.response_tokens / longest_response
    if num_replicas == 1 or mean >= 1:
        return 1.0
    rarer = min(mean, 1 - mean)
    generator = random.Random(0)
    grids = [square_video(job.config, job.prompt_tokens)]

    def group_flops() -> float:
        lengths = [
            max(1, round(longest_response * generator.betavariate(mean / rarer, (1 - mean) / rarer)))
            for _ in range(job.group_size)
        ]
        work = Workload.of_group(job.config, job.prompt_tokens, lengths, grids)
        return training_flops(job.config, work, freeze=job.freeze).total

    num_groups = job.prompts_per_step // job.num_minibatches
    num_steps = -(-MIN_GROUPS // num_groups)
    total = 0.0
    for _ in range(num_steps):
        costs = [group_flops() for _ in range(num_groups)]
        total += imbalance(costs, longest_first(costs, num_replicas), num_replicas)
    return total / num_steps
