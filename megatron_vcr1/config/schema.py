"""The settings of a run: RunConfig, which holds one section per TOML table.

The sections are defined in the `*_sections` modules. Their docstrings and the descriptions of their fields are the
documentation of the settings (printed by `vcr1 config`).
"""

from __future__ import annotations

from typing import Self, cast, get_args, get_origin

from pydantic import model_validator
from pydantic.fields import FieldInfo

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.config.evaluation_sections import EvaluateSection, JudgeSection, ValidationSection
from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection
from megatron_vcr1.config.rollout_sections import RolloutSection, SglangSection
from megatron_vcr1.config.section import Section
from megatron_vcr1.config.training_sections import (
    CheckpointSection,
    GrpoSection,
    LoggingSection,
    OptimizerSection,
    ProfileSection,
    RewardsSection,
    TrainSection,
)


class RunConfig(Section):
    """All settings of a run. Only [model] is required, for its path."""

    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    recompute: RecomputeSection = RecomputeSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    grpo: GrpoSection = GrpoSection()
    rewards: RewardsSection = RewardsSection()
    rollout: RolloutSection = RolloutSection()
    sglang: SglangSection = SglangSection()
    judge: JudgeSection = JudgeSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    profile: ProfileSection = ProfileSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _check_grad_dtype(self) -> Self:
        if self.optimizer.grad_dtype == "bfloat16" and self.model.dtype != "bfloat16":
            raise ValueError(
                f"optimizer.grad_dtype = 'bfloat16' needs model.dtype = 'bfloat16', not '{self.model.dtype}'; change "
                "one of them"
            )
        return self


def section_classes() -> dict[str, type[Section]]:
    """Return the class of each section of RunConfig, by the section's name in the TOML file."""
    return {name: cast(type[Section], field.annotation) for name, field in RunConfig.model_fields.items()}


def entry_class(field: FieldInfo) -> type[Section] | None:
    """Return the class of the entries of an array of tables ([[section.key]]), or None for a key with a plain value."""
    if get_origin(field.annotation) is not tuple:
        return None
    entry = get_args(field.annotation)[0]
    return entry if isinstance(entry, type) and issubclass(entry, Section) else None
