"""Predicts the seconds of one GRPO step by phase.

The pass of a stage over a microbatch takes its FLOPs divided by the reached rate, plus the bytes that tensor-parallel
ranks send divided by the link bandwidth, plus a constant overhead. Of the communication between context-parallel ranks,
only the part counts that does not overlap with attention. A pipeline of p stages computes m microbatches in

    sum of the stages' seconds + (m - 1) x seconds of the slowest stage          (1F1B without interleaving)

and its bubble is 1 - m x (mean seconds of the stages) / that time, which also holds for unequal stages. The backward
pass costs twice the forward pass (2.5 times in attention, whose kernels recompute the scores), plus recomputation. A
decoding step reads the weights once for all sequences, and the keys and values of each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum, auto

from megatron_vcr1.model.flops import Flops, forward_flops, recomputed_flops, training_flops
from megatron_vcr1.planning.devices import Device
from megatron_vcr1.planning.imbalance import work_imbalance
from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.memory import (
    EngineMemory,
    cache_bytes_per_token,
    num_key_chunks,
    num_trained,
    optimizer_state_bytes,
)
from megatron_vcr1.planning.parameters import num_parameters, stage_parameters
from megatron_vcr1.planning.traffic import (
    ContextSent,
    Sent,
    boundary_bytes,
    context_traffic,
    data_traffic,
    step_traffic,
    tensor_traffic,
    vision_gradient_bytes,
)

Pipeline = Callable[[Sequence[float], int], float]
"""Seconds of all microbatches, from the seconds of each stage and the number of microbatches."""

# Flash attention recomputes the scores in its backward pass: half of a forward pass, which MFU does not count.
SCORES_RECOMPUTED = 0.5
OPTIMIZER_BYTES = 30  # bytes that Adam reads and writes for each parameter


class Pass(Enum):
    """Work of a stage on a microbatch."""

    FORWARD = auto()
    REPEATED = auto()  # a forward pass after another one of the step, which has computed the vision features
    TRAINING = auto()  # forward and backward

    @property
    def is_training(self) -> bool:
        return self is Pass.TRAINING


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of each phase of a step."""

    decode: float  # video decoding that the other phases do not hide
    rollout: float
    reference: float
    old_log_probs: float  # only with several optimizer steps per rollout
    update: float  # forward, backward, gradient reduction over replicas, optimizer
    sync: float

    @property
    def total(self) -> float:
        return sum(getattr(self, phase.name) for phase in fields(self))


def compute_seconds(device: Device, flops: Flops) -> float:
    """Return the seconds that one device takes for the operations."""
    reached = device.efficiency
    vision = flops.patch_embed + flops.vision_layers + flops.merger
    scaled = (
        flops.text_layers / reached.text,
        vision / reached.vision,
        (flops.text_attention + flops.vision_attention) / reached.attention,
        flops.head / reached.head,
    )
    return sum(scaled) / device.flops_per_s


def stage_seconds(job: Job, layout: Layout, device: Device, kind: Pass) -> tuple[float, ...]:
    """Predict the seconds of one microbatch on each stage."""
    return tuple(
        seconds_of_stage(job, layout, device, stage, layers, kind)
        for stage, layers in enumerate(layout.stages(job.config))
    )


def seconds_of_stage(job: Job, layout: Layout, device: Device, stage: int, num_layers: int, kind: Pass) -> float:
    """Predict the seconds of one microbatch on a stage with a given number of language-model layers.

    They are linear in that number.
    """
    config, work = job.config, job.groups(layout.groups_per_microbatch)
    once = forward_flops(config, work)
    flops = once
    if kind.is_training:
        flops = training_flops(config, work, freeze=job.freeze)
        flops += recomputed_flops(config, work, layout.recompute_section, freeze=job.freeze)
        flops += Flops(
            text_attention=SCORES_RECOMPUTED * once.text_attention,
            vision_attention=SCORES_RECOMPUTED * once.vision_attention * ("vision_tower" not in job.freeze),
        )
    first, last = stage == 0, stage == layout.pipeline - 1
    encodes = first and not (job.keeps_features and kind is not Pass.FORWARD)
    # The rank with the most responses or frames; prompts are split evenly.
    tokens, responses, frames = layout.token_share(job), layout.response_share(job), layout.frame_share(job)
    # Tensor-parallel ranks that encode the same frames divide the operations, except for those of the patch embedding.
    encoders = layout.of_vision.tensor
    # `once` contains a last layer that computes only the target tokens after its attention. That layer belongs to the
    # last stage, and with sequence parallelism it computes all tokens: add what it saves back where it does not apply.
    saved = forward_flops(config, replace(work, targets=work.tokens)).text_layers - once.text_layers
    passes = flops.text_layers / once.text_layers  # 1, with training 3 or more
    fraction = num_layers / config.text.num_layers
    text_layers = fraction * (once.text_layers + saved) - (last and not layout.sequence_parallel) * saved
    stage_flops = Flops(
        patch_embed=flops.patch_embed * encodes * frames,
        vision_layers=flops.vision_layers * encodes * frames / encoders,
        vision_attention=flops.vision_attention * encodes * frames / encoders,
        merger=flops.merger * encodes * frames / encoders,
        text_layers=passes * text_layers * tokens / layout.tensor,
        text_attention=flops.text_attention * fraction * tokens / layout.tensor,
        head=flops.head * last * responses / layout.tensor,
    )
    seconds = compute_seconds(device, stage_flops)
    forward, backward = tensor_traffic(job, layout, stage, num_layers)
    link = _bandwidth(device, within_node=True)
    seconds += _sending_seconds(forward, link, device)
    if kind.is_training:
        seconds += _sending_seconds(backward, link, device)
    attention = compute_seconds(device, Flops(text_attention=once.text_attention * fraction * tokens)) / layout.tensor
    all_passes = attention * flops.text_attention / once.text_attention
    bandwidth = _bandwidth(device, within_node=layout.tensor * layout.context <= device.gpus_per_node)
    num_chunks = num_key_chunks(job, layout)
    context_forward, context_backward = context_traffic(job, layout, stage, num_layers)
    seconds += _exposed_seconds(context_forward, bandwidth, device, attention, num_chunks)
    if kind.is_training:
        seconds += _exposed_seconds(context_backward, bandwidth, device, all_passes - attention, num_chunks)
    return seconds + device.microbatch_overhead_s * (3 if kind.is_training else 1)


def _sending_seconds(sent: Sent, bandwidth: float, device: Device) -> float:
    return sent.bytes / bandwidth + sent.collectives * device.collective_latency_s


def _exposed_seconds(sent: ContextSent, bandwidth: float, device: Device, attention: float, num_chunks: int) -> float:
    """Predict the exposed time of the context-parallel collectives of one pass: when a stage waits for them.

    Keys and values are sent in chunks of heads. All chunks but one overlap with the attention of another chunk; what
    takes longer than that attention is exposed, too. In the backward pass, gathers and reduce-scatters count together.

    Args:
        attention: seconds of the stage's attention in this pass.
        num_chunks: number of chunks of heads in which keys and values are sent.
    """
    keys = _sending_seconds(sent.keys, bandwidth, device)
    exposed_keys = (keys + (num_chunks - 1) * max(keys - attention, 0.0)) / num_chunks
    return _sending_seconds(sent.features, bandwidth, device) + exposed_keys


def pipeline_seconds(stages: Sequence[float], num_microbatches: int) -> float:
    """Return the seconds of all microbatches in the 1F1B schedule."""
    return sum(stages) + (num_microbatches - 1) * max(stages)


def pipeline_bubble(stages: Sequence[float], num_microbatches: int) -> float:
    """Return the fraction of time that the stages wait, in [0, 1)."""
    busy = num_microbatches * sum(stages) / len(stages)
    return 1 - busy / pipeline_seconds(stages, num_microbatches)


def busiest_seconds(stages: Sequence[float], num_microbatches: int) -> float:
    """Return the seconds that the slowest stage computes, without waiting."""
    return num_microbatches * max(stages)


def update_seconds(
    job: Job,
    layout: Layout,
    device: Device,
    pipeline: Pipeline = pipeline_seconds,
    *,
    imbalance: float = 1.0,
) -> float:
    """Predict all optimizer steps: forward, backward, gradient reduction over replicas, optimizer.

    A reduction that overlaps the backward pass of the last microbatch takes only the time by which it is longer. Each
    optimizer step ends when the new parameters are gathered.

    Args:
        imbalance: work of the busiest replica, for which the others wait, over the mean.
    """
    compute = imbalance * _pass_seconds(job, layout, device, pipeline, Pass.TRAINING)
    holders_within_node = layout.tensor * layout.num_weight_holders <= device.gpus_per_node
    bandwidth = _bandwidth(device, within_node=holders_within_node)
    reduction, gather = (sent / bandwidth for sent in data_traffic(job, layout))
    if job.overlaps_reduction:
        forward, both = (stage_seconds(job, layout, device, each) for each in (Pass.FORWARD, Pass.TRAINING))
        reduction -= min(reduction, max(both) - max(forward))
    reduction += vision_gradient_bytes(job, layout) / _bandwidth(device, within_node=True)
    trained = max(num_trained(job, stage) for stage in stage_parameters(job.config, layout)) / layout.num_weight_holders
    optimizer = OPTIMIZER_BYTES * trained / (device.memory_bytes_per_s * device.efficiency.memory)
    if not job.optimizer_resident and not device.is_cpu:
        optimizer += 2 * trained * optimizer_state_bytes(job) / device.host_bytes_per_s  # to the device and back
    return job.num_updates * (compute + reduction + gather + optimizer)


def reference_seconds(
    job: Job,
    layout: Layout,
    device: Device,
    pipeline: Pipeline = pipeline_seconds,
    *,
    imbalance: float = 1.0,
) -> float:
    """Predict the log-probs of the reference.

    Includes the copy of its weights from the host unless they are resident: with colocated servers, it waits for the
    end of the rollout. Parameters that are not trained have no copy.

    Args:
        imbalance: as for `update_seconds`.
    """
    if not job.with_reference:
        return 0.0
    compute = imbalance * _pass_seconds(job, layout, device, pipeline, Pass.FORWARD)
    compute *= job.num_minibatches
    if job.reference_resident or device.is_cpu:
        return compute
    copied = max(num_trained(job, stage) for stage in stage_parameters(job.config, layout)) * job.dtype_bytes
    return compute + copied / device.host_bytes_per_s


def old_log_prob_seconds(job: Job, layout: Layout, device: Device, *, imbalance: float = 1.0) -> float:
    """Predict the log-probs of the policy before several optimizer steps. A single one does not need them."""
    if job.num_updates == 1:
        return 0.0
    kind = Pass.REPEATED if job.with_reference else Pass.FORWARD  # the reference's pass comes first
    return imbalance * job.num_minibatches * _pass_seconds(job, layout, device, pipeline_seconds, kind)


def _pass_seconds(
    job: Job,
    layout: Layout,
    device: Device,
    pipeline: Pipeline,
    kind: Pass,
) -> float:
    """Predict the passes of a minibatch's microbatches through all stages, including sends between stages."""
    num_microbatches = layout.num_microbatches(job)
    stages = stage_seconds(job, layout, device, kind)
    compute = pipeline(stages, num_microbatches)
    if layout.pipeline == 1:
        return compute
    # Stages are the outermost dimension of the ranks: they share a node only if the whole job does.
    hop = boundary_bytes(job, layout) / _bandwidth(device, within_node=layout.num_gpus <= device.gpus_per_node)
    return compute + (2 if kind.is_training else 1) * (layout.pipeline - 1 + num_microbatches - 1) * hop


def _bandwidth(device: Device, *, within_node: bool) -> float:
    """Return the bytes per second that one GPU sends."""
    if within_node:
        return device.link_bytes_per_s * device.efficiency.link
    return device.network_bytes_per_s * device.efficiency.network


def rollout_seconds(job: Job, device: Device, num_engines: int, engine: EngineMemory, longest_response: int) -> float:
    """Predict the rollout: prefill once per group, then decode until the longest response ends.

    Groups that do not fit into the KV cache together decode in several waves.

    Args:
        num_engines: engines that share the groups of a step.
        longest_response: tokens of the longest response of a step.
    """
    groups = -(-job.prompts_per_step // num_engines)
    prefill = groups * compute_seconds(device, forward_flops(job.config, job.prompt())) / engine.ranks
    tokens_per_group = job.prompt_tokens + job.group_size * job.response_tokens
    waves = max(1, -(-groups * tokens_per_group // max(engine.tokens, tokens_per_group)))
    bandwidth = device.memory_bytes_per_s * device.efficiency.memory
    weights = num_parameters(job.config) * job.dtype_bytes / engine.ranks / bandwidth
    collectives = 2 * job.config.text.num_layers * device.collective_latency_s * (engine.ranks > 1)
    context = job.prompt_tokens + job.response_tokens / 2
    sequences = groups * job.group_size
    cache = sequences * job.response_tokens * context * cache_bytes_per_token(job, engine.ranks) / bandwidth
    return prefill + waves * longest_response * (device.token_overhead_s + collectives + weights) + cache


def step_seconds(job: Job, layout: Layout, device: Device, engine: EngineMemory, longest_response: int) -> StepTime:
    """Predict a whole GRPO step with engines colocated on the training GPUs."""
    num_engines = max(layout.num_gpus // engine.ranks, 1)
    rollout = rollout_seconds(job, device, num_engines, engine, longest_response)
    # The busiest replica has a whole number of groups, which `Layout.num_microbatches` counts already.
    mean_groups = job.prompts_per_step / (job.num_minibatches * layout.replicas)
    imbalance = work_imbalance(job, layout.replicas, longest_response) * mean_groups / layout.groups_per_update(job)
    # A replica that is done with its reference pass goes on with its update: all wait at the end of the update only.
    reference = reference_seconds(job, layout, device, imbalance=imbalance)
    old_log_probs = old_log_prob_seconds(job, layout, device, imbalance=imbalance)
    update = update_seconds(job, layout, device, imbalance=imbalance)
    sync_bandwidth = _bandwidth(device, within_node=layout.num_gpus <= device.gpus_per_node)
    sync = step_traffic(job, layout).sync / sync_bandwidth
    frames = job.frames_per_prompt * job.prompts_per_step / layout.num_gpus
    overlapped = rollout + reference + old_log_probs + update + sync
    decode = max(0.0, frames / device.decoded_frames_per_s - overlapped)
    return StepTime(decode, rollout, reference, old_log_probs, update, sync)


def useful_flops(job: Job) -> float:
    """Return the model FLOPs of a step's passes for reference, old log-probs and updates; each prompt counts once."""
    work = job.groups(job.prompts_per_step)
    update, forward = training_flops(job.config, work, freeze=job.freeze), forward_flops(job.config, work)
    kept = forward.vision if job.keeps_features else 0.0  # computed by the first pass only
    num_forward_passes = job.with_reference + (job.num_updates > 1)
    total = job.num_passes * update.total + num_forward_passes * forward.total
    return total - (job.num_passes + num_forward_passes - 1) * kept
