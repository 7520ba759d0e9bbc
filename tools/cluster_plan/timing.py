"""Seconds of one GRPO step by phase.

A stage's pass over a microbatch takes its operations over the rate that is reached, the bytes that tensor-parallel
ranks send over their link's, and a constant for launches. A pipeline of p stages works off m microbatches in

    sum of the stages' seconds + (m - 1) x the slowest stage's          (1F1B without interleaving)

so that 1 - m x (mean of the stages) / that is its bubble, unequal stages included. Backward is twice forward (attention
kernels compute scores again: 2.5 times) and what recomputation adds. Sampling reads the weights for every token of all
sequences at once, and each sequence its keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from cluster_plan.devices import Device
from cluster_plan.job import Job, Layout
from cluster_plan.memory import cache_bytes_per_token
from cluster_plan.parameters import num_parameters, stage_parameters
from cluster_plan.traffic import boundary_bytes, step_traffic, tensor_traffic
from megatron_vcr1.model.flops import Flops, forward_flops, recomputed_flops, training_flops

ATTENTION_AGAIN = 0.5  # of forward: what flash attention's backward pass computes again, counted as no useful work
Pipeline = Callable[[Sequence[float], int], float]
OPTIMIZER_BYTES = 30  # read and written for each number that a rank updates


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step; what runs beside something longer costs nothing and is left out."""

    decode: float  # what of decoding the rest of the step does not hide
    rollout: float
    reference: float
    update: float  # forward, backward, gradients over the copies, optimizer
    sync: float

    @property
    def total(self) -> float:
        return sum(getattr(self, one.name) for one in fields(self))


def compute_seconds(device: Device, flops: Flops) -> float:
    """Seconds of these operations on one device."""
    reached, peak = device.efficiency, device.flops_per_s
    attention = flops.text_attention + flops.vision_attention
    vision = flops.patch_embed + flops.vision_layers + flops.merger
    parts = (
        flops.text_layers / reached.text,
        vision / reached.vision,
        attention / reached.attention,
        flops.head / reached.head,
    )
    return sum(parts) / peak


def stage_seconds(job: Job, layout: Layout, device: Device, *, training: bool) -> tuple[float, ...]:
    """Seconds of one microbatch on each stage: forward, and with `training`, backward."""
    return tuple(
        seconds_of_stage(job, layout, device, stage, layers, training=training)
        for stage, layers in enumerate(layout.stages(job.config))
    )


def seconds_of_stage(job: Job, layout: Layout, device: Device, stage: int, num_layers: int, *, training: bool) -> float:
    """Of a stage with so many language-model layers; linear in their number."""
    config, work = job.config, job.groups(layout.groups_per_microbatch)
    once = forward_flops(config, work)
    flops = once
    if training:
        flops = training_flops(config, work, freeze=job.freeze)
        flops += recomputed_flops(config, work, layout.recompute_section, freeze=job.freeze)
        flops += Flops(
            text_attention=ATTENTION_AGAIN * once.text_attention,
            vision_attention=ATTENTION_AGAIN * once.vision_attention * ("vision_tower" not in job.freeze),
        )
    first, last = stage == 0, stage == layout.pipeline - 1
    # Behind its attention the last layer computes the targets' rows alone, but for sequence parallelism.
    spared = forward_flops(config, replace(work, targets=work.tokens)).text_layers - once.text_layers
    again = flops.text_layers / once.text_layers  # with backward: 3 or more times
    layers = num_layers / config.text.num_layers
    text_layers = layers * (once.text_layers + spared) - (last and not layout.sequence_parallel) * spared
    mine = Flops(
        patch_embed=flops.patch_embed * layout.tensor * first,  # whole on every rank
        vision_layers=flops.vision_layers * first,
        vision_attention=flops.vision_attention * first,
        merger=flops.merger * first,
        text_layers=again * text_layers,
        text_attention=flops.text_attention * layers,
        head=flops.head * last,
    )
    forward, backward = tensor_traffic(job, layout, stage, num_layers)
    sent = forward.bytes + backward.bytes * training
    collectives = forward.collectives + backward.collectives * training
    return (
        compute_seconds(device, mine) / layout.tensor
        + sent / (device.link_bytes_per_s * device.efficiency.link)
        + collectives * device.collective_s
        + device.microbatch_s * (3 if training else 1)
    )


def pipeline_seconds(stages: Sequence[float], num_microbatches: int) -> float:
    """All microbatches through all stages."""
    return sum(stages) + (num_microbatches - 1) * max(stages)


def pipeline_bubble(stages: Sequence[float], num_microbatches: int) -> float:
    """Share of the stages' time that is spent waiting, in [0, 1)."""
    busy = num_microbatches * sum(stages) / len(stages)
    return 1 - busy / pipeline_seconds(stages, num_microbatches)


def busiest_seconds(stages: Sequence[float], num_microbatches: int) -> float:
    """Of them, what the slowest stage computes, without its waiting."""
    return num_microbatches * max(stages)


def update_seconds(
    job: Job, layout: Layout, device: Device, gpus_per_node: int, pipeline: Pipeline = pipeline_seconds
) -> float:
    """Forward and backward of a step's microbatches, gradients over the copies, the optimizer."""
    num_microbatches = layout.microbatches(job)
    compute = pipeline(stage_seconds(job, layout, device, training=True), num_microbatches)
    hops = 2 * (layout.pipeline - 1 + num_microbatches - 1) * _hop_seconds(job, layout, device, gpus_per_node)
    network = _rate(device, layout.tensor * layout.copies <= gpus_per_node)
    gradients = step_traffic(job, layout).data / network
    numbers = max(one.total for one in stage_parameters(job.config, layout)) / layout.copies
    optimizer = OPTIMIZER_BYTES * numbers / (device.memory_bytes_per_s * device.efficiency.memory)
    return compute + hops + gradients + optimizer


def reference_seconds(
    job: Job, layout: Layout, device: Device, gpus_per_node: int, pipeline: Pipeline = pipeline_seconds
) -> float:
    """The reference's log-probs; its weights come from the host and the policy's come back, unless both are there."""
    if not job.with_reference:
        return 0.0
    num_microbatches = layout.microbatches(job)
    compute = pipeline(stage_seconds(job, layout, device, training=False), num_microbatches)
    hops = (layout.pipeline - 1 + num_microbatches - 1) * _hop_seconds(job, layout, device, gpus_per_node)
    weights = max(one.total for one in stage_parameters(job.config, layout)) * job.dtype_bytes
    # Each way, one tensor after another: there for the policy's, back for the reference's, and the same again.
    swap = 0.0 if job.reference_resident or device.is_cpu else 4 * weights / device.host_bytes_per_s
    return compute + hops + swap


def _hop_seconds(job: Job, layout: Layout, device: Device, gpus_per_node: int) -> float:
    """A microbatch's rows from one stage to the next. Stages are the outermost dimension of the ranks."""
    if layout.pipeline == 1:
        return 0.0
    return boundary_bytes(job, layout) / _rate(device, layout.num_gpus <= gpus_per_node)


def _rate(device: Device, within_node: bool) -> float:
    """Bytes a second that one GPU sends."""
    if within_node:
        return device.link_bytes_per_s * device.efficiency.link
    return device.network_bytes_per_s * device.efficiency.network


def rollout_seconds(
    job: Job, device: Device, num_engines: int, ranks: int, longest_response: int, cache_tokens: int
) -> float:
    """Prompts once a group, then token by token until the longest response ends; in waves if the cache is too small.

    Args:
        num_engines: that share a step's groups.
        ranks: GPUs of an engine.
        longest_response: tokens of the longest response of a step.
        cache_tokens: that an engine holds.
    """
    groups = -(-job.prompts_per_step // num_engines)
    prefill = groups * compute_seconds(device, forward_flops(job.config, job.prompt())) / ranks
    tokens_of_group = job.prompt_tokens + job.group_size * job.response_tokens
    waves = max(1, -(-groups * tokens_of_group // max(cache_tokens, tokens_of_group)))
    reads = device.memory_bytes_per_s * device.efficiency.memory
    weights = num_parameters(job.config) * job.dtype_bytes / ranks / reads
    meetings = 2 * job.config.text.num_layers * device.collective_s * (ranks > 1)
    context = job.prompt_tokens + job.response_tokens / 2
    sequences = groups * job.group_size
    cache = sequences * job.response_tokens * context * cache_bytes_per_token(job, ranks) / reads
    return prefill + waves * longest_response * (device.token_s + meetings + weights) + cache


def step_seconds(
    job: Job,
    layout: Layout,
    device: Device,
    gpus_per_node: int,
    *,
    engine_ranks: int,
    cache_tokens: int,
    longest_response: int,
) -> StepTime:
    """One whole GRPO step with engines on the training's GPUs."""
    num_engines = max(layout.num_gpus // engine_ranks, 1)
    rollout = rollout_seconds(job, device, num_engines, engine_ranks, longest_response, cache_tokens)
    reference = reference_seconds(job, layout, device, gpus_per_node)
    update = update_seconds(job, layout, device, gpus_per_node)
    sync = step_traffic(job, layout).sync / _rate(device, layout.num_gpus <= gpus_per_node)
    frames = job.frames_per_prompt * job.prompts_per_step / layout.num_gpus
    hidden = rollout + reference + update + sync
    return StepTime(max(0.0, frames / device.decoded_frames_per_s - hidden), rollout, reference, update, sync)


def useful_flops(job: Job) -> float:
    """Model FLOPs of a step's update and of the reference's pass, prompts counted once."""
    work = job.groups(job.prompts_per_step)
    total = training_flops(job.config, work, freeze=job.freeze).total
    return total + (forward_flops(job.config, work).total if job.with_reference else 0.0)
