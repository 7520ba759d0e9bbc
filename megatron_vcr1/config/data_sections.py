"""Section [data]: the training data, and how videos are decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_vcr1.config.section import Names, Section, with_default_thinking


class DataSource(Section):
    """A manifest with its weight and settings in the training mix; usually one source per task."""

    manifest: Path = Field(
        description="Path of the manifest, a JSON-lines file with one sample per line; `vcr1 data import` writes one.",
        examples=["data/train.jsonl"],
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Sampling weight of this source relative to the other sources. Give all sources a weight, or none. "
        "Unset: every sample of every source is drawn once per epoch. Set weights where the sources' sizes are not the "
        "mix that you want.",
    )
    thinking: bool = Field(
        default=True,
        description="Whether the prompts of this source ask for reasoning inside <think> before the answer. Left out: "
        "data.thinking decides.",
    )
    rewards: Names[str] = Field(
        default=(),
        description="User-defined reward functions, each as 'module:function', which are added to the reward of the "
        "task, or as 'part=module:function', which replaces a part of it or names the new part. Used by GRPO only.",
    )


class DataSection(Section):
    """Training data, and how its videos are decoded. Evaluation decodes videos with the same settings."""

    tasks: Names[str] = Field(
        default=(),
        description="Python modules that define tasks of your own, such as 'my_project.counting'; each has a variable "
        "TASK. Tasks of installed packages (entry points of the group 'megatron_vcr1.tasks') need not be named.",
    )
    python_path: Path | None = Field(
        default=None,
        description="Folder from which the modules of tasks and rewards can be imported. Unset: the folder of the TOML "
        "file, if it names any. Set it if the modules are elsewhere.",
    )
    thinking: bool = Field(
        default=True,
        description="Whether prompts ask for reasoning inside <think> before the answer. A source can set its own. Set "
        "it to false for prompts that ask for the answer alone.",
    )
    sources: tuple[DataSource, ...] = Field(
        default=(), description="Training manifests: one table [[data.sources]] per manifest."
    )
    templates: Path | None = Field(
        default=None,
        description="Prompt templates: a TOML file, or the name of templates of the package: 'default', or "
        "'videochat_r1' for the published VideoChat-R1 checkpoints. Unset: 'default'.",
    )
    max_prompt_tokens: int = Field(
        default=8192,
        ge=1,
        description="Maximum length of a prompt in tokens, text and vision together. A video that would exceed it is "
        "read at a lower resolution, and if that is not enough with fewer frames; a sample that cannot be made to fit "
        "is skipped. Raise it for long videos; lower it if a few long prompts run out of memory.",
    )
    fps: float = Field(
        default=2.0,
        gt=0,
        description="Sampling rate of videos, in frames per second. Raise it for short events, lower it for long "
        "videos.",
    )
    min_frames: int = Field(
        default=4,
        ge=2,
        description="Minimum number of frames sampled from a video. Raise it if short clips need more frames.",
    )
    max_frames: int = Field(
        default=768,
        ge=2,
        description="Maximum number of frames sampled from a video. Longer videos are sampled at a lower rate. Lower "
        "it to save memory and time; raise it, with total_pixels and max_prompt_tokens, for long videos.",
    )
    total_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Pixel budget of a video: frames are scaled down until the pixels of all temporal patches (two "
        "frames each) fit. One vision token covers 28 * 28 pixels of a temporal patch (Qwen3-VL: 32 * 32). Unset: 3584 "
        "* 28 * 28, which is 3584 tokens; for Qwen3-VL, half of the longest_edge in the model's video processor file, "
        "which is 12288 tokens in the published models. Lower it to save memory and time; raise it for small details.",
    )
    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="Minimum area of a frame in pixels. Smaller frames are enlarged to it. Unset: 16 * 28 * 28; for "
        "Qwen3-VL, the frames of a video together have at least the shortest_edge in the model's video processor file. "
        "Lower it to allow smaller frames.",
    )
    backend: Literal["auto", "pyav", "dali-cpu", "dali-gpu"] = Field(
        default="auto",
        description="Video decoder: 'pyav', 'dali-cpu', 'dali-gpu' (needs data.num_workers = 0), or 'auto', which is "
        "PyAV, the only one that reads every codec. Use 'dali-gpu' if decoding limits training.",
    )
    num_workers: int = Field(
        default=2,
        ge=0,
        description="Number of processes per rank that decode videos ahead of the training step. 0: the rank itself "
        "decodes, between steps. Raise it if time/decode_s is a large part of a step.",
    )
    video_cache_mb: int = Field(
        default=256,
        ge=0,
        description="Size in MB of the cache of decoded videos in each decoding process (in GPU memory with "
        "'dali-gpu'). 0: no cache. Raise it if the videos of a small data set fit; lower it if host memory is short.",
    )

    @field_validator("sources")
    @classmethod
    def _inherit_thinking(cls, sources: tuple[DataSource, ...], info: ValidationInfo) -> tuple[DataSource, ...]:
        return with_default_thinking(sources, info)

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames = {self.min_frames} is above max_frames = {self.max_frames}; lower min_frames"
            )
        return self
