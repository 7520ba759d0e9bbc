"""One GRPO update on synthetic groups: all sides compute the same videos, tokens and advantages."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Workload
from megatron_vcr1.planning.job import Layout, square_video

SECONDS_PER_STEP = 1.0  # a temporal patch has two frames, at 2 frames per second


@dataclass(frozen=True, slots=True)
class UpdateCase:
    """The sizes of an update and the layout of our model."""

    model_dir: str  # config.json and weights of the policy
    reference_dir: str | None  # weights of the reference; None: no KL
    dtype: str = "float32"
    num_prompts: int = 1
    prompt_tokens: int = 1024
    group_size: int = 8
    response_tokens: int = 64
    kl_coef: float = 0.04
    reference: str = "host"  # or "resident"; used if reference_dir is set
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0
    microbatch_tokens: int = 16384
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    recompute: str = "none"
    layer_spec: str = "auto"  # see model.layer_spec
    fp8: str | None = None  # see model.fp8
    num_updates: int = 1  # measured ones, after a warm-up update
    seed: int = 0

    @property
    def layout(self) -> Layout:
        """Return the layout of one replica."""
        return Layout(
            tensor=self.tensor,
            context=self.context,
            pipeline=self.pipeline,
            sequence_parallel=self.sequence_parallel,
            first_stage_layers=self.first_stage_layers,
            recompute=self.recompute,
        )

    @property
    def run_config(self) -> RunConfig:
        """Return the configuration of a training run with these sizes and this layout."""
        return RunConfig.model_validate(
            {
                "model": {
                    "path": self.model_dir,
                    "dtype": self.dtype,
                    "layer_spec": self.layer_spec,
                    "fp8": self.fp8,
                },
                "parallel": self.layout.parallel,
                "recompute": self.layout.recompute_section,
                "train": {"microbatch_tokens": self.microbatch_tokens, "prompts_per_step": self.num_prompts},
                "optimizer": {"learning_rate": self.learning_rate, "max_grad_norm": self.max_grad_norm},
                "grpo": {
                    "group_size": self.group_size,
                    "kl_coef": self.kl_coef if self.reference_dir else 0.0,
                    "reference": self.reference,
                },
            }
        )

    def workload(self, config: ModelConfig) -> Workload:
        """Return the workload of one forward pass over all groups; each prompt counts once."""
        grid = square_video(config, self.prompt_tokens)
        group = Workload.of_group(config, self.prompt_tokens, [self.response_tokens] * self.group_size, [grid])
        return sum([group] * self.num_prompts, Workload())

    def plain_workload(self, config: ModelConfig) -> Workload:
        """Return the workload if every response repeats the prompt and logits are computed for all tokens."""
        num_tokens = self.prompt_tokens + self.response_tokens
        sequence = Workload.of_group(config, num_tokens, (), [square_video(config, self.prompt_tokens)])
        sequence = dataclasses.replace(sequence, targets=num_tokens)
        return sum([sequence] * self.group_size * self.num_prompts, Workload())

    def groups(self, config: ModelConfig) -> list[Group]:
        return [self._group(config, index) for index in range(self.num_prompts)]

    def advantages(self) -> Tensor:
        """Return advantages with mean 0 and standard deviation 1 in each group, float32 [num_prompts, group_size]."""
        values = torch.randn(self.num_prompts, self.group_size, generator=self._generator(10_000))
        return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UpdateCase:
        return cls(**json.loads(text))

    def _generator(self, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100_000 + index)

    def _group(self, config: ModelConfig, index: int) -> Group:
        generator = self._generator(index)
        steps, height, width = grid = square_video(config, self.prompt_tokens)
        patch = config.vision.patch_size
        size = (steps * config.vision.temporal_patch_size, height * patch, width * patch, 3)
        frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        video = VisionInput(frames, grid, SECONDS_PER_STEP)
        # Above the special tokens of the small models, and below those of the published models.
        token_range = (20, min(config.text.vocab_size, 150_000))
        num_video_tokens = video.num_tokens(config.vision.merge_size)
        text = torch.randint(*token_range, (self.prompt_tokens - num_video_tokens,), generator=generator)
        token_ids = torch.cat((text[:4], torch.full((num_video_tokens,), config.video_token_id), text[4:]))
        responses = torch.randint(*token_range, (self.group_size, self.response_tokens), generator=generator)
        return Group(f"synthetic-{index}", EncodedPrompt(token_ids, (video,)), tuple(responses))
