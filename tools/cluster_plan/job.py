"""What is run, and how it is divided."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

from megatron_vcr1.config.layout import layers_per_stage
from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Grid, Workload

RECOMPUTES = ("none", "mlp", "full")  # nothing, the MLP of every layer (selective), whole layers
TEXT_TOKENS = 64  # of a prompt, at least; its video takes the rest


def square_video(config: ModelConfig, num_prompt_tokens: int) -> Grid:
    """The video of a prompt of so many tokens: square frames of 224 pixels, of 392 in longer prompts.

    Raises:
        ValueError: the prompt has no room for a video.
    """
    side = 16 if num_prompt_tokens <= 2048 else 28
    steps = (num_prompt_tokens - TEXT_TOKENS) // (side**2 // config.vision.patches_per_token)
    if steps < 1:
        raise ValueError(f"a prompt of {num_prompt_tokens} tokens has no room for a video; take at least 128")
    return steps, side, side


@dataclass(frozen=True, slots=True)
class Job:
    """A GRPO run."""

    config: ModelConfig
    prompts_per_step: int = 8
    group_size: int = 8  # responses a prompt
    prompt_tokens: int = 3840  # text and video; the paper's budget for a video is 3,584
    response_tokens: int = 200  # mean
    max_response_tokens: int = 1024
    num_samples: int = 18_031  # of an epoch; the paper's joint run
    num_epochs: float = 1.0
    dtype_bytes: int = 2  # of parameters and activations
    freeze: tuple[str, ...] = ()
    with_reference: bool = True  # its log-probs are computed
    reference_resident: bool = False  # a second copy of the weights on the device, or swapped in from the host

    @property
    def num_steps(self) -> int:
        return math.ceil(self.num_samples * self.num_epochs / self.prompts_per_step)

    @property
    def group_rows(self) -> int:
        """Rows of a packed group."""
        return self.prompt_tokens + self.group_size * (self.response_tokens - 1)

    @property
    def frames_per_prompt(self) -> int:
        return square_video(self.config, self.prompt_tokens)[0] * self.config.vision.temporal_patch_size

    def groups(self, num_groups: int) -> Workload:
        """A forward pass over so many groups."""
        one = _group(self.config, self.prompt_tokens, (self.response_tokens,) * self.group_size)
        return Workload(*(num_groups * getattr(one, part.name) for part in fields(one)))

    def prompt(self) -> Workload:
        """A forward pass over one prompt, up to its first sampled token."""
        return _group(self.config, self.prompt_tokens, (1,))


@cache
def _group(config: ModelConfig, num_prompt_tokens: int, response_lengths: tuple[int, ...]) -> Workload:
    return Workload.of_group(config, num_prompt_tokens, response_lengths, [square_video(config, num_prompt_tokens)])


@dataclass(frozen=True, slots=True)
class Layout:
    """How a job is divided among GPUs."""

    tensor: int = 1
    pipeline: int = 1
    copies: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    recompute: str = "none"  # one of RECOMPUTES
    groups_per_microbatch: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.copies

    @property
    def parallel(self) -> ParallelSection:
        return ParallelSection(
            tensor=self.tensor,
            pipeline=self.pipeline,
            sequence_parallel=self.sequence_parallel,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    @property
    def recompute_section(self) -> RecomputeSection:
        if self.recompute == "mlp":
            return RecomputeSection(granularity="selective", modules=("mlp",))
        return RecomputeSection.model_validate({"granularity": self.recompute})

    def stages(self, config: ModelConfig) -> tuple[int, ...]:
        """Language-model layers of each stage. Raises UserError if they do not divide."""
        return _stages(config.text.num_layers, self)

    def microbatches(self, job: Job) -> int:
        """Of a step, on one copy of the model."""
        return math.ceil(job.prompts_per_step / self.copies / self.groups_per_microbatch)


@cache
def _stages(num_layers: int, layout: Layout) -> tuple[int, ...]:
    return layers_per_stage(num_layers, layout.parallel)
