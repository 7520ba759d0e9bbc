"""Bytes that a GPU sends in one step, by dimension.

Ring collectives of n ranks on a buffer of B bytes: all-reduce sends 2 (n - 1) / n B, all-gather and reduce-scatter of
the whole buffer (n - 1) / n B each; sequence parallelism replaces an all-reduce by one of each, the same bytes.

tensor    every layer forward 2 all-reduces of its rows (behind attention and MLP), backward 2, again with full
          recomputation; under sequence parallelism also 2 gathers of the inputs for the weights' gradients, without
          it the last layer computes the targets' rows alone behind its attention
pipeline  the rows of a microbatch to the next stage, their gradient back
data      gradients in float32 to the rank that keeps their optimizer state, new weights back
sync      the weights to the engines
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster_plan.job import Job, Layout
from cluster_plan.memory import GRADIENT_BYTES
from cluster_plan.parameters import num_parameters, stage_parameters


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that the busiest GPU sends in a step."""

    tensor: float
    pipeline: float
    data: float
    sync: float

    @property
    def total(self) -> float:
        return self.tensor + self.pipeline + self.data + self.sync


@dataclass(frozen=True, slots=True)
class Sent:
    """By one rank within its tensor-parallel group, for one microbatch."""

    bytes: float = 0.0
    collectives: int = 0


def step_traffic(job: Job, layout: Layout) -> Traffic:
    """Of one GRPO step, the reference's pass included."""
    num_microbatches = layout.microbatches(job)
    reference = 1 if job.with_reference else 0
    within = (tensor_traffic(job, layout, stage, layers) for stage, layers in enumerate(layout.stages(job.config)))
    of_microbatch = max((1 + reference) * forward.bytes + backward.bytes for forward, backward in within)
    # An inner stage sends rows on and gradients back; of two stages, the first sends rows and the last gradients.
    crossings = 0 if layout.pipeline == 1 else 1 + reference + (layout.pipeline > 2)
    weights = max(one.total for one in stage_parameters(job.config, layout))
    return Traffic(
        tensor=num_microbatches * of_microbatch,
        pipeline=num_microbatches * crossings * boundary_bytes(job, layout),
        data=(layout.copies - 1) / layout.copies * weights * (GRADIENT_BYTES + job.dtype_bytes),
        sync=num_parameters(job.config) * job.dtype_bytes,
    )


def tensor_traffic(job: Job, layout: Layout, stage: int, num_layers: int) -> tuple[Sent, Sent]:
    """Forward and backward of one microbatch on a stage with so many language-model layers."""
    if layout.tensor == 1:
        return Sent(), Sent()
    config, work = job.config, job.groups(layout.groups_per_microbatch)
    text = config.text
    text_rows = work.tokens * text.hidden_size * job.dtype_bytes  # bytes of one buffer of rows
    vision_rows = work.patches * config.vision.hidden_size * job.dtype_bytes
    features = work.patches // config.vision.patches_per_token * text.hidden_size * job.dtype_bytes
    first, last = stage == 0, stage == layout.pipeline - 1
    # Behind attention and MLP of every layer, and before them on the way back:
    layers = [text_rows] * (2 * num_layers) + [vision_rows] * (2 * config.vision.num_layers * first)
    layers_forward, layers_backward = list(layers), list(layers)
    if last and not layout.sequence_parallel:
        target_rows = work.targets * text.hidden_size * job.dtype_bytes
        layers_forward[:2], layers_backward[:1] = [target_rows] * 2, [target_rows]
    forward_sums = [
        *layers_forward,
        *([text_rows, features] if first else []),
        *([4 * work.targets] * 2 if last else []),
    ]
    backward_sums = [
        *layers_backward,
        *([vision_rows] if first else []),
        *([4 * work.targets * text.hidden_size] if last else []),
    ]
    forward_gathers: list[int] = []
    backward_gathers: list[int] = []
    if text.num_kv_heads < layout.tensor:  # the projection's output, whole, so that ranks can share heads
        projection = work.tokens * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim * job.dtype_bytes
        forward_gathers += [projection] * num_layers
        backward_gathers += [projection] * num_layers
    if layout.sequence_parallel:
        ends = [vision_rows] * first
        forward_gathers += [*ends, *([text_rows] if last else [])]  # out of the towers
        backward_gathers += [*ends, *([text_rows] if first else []), *layers]  # into them; inputs, for the weights
    if layout.recompute == "full":
        backward_sums += layers_forward
        backward_gathers += forward_gathers[:num_layers] if text.num_kv_heads < layout.tensor else []
    ring = (layout.tensor - 1) / layout.tensor
    return (
        Sent(ring * (2 * sum(forward_sums) + sum(forward_gathers)), len(forward_sums) + len(forward_gathers)),
        Sent(ring * (2 * sum(backward_sums) + sum(backward_gathers)), len(backward_sums) + len(backward_gathers)),
    )


def boundary_bytes(job: Job, layout: Layout) -> float:
    """Rows of one microbatch between two stages, as one rank sends them."""
    rows = job.group_rows * layout.groups_per_microbatch
    share = layout.tensor if layout.sequence_parallel else 1
    return rows * job.config.text.hidden_size * job.dtype_bytes / share
