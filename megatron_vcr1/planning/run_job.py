"""The job and the layout that a run's settings describe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.config.layout import check_batch_size, check_layout
from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.frame_rules import PixelOptions
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.planning.job import STAMP_TOKENS, Job, Layout
from megatron_vcr1.text_files import read_lines

TEXT_TOKENS = 256  # of a prompt; its video fills data.total_pixels
MIN_PROMPT_TOKENS = 128  # see `job.square_video`


def job_of_run(
    config: RunConfig,
    model: ModelConfig,
    *,
    response_tokens: int,
    prompt_tokens: int | None = None,
    num_samples: int | None = None,
) -> Job:
    """Return the job of a run.

    Args:
        model: configuration of the run's model.
        response_tokens: mean length of the responses.
        prompt_tokens: length of a prompt; None assumes that its video fills data.total_pixels.
        num_samples: samples per epoch; None counts the lines of the manifests.
    """
    train, grpo, optimizer = config.train, config.grpo, config.optimizer
    is_grpo = train.stage == "grpo"
    if train.num_steps is not None:
        num_samples, num_epochs = train.num_steps * train.prompts_per_step, 1.0
    else:
        manifests = [source.manifest for source in config.data.sources]
        num_samples, num_epochs = num_samples or count_samples(manifests), train.num_epochs
    return Job(
        config=model,
        prompts_per_step=train.prompts_per_step,
        group_size=grpo.group_size if is_grpo else 1,
        prompt_tokens=prompt_tokens or longest_prompt(config.data, model),
        response_tokens=response_tokens,
        num_samples=num_samples,
        num_epochs=num_epochs,
        num_passes=grpo.epochs_per_rollout if is_grpo else 1,
        num_minibatches=grpo.num_minibatches if is_grpo else 1,
        dtype_bytes=_bytes_of(config.model.dtype),
        freeze=config.model.freeze,
        with_reference=is_grpo and grpo.kl_coef > 0,
        reference_resident=grpo.reference == "resident",
        offloads_inputs=config.recompute.offload,
        gradient_bytes=_bytes_of(optimizer.grad_dtype),
        moment_bytes=_bytes_of(optimizer.first_moment_dtype) + _bytes_of(optimizer.second_moment_dtype),
        optimizer_resident=optimizer.state == "resident",
        overlaps_reduction=optimizer.overlap_grad_reduce,
        saves_in_background=config.checkpoint.asynchronous,
    )


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def longest_prompt(data: DataSection, model: ModelConfig) -> int:
    """Return the tokens of a prompt whose video fills data.total_pixels and has data.max_frames frames.

    At most data.max_prompt_tokens.

    Not below the shortest prompt that the planner knows, one with a small video.
    """
    vision = model.vision
    total_pixels = model.media.frames.with_defaults(PixelOptions(data.total_pixels)).total_pixels
    assert total_pixels is not None  # the rules of every family have a budget
    video_tokens = total_pixels // (vision.patch_size**2 * vision.patches_per_token)
    if model.media.timestamps_as_text:
        video_tokens += math.ceil(data.max_frames / vision.temporal_patch_size) * STAMP_TOKENS
    return max(min(video_tokens + TEXT_TOKENS, data.max_prompt_tokens), MIN_PROMPT_TOKENS)


def count_samples(manifests: Sequence[Path]) -> int:
    """Count the lines of manifests. Raises UserError if one does not exist, or if there are none."""
    if not manifests:
        raise UserError("data.sources: name at least one manifest, or give --samples")
    return sum(1 for manifest in manifests for line in read_lines(manifest) if line.strip())


def layout_of_run(config: RunConfig, job: Job, num_gpus: int) -> Layout:
    """Return the layout of a run on `num_gpus` GPUs, with the checks that `vcr1 train` does at that size.

    Raises:
        UserError: the layout is impossible.
    """
    parallel = config.parallel
    check_layout(job.config.shape, parallel, config.recompute, num_gpus)
    replicas = num_gpus // parallel.ranks_per_replica
    check_batch_size(config.train, config.grpo, replicas)
    layout = Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        replicas=replicas,
        sequence_parallel=parallel.sequence_parallel,
        vision=parallel.vision,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
        recompute=_recompute(config.recompute),
        recompute_layers=config.recompute.num_layers,
    )
    groups = min(config.train.microbatch_tokens // job.group_tokens, layout.groups_per_update(job))
    return replace(layout, groups_per_microbatch=max(1, groups))


def _recompute(section: RecomputeSection) -> str:
    """Return the planner's name; attention alone is not stored anyway, so its recomputation counts as none."""
    if section.granularity == "selective":
        return "mlp" if "mlp" in section.modules else "none"
    return section.granularity
