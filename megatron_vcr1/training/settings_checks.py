"""Checks of settings against each other and against the data; they run before a model is loaded."""

from __future__ import annotations

from megatron_vcr1.config.evaluation_sections import ValidationSection
from megatron_vcr1.config.rollout_sections import RolloutSection, SglangSection
from megatron_vcr1.config.training_sections import (
    CheckpointSection,
    GrpoSection,
    OptimizerSection,
    ProfileSection,
    TrainSection,
)
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.placement import Placement


def check_warmup(section: OptimizerSection, num_steps: int) -> None:
    """Raise UserError if the warm-up is not shorter than the run."""
    if section.warmup_steps >= num_steps:
        raise UserError(
            f"optimizer.warmup_steps = {section.warmup_steps} must be less than the run's {num_steps} steps"
        )


def ignored_epochs(section: TrainSection) -> str | None:
    """Return a warning if train.num_epochs has no effect."""
    if section.num_steps is None or section.num_epochs == TrainSection.model_fields["num_epochs"].default:
        return None
    return (
        f"train.num_epochs = {section.num_epochs:g} has no effect, because train.num_steps = {section.num_steps} is "
        "set: remove one of the two"
    )


def check_grpo_settings(grpo: GrpoSection, rollout: RolloutSection, sglang: SglangSection) -> None:
    """Raise UserError for settings of GRPO and of its engine that exclude each other."""
    uses_servers = rollout.engine == "sglang"
    if grpo.one_step_off and not uses_servers:
        raise UserError("grpo.one_step_off needs rollout.engine = 'sglang': set that, or turn one_step_off off")
    if grpo.one_step_off and not Placement.from_section(sglang).samples_while_training:
        raise UserError(
            "grpo.one_step_off samples while training computes, which colocated servers cannot do: set "
            "sglang.colocated = false and give the servers GPUs of their own"
        )
    if grpo.overlong_buffer_tokens > rollout.max_new_tokens:
        raise UserError(
            f"grpo.overlong_buffer_tokens = {grpo.overlong_buffer_tokens} is more than rollout.max_new_tokens = "
            f"{rollout.max_new_tokens}, so even the shortest response would be penalized; lower it"
        )


def check_validation(validation: ValidationSection, checkpoint: CheckpointSection) -> None:
    """Raise UserError for settings that need a validation, or a best checkpoint, that the run does not have."""
    if checkpoint.keep_best is not None and not validation.benchmarks:
        raise UserError(
            f"checkpoint.keep_best = {checkpoint.keep_best!r} needs validation: add a table [[validation.benchmarks]]"
        )
    if checkpoint.keep_best is None and checkpoint.export == "best":
        raise UserError("checkpoint.export = 'best' needs checkpoint.keep_best, for example 'charades_sta/mIoU'")
    if checkpoint.keep_best is None and validation.patience is not None:
        raise UserError("validation.patience needs checkpoint.keep_best, for example 'charades_sta/mIoU'")


def check_profile_ranks(section: ProfileSection, num_ranks: int) -> None:
    """Raise UserError if [profile] names a rank that the job does not have."""
    if section.enabled and not set(section.ranks) <= set(range(num_ranks)):
        ranks = ", ".join(map(str, section.ranks))
        raise UserError(f"profile.ranks = {ranks}: the job has ranks 0 to {num_ranks - 1}")


def check_stage(saved: str, train: TrainSection) -> None:
    """Raise UserError if the run directory holds a run of the other stage.

    Args:
        saved: the stage in the newest checkpoint.
    """
    if saved != train.stage:
        raise UserError(
            f"train.run_dir = {train.run_dir} holds a run with train.stage = '{saved}', not '{train.stage}'; choose "
            "another folder (model.path can be the export of that run, or one of its checkpoints)"
        )
