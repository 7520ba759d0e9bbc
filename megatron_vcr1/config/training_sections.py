"""Sections [train], [optimizer], [grpo], [checkpoint], [logging] and [profile]: the training run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_vcr1.config.section import Names, Section, Weights

MAX_BFLOAT16_DECAY = 0.99
"""The highest decay rate of moments in bfloat16. Half of a bfloat16's last bit is 0.2 to 0.4 % of its value; a moment
has to change by more than that in a step."""


class TrainSection(Section):
    """The training run: its stage, run directory, length and batch size."""

    stage: Literal["grpo", "sft"] = Field(
        default="grpo",
        description="Training stage: 'grpo' (reinforcement learning) or 'sft' (supervised fine-tuning).",
    )
    run_dir: Path = Field(
        default=Path("runs/latest"),
        description="Run directory: settings, metrics, checkpoints, rollouts and report. If it already holds a run, "
        "training resumes from the run's newest intact checkpoint.",
    )
    seed: int = Field(default=0, ge=0, description="Seed for data order and sampling; change it for another run.")
    num_steps: int | None = Field(
        default=None,
        ge=1,
        description="Number of training steps. A step of GRPO is one rollout and the optimizer steps that follow it; "
        "a step of SFT is one optimizer step. Unset: the number of steps that train.num_epochs takes.",
    )
    num_epochs: float = Field(
        default=1.0,
        gt=0,
        description="Number of passes over the training data if train.num_steps is unset. The replacement prompts of "
        "dynamic sampling count too: such a run ends after fewer steps than its learning-rate schedule assumes.",
    )
    prompts_per_step: int = Field(
        default=8,
        ge=1,
        description="Number of prompts per training step, over all ranks. Must be a multiple of the number of "
        "data-parallel replicas. More prompts give less noisy gradients and use GPUs better.",
    )
    microbatch_tokens: int = Field(
        default=16384,
        ge=1,
        description="Maximum number of tokens in a packed microbatch; a group that is longer gets a microbatch of its "
        "own. Bounds the memory for activations. Raise it while the update fits in memory, lower it when it does not.",
    )
    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        description="Number of consecutive steps with a non-finite loss or gradient norm that are tolerated. The "
        "update of such a step is skipped; one more of them stops the run.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use only algorithms whose results do not depend on the order in which a GPU's threads finish, so "
        "that the same run on the same machine gives the same numbers. Slower. On CPUs runs are deterministic anyway. "
        "Set it to reproduce or debug a run.",
    )
    step_timeout_s: float = Field(
        default=3600.0,
        gt=0,
        description="Maximum duration of a step in seconds, with its rollout and checkpoint. After that the step "
        "counts as hung: every rank writes the stack traces of its threads to stderr and exits with code 1. Lower it "
        "to notice hangs sooner; raise it if a step with its checkpoint takes longer.",
    )


class OptimizerSection(Section):
    """The Adam optimizer and the learning-rate schedule."""

    learning_rate: float = Field(
        default=1e-6,
        gt=0,
        description="Peak learning rate, reached at the end of the warm-up. The paper uses 1e-6 for GRPO and 2e-5 for "
        "SFT.",
    )
    min_learning_rate: float = Field(
        default=0.0,
        ge=0,
        description="Learning rate that the decay reaches at the end of the run, after the last step. Only with decay.",
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Shape of the learning-rate decay between the end of the warm-up and the end of the run. The "
        "paper's GRPO runs use 'linear'. Use 'linear' or 'cosine' for runs of a fixed length.",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Number of steps over which the learning rate rises linearly from 0. Use some steps of warm-up "
        "with a high learning rate, or if the first steps are unstable.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Weight-decay coefficient (decoupled, as in AdamW). Applies to matrices only, not to biases and "
        "norms. Raise it to regularize SFT of several epochs.",
    )
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay rate of Adam's first moment. It rarely needs a change."
    )
    beta2: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Decay rate of Adam's second moment. Lower it, for example to 0.95, if the gradient norm has "
        "spikes, or for moments in bfloat16.",
    )
    epsilon: float = Field(
        default=1e-8,
        gt=0,
        description="Constant that Adam adds to the denominator for stability; it rarely needs a change.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Maximum global gradient norm; larger gradients are scaled down to it. 0: no clipping. Lower it if "
        "single steps disturb the training.",
    )
    distributed: bool = Field(
        default=True,
        description="Distributed optimizer: shard the optimizer state over the data-parallel replicas instead of "
        "replicating it. Turn it off only for comparisons.",
    )
    state: Literal["resident", "host"] = Field(
        default="resident",
        description="Location of the optimizer's state, that is Adam's moments and, with model.dtype = 'bfloat16', the "
        "float32 master weights: 'resident' keeps it on the GPU; 'host' keeps it in host memory and copies it to the "
        "GPU for each optimizer step, when the activations are gone, and back. Use 'host' to give the memory to the "
        "activations of long prompts or to colocated servers; the optimizer step needs as much as before.",
    )
    first_moment_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Data type in which Adam's first moments are stored. 'bfloat16' needs beta1 <= 0.99. It saves 2 "
        "bytes per parameter, divided by the number of replicas.",
    )
    second_moment_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Data type in which Adam's second moments are stored. 'bfloat16' needs beta2 <= 0.99: with the "
        "default of 0.999, a step changes them by less than half of their last bit, so they would never decrease. It "
        "saves 2 bytes per parameter, divided by the number of replicas.",
    )
    grad_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Data type of the gradient buffers, in which gradients are added up over microbatches and reduced "
        "over the replicas. 'bfloat16' halves their memory and the bytes that are sent, but rounds every sum to 8 "
        "bits, the head's also for every chunk of tokens. It needs model.dtype = 'bfloat16'. It saves memory only with "
        "several replicas: the optimizer step converts this rank's shard of the gradients to float32.",
    )
    overlap_grad_reduce: bool = Field(
        default=False,
        description="Reduce the gradients over the replicas in parts, while the backward pass of the last microbatch "
        "computes the next ones, instead of all at once after it. Set it with several replicas, above all on several "
        "nodes.",
    )
    overlap_param_gather: bool = Field(
        default=False,
        description="Gather the updated parameters from the replicas while the next forward pass computes, instead of "
        "before it. Needs optimizer.distributed and optimizer.overlap_grad_reduce. It helps if a forward pass is what "
        "follows: in SFT, and between the optimizer steps of a GRPO step. The weight sync waits for all parameters.",
    )

    @model_validator(mode="after")
    def _check_learning_rates(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} is above learning_rate = {self.learning_rate}; lower "
                "min_learning_rate"
            )
        return self

    @model_validator(mode="after")
    def _check_moments(self) -> Self:
        for name, beta in (("first", "beta1"), ("second", "beta2")):
            decay = getattr(self, beta)
            if getattr(self, f"{name}_moment_dtype") == "bfloat16" and decay > MAX_BFLOAT16_DECAY:
                raise ValueError(
                    f"{name}_moment_dtype = 'bfloat16' needs {beta} <= {MAX_BFLOAT16_DECAY}, not {decay}: rounding "
                    f"would undo the decay of the moments; lower {beta}, or set {name}_moment_dtype = 'float32'"
                )
        return self

    @model_validator(mode="after")
    def _check_overlaps(self) -> Self:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            raise ValueError(
                "overlap_param_gather needs distributed = true, which shards the optimizer state, and "
                "overlap_grad_reduce = true, which divides the parameters into buckets; set both, or unset "
                "overlap_param_gather"
            )
        return self


class GrpoSection(Section):
    """Group relative policy optimization (GRPO). The defaults are the paper's."""

    group_size: int = Field(
        default=8,
        ge=2,
        description="Group size G: number of responses sampled per prompt. Raise it if many groups have equal rewards.",
    )
    epochs_per_rollout: int = Field(
        default=1,
        ge=1,
        description="Number of passes over the groups of a rollout. With 1 pass and 1 minibatch the update is "
        "on-policy: the ratio is 1 and nothing is clipped. Raise it if rollouts take most of the time.",
    )
    num_minibatches: int = Field(
        default=1,
        ge=1,
        description="Number of minibatches per pass over a rollout, with one optimizer step each. Must divide "
        "train.prompts_per_step. Raise it with large steps.",
    )
    clip_low: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Lower clip range: the ratio is clipped below at 1 - clip_low. Matters only with several updates "
        "per rollout.",
    )
    clip_high: float = Field(
        default=0.2,
        ge=0,
        description="Upper clip range: the ratio is clipped above at 1 + clip_high. DAPO uses 0.28.",
    )
    dual_clip: float | None = Field(
        default=None,
        gt=1,
        description="Dual-clip bound c: for negative advantages A the surrogate objective is at least c * A, however "
        "large the ratio. Unset: no bound. Set it, for example to 3, if ratios explode.",
    )
    kl_coef: float = Field(
        default=0.04,
        ge=0,
        description="Coefficient of the KL divergence to the reference. 0: no KL term, and no reference is kept. Raise "
        "it if the policy drifts from useful responses; set it to 0 to save time and memory.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="Estimator of the KL divergence ('k1', 'k2' and 'k3' in Schulman's notation). The gradient of 'k1' "
        "is zero in expectation, so it does not regularize. Change it only for comparisons.",
    )
    loss_normalization: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="Normalization of the loss: 'sequence' (GRPO: mean over the tokens of each response, then over "
        "responses), 'token' (DAPO: mean over all tokens) or 'constant' (Dr. GRPO: sum over the tokens of each "
        "response divided by rollout.max_new_tokens, then mean over responses). Change it if responses grow without a "
        "gain in reward.",
    )
    divide_by_std: bool = Field(
        default=True,
        description="Divide advantages by the standard deviation of the group's rewards. Dr.GRPO turns it off, because "
        "the division favours prompts that are almost always or almost never solved.",
    )
    importance_level: Literal["token", "sequence"] = Field(
        default="token",
        description="Level of the importance ratio: 'token' (GRPO) or 'sequence' (GSPO: one length-normalized ratio "
        "per response). Use 'sequence' with a narrow clip if token ratios are noisy.",
    )
    entropy_coef: float = Field(
        default=0.0, ge=0, description="Coefficient of the entropy bonus. 0: none. Try 0.001 if the entropy collapses."
    )
    rollout_ratio_cap: float | None = Field(
        default=None,
        gt=0,
        description="Cap for truncated importance sampling: token losses are weighted by the ratio of the trainer's "
        "probability to the rollout engine's, up to this cap. Unset: no correction. Set it, for example to 2, if "
        "mismatch/mean_abs is high, and with one_step_off.",
    )
    overlong_buffer_tokens: int = Field(
        default=0,
        ge=0,
        description="Length of the soft overlong penalty in tokens (DAPO): over the last overlong_buffer_tokens before "
        "rollout.max_new_tokens, a response loses a linearly growing part of its reward, up to 1. 0: no penalty. Set "
        "it if responses grow until they are truncated.",
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="Dynamic sampling (DAPO): drop groups whose rewards are all equal, and sample other prompts in "
        "their place. Set it if groups/zero_variance is high and rollouts are cheap.",
    )
    max_refills: int = Field(
        default=4,
        ge=1,
        description="Maximum number of refills (rounds of dynamic sampling) per step. After that the step trains on "
        "the groups that it has. Raise it if groups are still missing then.",
    )
    one_step_off: bool = Field(
        default=False,
        description="Sample the responses of the next step while the current step trains, so that they are one policy "
        "version old. Needs rollout.engine = 'sglang' with separate servers. Set it if rollouts take about as long as "
        "updates.",
    )
    reference: Literal["host", "resident"] = Field(
        default="host",
        description="Location of the reference's weights: 'host' keeps them in host memory and copies them to the "
        "gradient buffers, which are not in use then, for the reference's forward pass; 'resident' keeps them on the "
        "GPU. Use 'resident' if there is memory for it.",
    )


class RewardsSection(Section):
    """How the parts of a reward are combined. Used by GRPO only."""

    weights: Weights = Field(
        default={},
        description="Weight of each part of the reward in the total, by name, such as {format = 0.5, iou = 2.0}. A "
        "part that is not named has weight 1, as in the paper. The command line takes --rewards.weights "
        "format=0.5,iou=2.0 as well. Set it if one part dominates the total.",
    )


class CheckpointSection(Section):
    """When checkpoints are written, which ones are kept, and what is exported."""

    every_steps: int = Field(
        default=50,
        ge=1,
        description="Number of steps between checkpoints. The last step of a run is always saved too. Lower it if "
        "steps are long: a crash loses the steps since the last checkpoint.",
    )
    keep_last: int = Field(
        default=2, ge=1, description="Number of newest checkpoints to keep; raise it to go back further."
    )
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="Also keep, for good, the checkpoints of steps that are divisible by this number. Unset: only the "
        "most recent ones are kept.",
    )
    keep_best: str | None = Field(
        default=None,
        description="Also keep the checkpoint with the highest value of this validation metric, given as LABEL/METRIC, "
        "for example 'charades_sta/mIoU'. A checkpoint is saved whenever a validation improves it. Unset: none.",
    )
    asynchronous: bool = Field(
        default=True,
        description="Write checkpoints in a background thread while training continues. Needs host memory for a copy "
        "of each rank's part of the checkpoint. Turn it off if host memory is short.",
    )
    export: Literal["never", "end", "best", "always"] = Field(
        default="end",
        description="When to export a Hugging Face directory to train.run_dir/export: 'never', 'end' (the last step, "
        "after it), 'best' (the checkpoint of checkpoint.keep_best, after the last step) or 'always' (every "
        "checkpoint, to export/step_N).",
    )


class LoggingSection(Section):
    """Where metrics are sent, in addition to metrics.jsonl and the terminal."""

    tensorboard: bool = Field(
        default=True, description="Write TensorBoard event files to train.run_dir, if tensorboard is installed."
    )
    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project to log to; needs wandb. Unset: no logging there."
    )
    mismatch_threshold: float = Field(
        default=0.1,
        gt=0,
        description="Log a warning when the log-probs of the rollout engine and of training differ by more than this "
        "in a step (mean absolute difference per token, in nats). Raise it if a known difference, such as FP8, exceeds "
        "it.",
    )


class ProfileSection(Section):
    """Profile of a few training steps: a torch.profiler trace and a table of times, in train.run_dir/profile."""

    enabled: bool = Field(
        default=False, description="Enable the profiler. `vcr1 train --profile` is short for setting this to true."
    )
    first_step: int = Field(
        default=2,
        ge=1,
        description="First step to profile, counted from the start of this process. Step 1 includes one-time "
        "initialization.",
    )
    last_step: int = Field(
        default=3, ge=1, description="Last step to profile, inclusive; its checkpoint is profiled too."
    )
    ranks: Names[int] = Field(
        default=(0,), min_length=1, description="Ranks to profile; each of them writes a trace of its own."
    )

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.last_step < self.first_step:
            raise ValueError(
                f"last_step = {self.last_step} comes before first_step = {self.first_step}; raise last_step"
            )
        return self
