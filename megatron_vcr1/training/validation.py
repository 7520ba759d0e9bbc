"""Checks of settings against each other and against the data; they run before a model is loaded."""

from __future__ import annotations

from megatron_vcr1.config.rollout_sections import RolloutSection, SglangSection
from megatron_vcr1.config.training_sections import GrpoSection, OptimizerSection, TrainSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.placement import Placement


def check_batch_size(train: TrainSection, grpo: GrpoSection, num_replicas: int) -> None:
    """Raise UserError if a step's prompts cannot be split evenly over the replicas or into minibatches."""
    number = train.prompts_per_step
    if number % num_replicas:
        raise UserError(
            f"train.prompts_per_step = {number} cannot be split evenly over {num_replicas} data-parallel replicas; "
            f"make it a multiple of {num_replicas}"
        )
    if train.stage == "grpo" and number % grpo.num_minibatches:
        raise UserError(
            f"train.prompts_per_step = {number} is not a multiple of grpo.num_minibatches = {grpo.num_minibatches}; "
            "change one of the two"
        )


def check_warmup(section: OptimizerSection, num_steps: int) -> None:
    """Raise UserError if the warm-up is not shorter than the run."""
    if section.warmup_steps >= num_steps:
        raise UserError(
            f"optimizer.warmup_steps = {section.warmup_steps} must be less than the run's {num_steps} steps"
        )


def check_grpo_settings(grpo: GrpoSection, rollout: RolloutSection, sglang: SglangSection) -> None:
    """Raise UserError for settings of GRPO and of its engine that exclude each other."""
    uses_servers = rollout.engine == "sglang"
    if grpo.one_step_off and uses_servers and not Placement.from_section(sglang).samples_while_training:
        raise UserError(
            "grpo.one_step_off samples while training computes, which colocated servers cannot do: set "
            "sglang.colocated = false and give the servers GPUs of their own"
        )
    if grpo.overlong_buffer_tokens > rollout.max_new_tokens:
        raise UserError(
            f"grpo.overlong_buffer_tokens = {grpo.overlong_buffer_tokens} is more than rollout.max_new_tokens = "
            f"{rollout.max_new_tokens}, so even the shortest response would be penalized; lower it"
        )
