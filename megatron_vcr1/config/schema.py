"""Everything that can be set, one class a TOML section. The descriptions are its documentation (`vcr1 config`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, cast, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from megatron_vcr1.config.rollout_sections import EvaluateSection, JudgeSection, RolloutSection, SglangSection
from megatron_vcr1.config.section import Names, Section
from megatron_vcr1.config.training_sections import (
    CheckpointSection,
    DataSection,
    GrpoSection,
    LoggingSection,
    OptimizerSection,
    ProfileSection,
    TrainSection,
)


class ModelSection(Section):
    """Which model, and what of it learns."""

    path: Path = Field(
        description="A Hugging Face directory of a Qwen2.5-VL or Qwen2-VL model, or an imported one.",
        examples=["models/Qwen2.5-VL-7B-Instruct"],
    )
    layer_spec: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="Whose layers the model is built from: 'transformer_engine', 'local' (plain torch), or 'auto': "
        "TransformerEngine where it is installed and a GPU is there. Attention is always vcr1_kernels'.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Type of parameters and activations.")
    fp8: Literal["tensorwise", "blockwise"] | None = Field(
        default=None,
        description="FP8 products in the language model's layers while training computes, by TransformerEngine: "
        "'tensorwise' (a scale a tensor; compute capability 8.9 or higher) or 'blockwise' (a scale a block of 128; 9.0 "
        "or higher). Parameters, attention, head and vision tower stay in dtype, and so does the local engine; the FP8 "
        "copies of the layers' weights take up to 2 bytes a parameter more. Unset: none.",
    )
    freeze: Names[Literal["vision_tower", "merger", "language_model"]] = Field(
        default=(), description="Parts that keep their weights: any of 'vision_tower', 'merger', 'language_model'."
    )

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if len(set(self.freeze)) == 3:
            raise ValueError("freeze names all three parts, so nothing would be trained; leave one out")
        return self

    @model_validator(mode="after")
    def _fp8_has_its_layers(self) -> Self:
        if self.fp8 is not None and self.layer_spec == "local":
            raise ValueError("fp8 is TransformerEngine's: layer_spec cannot be 'local'; unset one of the two")
        if self.fp8 is not None and self.dtype != "bfloat16":
            raise ValueError(f"fp8 rounds bfloat16: dtype cannot be '{self.dtype}'; unset one of the two")
        return self


class ParallelSection(Section):
    """How one copy of the model is divided among ranks. What is left of them holds further copies (data parallel)."""

    tensor: int = Field(default=1, ge=1, description="Ranks that share every layer, vision tower included (TP).")
    pipeline: int = Field(
        default=1,
        ge=1,
        description="Stages that the layers are divided into (PP); the first also has the vision tower.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Divide the activations between tensor-parallel regions along the sequence. Needs tensor > 1.",
    )
    first_stage_layers: int | None = Field(
        default=None, ge=1, description="Language-model layers on the first stage. Unset: an even share."
    )
    last_stage_layers: int | None = Field(
        default=None, ge=1, description="Language-model layers on the last stage. Unset: an even share."
    )

    @model_validator(mode="after")
    def _sequence_has_ranks(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1: raise that, or turn it off")
        return self


class RecomputeSection(Section):
    """Which activations are computed again in the backward pass instead of being kept."""

    granularity: Literal["none", "selective", "full"] = Field(
        default="none",
        description="'none', 'selective' (the parts of each layer named in modules) or 'full' (whole layers).",
    )
    num_layers: int = Field(
        default=1,
        ge=1,
        description="With granularity 'full': language-model layers between two kept activations; must divide every "
        "stage's layers. The vision tower keeps one a layer.",
    )
    modules: Names[Literal["core_attn", "mlp"]] = Field(
        default=("core_attn",),
        min_length=1,
        description="With granularity 'selective': any of 'core_attn', 'mlp'.",
    )


class RunConfig(Section):
    """One run."""

    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    recompute: RecomputeSection = RecomputeSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    grpo: GrpoSection = GrpoSection()
    rollout: RolloutSection = RolloutSection()
    sglang: SglangSection = SglangSection()
    judge: JudgeSection = JudgeSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    profile: ProfileSection = ProfileSection()
    evaluate: EvaluateSection = EvaluateSection()


def section_types() -> dict[str, type[Section]]:
    """The sections of a RunConfig by their names in the file."""
    return {name: cast(type[Section], field.annotation) for name, field in RunConfig.model_fields.items()}


def table_type(field: FieldInfo) -> type[Section] | None:
    """What a list of tables ([[section.key]]) holds; None for a key that is a value."""
    if get_origin(field.annotation) is not tuple:
        return None
    entry = get_args(field.annotation)[0]
    return entry if isinstance(entry, type) and issubclass(entry, Section) else None
