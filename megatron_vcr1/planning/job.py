"""A GRPO run and its parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

from megatron_vcr1.config.layout import layers_per_stage
from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Grid, Workload

RECOMPUTES = ("none", "mlp", "full")  # no recomputation, the MLP of every layer (selective), whole layers
MIN_TEXT_TOKENS = 64  # of a prompt; its video takes the other tokens
STAMP_TOKENS = 10  # of a temporal patch with a time stamp: the stamp, and the tokens around its pads


def square_video(config: ModelConfig, num_prompt_tokens: int) -> Grid:
    """Return the patch grid of a video that fills a prompt: square frames of 16 patches, or 28 in longer prompts.

    Raises:
        ValueError: the prompt is too short for a video.
    """
    side = 16 if num_prompt_tokens <= 2048 else 28
    step_tokens = side**2 // config.vision.patches_per_token + STAMP_TOKENS * config.media.timestamps_as_text
    steps = (num_prompt_tokens - MIN_TEXT_TOKENS) // step_tokens
    if steps < 1:
        raise ValueError(f"a prompt of {num_prompt_tokens} tokens has no room for a video; take at least 128")
    return steps, side, side


@dataclass(frozen=True, slots=True)
class Job:
    """The size of a GRPO run."""

    config: ModelConfig
    prompts_per_step: int = 8
    group_size: int = 8
    prompt_tokens: int = 3840  # text and video; the paper's budget for a video is 3,584
    response_tokens: int = 200  # mean of all responses
    num_samples: int = 18_031  # per epoch; this is the paper's joint run
    num_epochs: float = 1.0
    num_passes: int = 1  # over the groups of a rollout
    num_minibatches: int = 1  # per pass, with an optimizer step each
    dtype_bytes: int = 2  # of parameters and activations
    freeze: tuple[str, ...] = ()
    with_reference: bool = True  # whether the log-probs of the reference are computed
    reference_resident: bool = False  # whether the reference's weights stay on the device, or in host memory
    offloads_inputs: bool = False  # whether the inputs of recomputed layers are kept in host memory
    gradient_bytes: int = 4  # of a value in the gradient buffers
    moment_bytes: int = 8  # of Adam's two moments of a parameter
    optimizer_resident: bool = True  # whether the optimizer's state stays on the device, or in host memory
    overlaps_reduction: bool = False  # whether gradients are reduced during the backward pass of the last microbatch
    saves_in_background: bool = True  # whether checkpoints are copied to host memory and written from there

    @property
    def num_steps(self) -> int:
        return math.ceil(self.num_samples * self.num_epochs / self.prompts_per_step)

    @property
    def num_updates(self) -> int:
        """Return the optimizer steps per training step. With more than one, the old log-probs are computed first."""
        return self.num_passes * self.num_minibatches

    @property
    def keeps_features(self) -> bool:
        """Return whether later passes of a step use the vision features that its first pass has computed."""
        has_several_passes = self.with_reference or self.num_updates > 1
        return has_several_passes and {"vision_tower", "merger"} <= set(self.freeze)

    @property
    def group_tokens(self) -> int:
        """Return the tokens of a packed group; the last token of each response is not an input."""
        return self.prompt_tokens + self.group_size * (self.response_tokens - 1)

    @property
    def frames_per_prompt(self) -> int:
        return square_video(self.config, self.prompt_tokens)[0] * self.config.vision.temporal_patch_size

    def groups(self, num_groups: int) -> Workload:
        """Return the workload of a forward pass over `num_groups` groups."""
        group = _group(self.config, self.prompt_tokens, (self.response_tokens,) * self.group_size)
        return Workload(*(num_groups * getattr(group, part.name) for part in fields(group)))

    def prompt(self) -> Workload:
        """Return the workload of a prefill: one prompt, up to the first sampled token."""
        return _group(self.config, self.prompt_tokens, (1,))


@cache
def _group(config: ModelConfig, num_prompt_tokens: int, response_lengths: tuple[int, ...]) -> Workload:
    return Workload.of_group(config, num_prompt_tokens, response_lengths, [square_video(config, num_prompt_tokens)])


@dataclass(frozen=True, slots=True)
class Layout:
    """The split of a job across GPUs."""

    tensor: int = 1
    pipeline: int = 1
    replicas: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    recompute: str = "none"  # one of RECOMPUTES
    recompute_layers: int = 1  # layers of the language model per block, if whole layers are recomputed
    groups_per_microbatch: int = 1
    context: int = 1
    vision: Literal["tensor", "data"] = "tensor"

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.context * self.pipeline * self.replicas

    @property
    def num_weight_holders(self) -> int:
        """Return the number of GPUs that hold the same weights, which shard the optimizer state."""
        return self.context * self.replicas

    @property
    def name(self) -> str:
        context = f", CP {self.context}" if self.context > 1 else ""
        return f"{self.tensor} x {self.pipeline} x {self.replicas}{context}"

    @property
    def parallel(self) -> ParallelSection:
        return ParallelSection(
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            sequence_parallel=self.sequence_parallel,
            vision=self.vision,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    @property
    def of_vision(self) -> Layout:
        """Return the layout of the vision tower.

        If every tensor-parallel rank holds the whole tower, these ranks divide the frames as context-parallel ranks do.
        """
        layout = replace(self, recompute_layers=1)
        if self.vision == "tensor":
            return layout
        return replace(layout, tensor=1, context=self.context * self.tensor, sequence_parallel=False)

    @property
    def recompute_section(self) -> RecomputeSection:
        if self.recompute == "mlp":
            return RecomputeSection(granularity="selective", modules=("mlp",))
        return RecomputeSection.model_validate({"granularity": self.recompute, "num_layers": self.recompute_layers})

    def response_share(self, job: Job) -> float:
        """Return the fraction of a group's responses on the context-parallel rank with the most of them."""
        return math.ceil(job.group_size / self.context) / job.group_size

    def token_share(self, job: Job) -> float:
        """Return the fraction of a group's tokens on the context-parallel rank with the most of them."""
        response_tokens = job.group_tokens - job.prompt_tokens
        return (job.prompt_tokens / self.context + self.response_share(job) * response_tokens) / job.group_tokens

    def frame_share(self, job: Job) -> float:
        """Return the fraction of a microbatch's frames on the rank that encodes the most of them.

        A temporal step is the smallest part.
        """
        num_steps = square_video(job.config, job.prompt_tokens)[0] * self.groups_per_microbatch
        return math.ceil(num_steps / self.of_vision.context) / num_steps

    def stages(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the number of language-model layers of each stage.

        Raises:
            UserError: the layers cannot be distributed evenly.
        """
        return _stages(config.text.num_layers, self)

    def groups_per_update(self, job: Job) -> int:
        """Return the groups of an optimizer step on the replica with the most of them."""
        return -(-job.prompts_per_step // (job.num_minibatches * self.replicas))

    def num_microbatches(self, job: Job) -> int:
        """Return the microbatches of an optimizer step on the replica with the most of them."""
        return -(-self.groups_per_update(job) // self.groups_per_microbatch)


@cache
def _stages(num_layers: int, layout: Layout) -> tuple[int, ...]:
    return layers_per_stage(num_layers, layout.parallel)
