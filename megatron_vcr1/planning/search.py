"""Tries every layout of a job on a cluster: predicts its memory and time, or says why it cannot run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.errors import UserError
from megatron_vcr1.planning.devices import Cluster
from megatron_vcr1.planning.imbalance import work_imbalance
from megatron_vcr1.planning.job import RECOMPUTES, Job, Layout
from megatron_vcr1.planning.memory import EngineMemory, Memory, cache_bytes_per_token, engine_memory, training_memory
from megatron_vcr1.planning.timing import (
    Pass,
    StepTime,
    pipeline_bubble,
    seconds_of_stage,
    stage_seconds,
    step_seconds,
    useful_flops,
)
from megatron_vcr1.planning.traffic import Traffic, step_traffic

PIPELINES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8, 16)
MIN_CONTEXT_TOKENS = 4096
"""Prompt tokens of a context-parallel rank: with fewer, a prompt fits onto fewer ranks, and matmuls become small."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout that can run, with its predicted memory and time."""

    job: Job
    layout: Layout
    cluster: Cluster
    memory: tuple[Memory, ...]  # per stage
    engine: EngineMemory
    time: StepTime
    traffic: Traffic
    stages: tuple[float, ...]  # seconds of one microbatch on each stage, forward and backward
    imbalance: float  # FLOPs of the replica with the most work over the mean

    @property
    def peak_bytes(self) -> float:
        return max(stage.total for stage in self.memory)

    @property
    def bubble(self) -> float:
        return pipeline_bubble(self.stages, self.layout.num_microbatches(self.job))

    @property
    def mfu(self) -> float:
        """Return the MFU of the whole step: `useful_flops` over the peak FLOPs of all GPUs."""
        return self._mfu(self.time.total)

    @property
    def update_mfu(self) -> float:
        """Return the MFU of the phases reference, old_log_probs and update alone."""
        return self._mfu(self.time.reference + self.time.old_log_probs + self.time.update)

    def _mfu(self, seconds: float) -> float:
        return useful_flops(self.job) / (seconds * self.cluster.num_gpus * self.cluster.device.flops_per_s)

    @property
    def hours(self) -> float:
        return self.time.total * self.job.num_steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.num_gpus

    @property
    def engine_memory_fraction(self) -> float:
        """Return the fraction of a GPU's memory that is left for the engine: sglang.memory_fraction."""
        return (self.engine.weights + self.engine.cache) / self.cluster.device.memory_bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """Tensor- and pipeline-parallel sizes that cannot run, and the reason."""

    tensor: int
    pipeline: int
    reason: str
    needed_bytes: float | None = None  # memory that each GPU would need for training, and for an engine beside it


def search(job: Job, cluster: Cluster, longest_response: int) -> tuple[list[Plan], list[Refusal]]:
    """Find the fastest variant of each tensor- and pipeline-parallel size.

    Returns:
        The plans, fastest first, and the sizes that have no variant that can run.
    """
    # A tensor-parallel group must not span nodes.
    per_node = cluster.device.gpus_per_node
    tensors = [size for size in range(1, per_node + 1) if per_node % size == 0]
    sizes = [size for size in product(tensors, PIPELINES) if math.prod(size) <= cluster.num_gpus]
    found = [best_variant(job, cluster, tensor, pipeline, longest_response) for tensor, pipeline in sizes]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    refusals = [refusal for refusal in found if isinstance(refusal, Refusal)]
    return sorted(plans, key=lambda plan: plan.time.total), refusals


def best_variant(job: Job, cluster: Cluster, tensor: int, pipeline: int, longest_response: int) -> Plan | Refusal:
    """Find the fastest context-parallel size and the fastest other settings that fit.

    These are the split of the vision tower, recomputation, microbatch size and layers of the stages.

    Context-parallel sizes above 1 are tried for long prompts only.

    Returns:
        The plan, or the reason why none fits.
    """
    contexts = [
        size
        for size in CONTEXTS
        if size == 1
        or (job.prompt_tokens >= size * MIN_CONTEXT_TOKENS and tensor * pipeline * size <= cluster.num_gpus)
    ]
    found = [_best_of_size(job, cluster, tensor, pipeline, context, longest_response) for context in contexts]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    if plans:
        return min(plans, key=lambda plan: plan.time.total)
    refusals = [refusal for refusal in found if isinstance(refusal, Refusal)]
    return min(refusals, key=lambda refusal: refusal.needed_bytes or math.inf)


def _best_of_size(
    job: Job, cluster: Cluster, tensor: int, pipeline: int, context: int, longest_response: int
) -> Plan | Refusal:
    ranks = tensor * context * pipeline
    replicas, rest = divmod(cluster.num_gpus, ranks)
    if rest:
        return Refusal(tensor, pipeline, f"{cluster.num_gpus} GPUs are not a multiple of {ranks}")
    if job.prompts_per_step % replicas:
        reason = f"{job.prompts_per_step} prompts per step are not a multiple of {replicas} replicas"
        return Refusal(tensor, pipeline, reason)
    base = Layout(tensor, pipeline, replicas, sequence_parallel=tensor > 1, context=context)
    plans: list[Plan] = []
    misfits: list[Refusal] = []
    impossible: list[Refusal] = []
    for layout in _variants(job, base, cluster):
        try:
            check_layout(job.config.shape, layout.parallel, layout.recompute_section, cluster.num_gpus)
        except UserError as error:
            impossible.append(Refusal(tensor, pipeline, str(error).splitlines()[0]))
            continue
        found = evaluate(job, layout, cluster, longest_response)
        if isinstance(found, Plan):
            plans.append(found)
        else:
            misfits.append(found)
    if plans:
        return min(plans, key=lambda plan: plan.time.total)
    if not misfits:
        return impossible[0]
    closest = min(misfits, key=lambda misfit: misfit.needed_bytes or math.inf)
    return replace(closest, reason=f"{closest.reason}, even with recomputation")


def evaluate(job: Job, layout: Layout, cluster: Cluster, longest_response: int) -> Plan | Refusal:
    """Predict a layout with the best engine size, or say why it does not fit."""
    device = cluster.device
    memory = training_memory(job, layout, device)
    resident, fullest = max(stage.resident for stage in memory), max(memory, key=lambda stage: stage.total)
    engines = list(_engines(job, cluster, resident))
    tokens = job.prompt_tokens + job.group_size * longest_response  # of a group with its longest responses
    missing = min(tokens * cache_bytes_per_token(job, engine.ranks) - engine.cache for engine in engines)
    needed_bytes = max(fullest.total, device.memory_bytes + missing)
    if fullest.total > device.memory_bytes:
        part = fullest.largest_part
        reason = (
            f"training needs {math.ceil(fullest.total / 1e9)} GB of {device.memory_bytes / 1e9:.0f} "
            f"(largest part: {part}, {getattr(fullest, part) / 1e9:.0f} GB)"
        )
        return Refusal(layout.tensor, layout.pipeline, reason, needed_bytes)
    traffic = step_traffic(job, layout)
    stages = stage_seconds(job, layout, device, Pass.TRAINING)
    plans = []
    for engine in engines:
        if engine.tokens >= tokens:
            time = step_seconds(job, layout, device, engine, longest_response)
            imbalance = work_imbalance(job, layout.replicas, longest_response)
            plans.append(Plan(job, layout, cluster, memory, engine, time, traffic, stages, imbalance))
    if plans:
        return min(plans, key=lambda plan: plan.time.total)
    reason = (
        f"no room for an engine next to the {resident / 1e9:.0f} GB that training keeps while the engine samples "
        "(weights, optimizer)"
    )
    return Refusal(layout.tensor, layout.pipeline, reason, needed_bytes)


def _engines(job: Job, cluster: Cluster, resident: float) -> Iterator[EngineMemory]:
    """Yield engines of 1, 2, 4, ... GPUs."""
    for ranks in _powers_of_two(cluster.used_per_node):
        if job.config.text.num_heads % ranks == 0:
            yield engine_memory(job, cluster.device, resident, ranks)


def _variants(job: Job, base: Layout, cluster: Cluster) -> Iterator[Layout]:
    visions: tuple[Literal["tensor", "data"], ...] = ("tensor", "data") if base.tensor > 1 else ("tensor",)
    for vision, recompute in product(visions, RECOMPUTES):
        for groups in _powers_of_two(base.groups_per_update(job)):
            layout = replace(base, vision=vision, recompute=recompute, groups_per_microbatch=groups)
            yield layout
            if base.pipeline > 1:
                yield balanced(job, layout, cluster)


def _powers_of_two(largest: int) -> list[int]:
    return [2**exponent for exponent in range(largest.bit_length())]


def balanced(job: Job, layout: Layout, cluster: Cluster) -> Layout:
    """Choose the layers of the first and last stage so that the slowest stage is as fast as possible.

    The first stage also computes the vision tower, and the last one the head. Among choices within 0.1 % of the best,
    the one that sets fewer keys is preferred, then the more even one.
    """
    if layout.pipeline == 1:
        return layout
    num_layers = job.config.text.num_layers
    costs = [_linear_cost(job, layout, cluster, stage) for stage in range(layout.pipeline)]
    choices: list[tuple[float, int, int, tuple[int | None, int | None]]] = []
    for first, last in product((None, *range(1, num_layers)), repeat=2):
        num_set = (first is not None) + (last is not None)
        even_stages, even_layers = layout.pipeline - num_set, num_layers - (first or 0) - (last or 0)
        if even_layers < even_stages or (even_layers % even_stages if even_stages else even_layers):
            continue
        even = even_layers // even_stages if even_stages else 0
        stages = [even] * layout.pipeline
        stages[0], stages[-1] = first or even, last or even
        slowest = max(fixed + each * layers for (fixed, each), layers in zip(costs, stages, strict=True))
        choices.append((slowest, num_set, max(stages) - min(stages), (first, last)))
    if not choices:
        return layout
    fastest = min(choice[0] for choice in choices)
    near = (choice for choice in choices if choice[0] <= fastest * 1.001)
    first, last = min(near, key=lambda choice: choice[1:3])[3]
    return replace(layout, first_stage_layers=first, last_stage_layers=last)


def _linear_cost(job: Job, layout: Layout, cluster: Cluster, stage: int) -> tuple[float, float]:
    """Return the seconds of a stage without layers, and the seconds of each layer."""
    one_layer, two_layers = (
        seconds_of_stage(job, layout, cluster.device, stage, layers, Pass.TRAINING) for layers in (1, 2)
    )
    return 2 * one_layer - two_layers, two_layers - one_layer
