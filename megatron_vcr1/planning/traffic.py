"""Predicts the bytes that a GPU sends in one step, by parallel dimension.

A ring collective of n ranks on a buffer of B bytes: an all-reduce sends 2 (n - 1) / n B per rank, an all-gather or a
reduce-scatter of the whole buffer (n - 1) / n B. Sequence parallelism replaces each all-reduce by one of each, which
sends the same bytes.

tensor    every layer: 2 all-reduces in the forward pass (after attention and MLP) and 2 in the backward pass, and the
          forward ones again with full recomputation. With sequence parallelism also 2 all-gathers of the inputs for the
          weight gradients. Without it, the last layer computes only the target tokens after its attention. With
          parallel.vision = "data", the vision tower sends nothing but an all-gather of its features, and once per step
          an all-reduce of its gradients
pipeline  the hidden states of a microbatch to the next stage, and their gradients back
context   every layer: an all-gather of the prompts' keys and values forward; backward another one and a reduce-scatter
          of their gradients. Vision features to the ranks of their tokens, and their gradients back
data      of trained parameters: gradients to the rank with their optimizer state, and updated weights back
sync      the weights to the engines
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.memory import key_size, num_key_chunks, num_trained
from megatron_vcr1.planning.parameters import num_parameters, stage_parameters


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that the busiest GPU sends in a step."""

    tensor: float
    context: float
    pipeline: float
    data: float
    sync: float


@dataclass(frozen=True, slots=True)
class Sent:
    """The traffic of one rank within its tensor- or context-parallel group, for one microbatch."""

    bytes: float = 0.0
    collectives: int = 0


@dataclass(frozen=True, slots=True)
class ContextSent:
    """The context-parallel traffic of one rank for one microbatch, in the forward or the backward pass."""

    keys: Sent = Sent()  # keys and values of the prompts, or their gradients; overlaps with attention
    features: Sent = Sent()  # vision features, or their gradients

    @property
    def bytes(self) -> float:
        return self.keys.bytes + self.features.bytes


def step_traffic(job: Job, layout: Layout) -> Traffic:
    """Predict the traffic of one GRPO step, including the forward passes of the reference and of the old policy."""
    num_microbatches = job.num_minibatches * layout.num_microbatches(job)
    num_passes, num_forward_passes = job.num_passes, job.with_reference + (job.num_updates > 1)
    tensor, context = (
        max(
            (num_passes + num_forward_passes) * forward.bytes + num_passes * backward.bytes
            for forward, backward in (
                traffic(job, layout, stage, layers) for stage, layers in enumerate(layout.stages(job.config))
            )
        )
        for traffic in (tensor_traffic, context_traffic)
    )
    # A middle stage sends hidden states forward and gradients back. With two stages, the first one sends only hidden
    # states and the last one only gradients.
    sends = 0 if layout.pipeline == 1 else num_passes * (1 + (layout.pipeline > 2)) + num_forward_passes
    return Traffic(
        tensor=num_microbatches * tensor + job.num_updates * vision_gradient_bytes(job, layout),
        context=num_microbatches * context,
        pipeline=num_microbatches * sends * boundary_bytes(job, layout),
        data=job.num_updates * sum(data_traffic(job, layout)),
        sync=num_parameters(job.config) * job.dtype_bytes,
    )


def data_traffic(job: Job, layout: Layout) -> tuple[float, float]:
    """Predict the bytes that a rank sends in one update: to reduce gradients, to gather updated parameters."""
    trained = max(num_trained(job, stage) for stage in stage_parameters(job.config, layout))
    ring = (1 - 1 / layout.num_weight_holders) * trained
    return ring * job.gradient_bytes, ring * job.dtype_bytes


def tensor_traffic(job: Job, layout: Layout, stage: int, num_layers: int) -> tuple[Sent, Sent]:
    """Predict the tensor-parallel traffic of one microbatch on a stage: forward pass, backward pass.

    Args:
        num_layers: language-model layers of the stage.
    """
    if layout.tensor == 1:
        return Sent(), Sent()
    config, work = job.config, job.groups(layout.groups_per_microbatch)
    text, vision, dtype_bytes = config.text, config.vision, job.dtype_bytes
    first, last = stage == 0, stage == layout.pipeline - 1
    sharded_tower = first and layout.vision == "tensor"
    # Bytes of the buffers that are communicated.
    text_hidden = work.tokens * text.hidden_size * dtype_bytes
    vision_hidden = work.patches * vision.hidden_size * dtype_bytes
    vision_features = work.patches // vision.patches_per_token * text.hidden_size * dtype_bytes
    target_hidden = work.targets * text.hidden_size * dtype_bytes

    # All-reduces after attention and MLP of every layer, and of their input gradients in the backward pass.
    layers = [text_hidden] * (2 * num_layers) + [vision_hidden] * (2 * vision.num_layers * sharded_tower)
    forward_layers, backward_layers = list(layers), list(layers)
    if last and not layout.sequence_parallel:
        forward_layers[:2], backward_layers[:1] = [target_hidden] * 2, [target_hidden]
    forward_sums = forward_layers + [text_hidden] * first + [vision_features] * sharded_tower
    forward_sums += [4 * work.targets] * (2 * last)
    backward_sums = backward_layers + [vision_hidden] * sharded_tower + [4 * work.targets * text.hidden_size] * last

    forward_gathers = [vision_features] * (first and not sharded_tower)
    backward_gathers: list[int] = []
    gathers_qkv = text.num_kv_heads < layout.tensor  # ranks share key-value heads and gather the projection's output
    if gathers_qkv:
        projection = work.tokens * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim * dtype_bytes
        forward_gathers += [projection] * num_layers
        backward_gathers += [projection] * num_layers
    if layout.sequence_parallel:
        forward_gathers += [vision_hidden] * sharded_tower + [text_hidden] * last  # the outputs of both models
        # The gradients of their inputs, and the inputs of every layer for the weight gradients.
        backward_gathers += [vision_hidden] * sharded_tower + [text_hidden] * first + layers
    if layout.recompute == "full":
        backward_sums += forward_layers
        backward_gathers += [projection] * num_layers if gathers_qkv else []
    share = layout.token_share(job)  # of the tokens, on this context-parallel rank
    return _sent(layout, share, forward_sums, forward_gathers), _sent(layout, share, backward_sums, backward_gathers)


def vision_gradient_bytes(job: Job, layout: Layout) -> float:
    """Return the bytes that a rank sends in one update to sum a whole vision tower's gradients over tensor ranks."""
    if layout.vision == "tensor" or "vision_tower" in job.freeze:
        return 0.0
    first_stage = stage_parameters(job.config, layout)[0]
    return 2 * (layout.tensor - 1) / layout.tensor * first_stage.vision * job.gradient_bytes


def _sent(layout: Layout, share: float, all_reduces: list[int], gathers: list[int]) -> Sent:
    ring = (layout.tensor - 1) / layout.tensor * share
    return Sent(ring * (2 * sum(all_reduces) + sum(gathers)), len(all_reduces) + len(gathers))


def key_bytes(job: Job, layout: Layout) -> float:
    """Return the bytes that a context-parallel rank sends to gather the keys and values of one layer, once.

    With N ranks, P prompt tokens and k values of a token's keys on a tensor-parallel rank: (N - 1) ceil(P / N) 2k.
    """
    text, ranks = job.config.text, layout.context
    key = key_size(text, layout.tensor)
    slots = math.ceil(job.prompt_tokens / ranks) * layout.groups_per_microbatch
    return (ranks - 1) * slots * 2 * key * job.dtype_bytes


def context_traffic(job: Job, layout: Layout, stage: int, num_layers: int) -> tuple[ContextSent, ContextSent]:
    """Predict the context-parallel traffic of one microbatch on a stage: forward pass, backward pass."""
    ranks = layout.context
    if ranks == 1:
        return ContextSent(), ContextSent()
    key_values, num_gathers = num_layers * key_bytes(job, layout), num_layers * num_key_chunks(job, layout)
    features = Sent()
    if stage == 0:
        vision = job.config.vision
        num_features = job.groups(layout.groups_per_microbatch).patches / vision.patches_per_token
        # The features that a rank encodes belong to all ranks alike, so it keeps 1 / N of them.
        encoded = num_features / layout.of_vision.context
        features = Sent(encoded * (1 - 1 / ranks) * vision.out_hidden_size * job.dtype_bytes, 1)
    backward = Sent(2 * key_values, 2 * num_gathers)  # gathers, and reduce-scatters of the gradients
    return ContextSent(Sent(key_values, num_gathers), features), ContextSent(backward, features)


def boundary_bytes(job: Job, layout: Layout) -> float:
    """Return the bytes that one rank sends to the next stage for one microbatch."""
    tokens = job.group_tokens * layout.groups_per_microbatch * layout.token_share(job)
    ranks = layout.tensor if layout.sequence_parallel else 1
    return tokens * job.config.text.hidden_size * job.dtype_bytes / ranks
