"""Settings of training: data, the step, the optimizer, GRPO, checkpoints and logs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_vcr1.config.section import Names, Section


class DataSource(Section):
    """Samples that are drawn together, usually one task's."""

    manifest: Path = Field(description="A manifest (`vcr1 data import` makes one).", examples=["data/train.jsonl"])
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Share of the prompts relative to the other sources. Unset for all: each sample once an epoch.",
    )
    thinking: bool = Field(default=True, description="Ask for reasoning inside <think> before the answer.")
    rewards: Names[str] = Field(
        default=(), description="Your own rewards, as module:function, added to the task's (GRPO)."
    )


class DataSection(Section):
    """What is trained on, and how its videos are read."""

    sources: tuple[DataSource, ...] = Field(default=(), description="One table [[data.sources]] a manifest.")
    templates: Path | None = Field(default=None, description="A file of prompt templates. Unset: the package's own.")
    max_prompt_tokens: int = Field(
        default=8192, ge=1, description="Longest prompt, text and video; a video that is over it is read smaller."
    )
    fps: float = Field(default=2.0, gt=0, description="Frames sampled a second.")
    min_frames: int = Field(default=4, ge=2, description="Fewest frames of a video.")
    max_frames: int = Field(default=768, ge=2, description="Most frames of a video.")
    total_pixels: int = Field(
        default=3584 * 28 * 28, ge=1, description="Pixel budget of a video, in pixels of one temporal patch of frames."
    )
    min_pixels: int = Field(default=16 * 28 * 28, ge=1, description="Least area of a frame.")
    backend: Literal["auto", "pyav", "dali-cpu", "dali-gpu"] = Field(
        default="auto", description="What decodes videos; 'auto' is PyAV, which reads every codec."
    )
    num_workers: int = Field(
        default=2, ge=0, description="Processes of a rank that decode ahead; 0 decodes between steps."
    )
    video_cache_mb: int = Field(
        default=256,
        ge=0,
        description="Decoded videos that each decoding process keeps, in MB (of the GPU with 'dali-gpu'); 0: none.",
    )

    @model_validator(mode="after")
    def _frames_are_in_order(self) -> Self:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames = {self.min_frames} is above max_frames = {self.max_frames}; lower it")
        return self


class TrainSection(Section):
    """The run and its steps."""

    stage: Literal["grpo", "sft"] = Field(default="grpo", description="'grpo' or 'sft'.")
    run_dir: Path = Field(
        default=Path("runs/latest"),
        description="Folder of the run: configuration, metrics, checkpoints, rollouts, report. A run that is there "
        "already is resumed from its newest whole checkpoint.",
    )
    seed: int = Field(default=0, ge=0, description="Of the data's order and of sampling.")
    num_steps: int | None = Field(
        default=None, ge=1, description="Optimization steps (GRPO: rollouts). Unset: as many as num_epochs take."
    )
    num_epochs: float = Field(
        default=1.0,
        gt=0,
        description="Passes over the data, where num_steps is unset. Prompts that dynamic sampling takes in place of "
        "others count, so such a run has fewer steps than the learning rate's decay was laid out for.",
    )
    prompts_per_step: int = Field(
        default=8, ge=1, description="Prompts of a step over all ranks; a multiple of the copies of the model."
    )
    microbatch_tokens: int = Field(
        default=16384,
        ge=1,
        description="Most tokens of a packed microbatch; a longer single group gets one of its own. Bounds memory.",
    )
    max_skipped_steps: int = Field(
        default=3, ge=0, description="Steps in a row with a non-finite loss or gradient after which the run stops."
    )
    step_timeout_s: float = Field(
        default=3600.0,
        gt=0,
        description="Longest step, its rollout and checkpoint included. After that it counts as hung: every rank "
        "writes the stacks of its threads to stderr and ends with code 1.",
    )


class OptimizerSection(Section):
    """Adam and its schedule."""

    learning_rate: float = Field(default=1e-6, gt=0, description="The highest; the paper: 1e-6 for GRPO, 2e-5 for SFT.")
    min_learning_rate: float = Field(default=0.0, ge=0, description="Where the decay ends.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="From the end of the warm-up to the last step; the authors' runs of GRPO: 'linear'.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    weight_decay: float = Field(default=0.0, ge=0, description="Of matrices only; biases and norms have none.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Adam's second moment.")
    epsilon: float = Field(default=1e-8, gt=0, description="Adam's.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    distributed: bool = Field(default=True, description="Divide the optimizer's state over the copies of the model.")

    @model_validator(mode="after")
    def _rates_are_in_order(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} is above learning_rate = {self.learning_rate}; lower it"
            )
        return self


class GrpoSection(Section):
    """Group relative policy optimization; the defaults are the paper's."""

    group_size: int = Field(default=8, ge=2, description="Responses a prompt (G).")
    epochs_per_rollout: int = Field(
        default=1, ge=1, description="Passes over a rollout's groups; with 1 and num_minibatches = 1 the ratio is 1."
    )
    num_minibatches: int = Field(
        default=1, ge=1, description="Optimizer steps that one pass over a rollout is divided in."
    )
    clip_low: float = Field(default=0.2, ge=0, le=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(default=0.2, ge=0, description="And above at 1 + clip_high (DAPO: 0.28).")
    dual_clip: float | None = Field(default=None, gt=1, description="Bound for negative advantages. Unset: none.")
    kl_coef: float = Field(default=0.04, ge=0, description="Weight of the KL to the reference; 0 needs no reference.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="Schulman's estimators; the gradient of 'k1' has a mean of zero, so that it holds nothing back.",
    )
    loss_normalization: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="'sequence' (GRPO: mean of each response, then of responses), 'token' (DAPO: mean of all tokens) "
        "or 'constant' (Dr.GRPO: sum over rollout.max_new_tokens).",
    )
    divide_by_std: bool = Field(default=True, description="Divide advantages by the group's standard deviation.")
    importance_level: Literal["token", "sequence"] = Field(default="token", description="'sequence' is GSPO's ratio.")
    entropy_coef: float = Field(default=0.0, ge=0, description="Weight of an entropy bonus.")
    rollout_ratio_cap: float | None = Field(
        default=None,
        gt=0,
        description="Truncated importance sampling against the engine's log-probs: the cap. Unset: none.",
    )
    overlong_buffer_tokens: int = Field(
        default=0,
        ge=0,
        description="Responses within so many tokens of the limit lose up to 1 of their reward (DAPO); 0: none.",
    )
    dynamic_sampling: bool = Field(
        default=False, description="Drop groups whose rewards are all equal, and sample others in their place (DAPO)."
    )
    max_refills: int = Field(default=4, ge=1, description="Rounds of dynamic sampling a step before it goes on short.")
    one_step_off: bool = Field(
        default=False, description="Sample the next step's responses while this one trains (needs engine 'sglang')."
    )
    reference: Literal["swap", "resident"] = Field(
        default="swap",
        description="Where the reference's weights are: 'swap' keeps them on the host and swaps them in, 'resident' "
        "keeps a second copy beside the policy.",
    )


class CheckpointSection(Section):
    """When the run is saved, and what is kept."""

    every_steps: int = Field(default=50, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints to keep.")
    keep_every: int | None = Field(default=None, ge=1, description="Also keep those of steps divisible by this.")
    asynchronous: bool = Field(default=True, description="Write while training goes on.")
    export: Literal["never", "end", "always"] = Field(
        default="end", description="Also write a Hugging Face directory: at the end, or beside every checkpoint."
    )


class LoggingSection(Section):
    """Where metrics go besides metrics.jsonl and the terminal."""

    tensorboard: bool = Field(default=True, description="Write TensorBoard events, where it is installed.")
    wandb_project: str | None = Field(default=None, description="Weights & Biases project. Unset: off.")
    mismatch_threshold: float = Field(
        default=0.1,
        gt=0,
        description="Warn when log-probs of rollout and training differ by more than this on average.",
    )


class ProfileSection(Section):
    """Where the time of some steps goes: a trace of torch's profiler and a summary, in train.run_dir/profile."""

    enabled: bool = Field(default=False, description="Profile; `vcr1 train --profile` is short for it.")
    first_step: int = Field(
        default=2, ge=1, description="First step of the profile, counted from this start; the first one warms up."
    )
    last_step: int = Field(default=3, ge=1, description="Last step of it, checkpoint included.")
    ranks: Names[int] = Field(default=(0,), min_length=1, description="Ranks that write a trace each.")

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> Self:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step = {self.last_step} comes before first_step = {self.first_step}; raise it")
        return self
