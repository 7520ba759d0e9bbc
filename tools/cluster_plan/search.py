"""Every layout of a job on a cluster: what it needs and takes, or why it cannot run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from cluster_plan.devices import Device
from cluster_plan.job import RECOMPUTES, Job, Layout
from cluster_plan.memory import EngineMemory, Memory, engine_memory, training_memory
from cluster_plan.timing import StepTime, pipeline_bubble, seconds_of_stage, stage_seconds, step_seconds, useful_flops
from cluster_plan.traffic import Traffic, step_traffic
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.errors import UserError

PIPELINES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Alike GPUs in alike nodes."""

    device: Device
    num_gpus: int
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout that can run."""

    job: Job
    layout: Layout
    cluster: Cluster
    memory: tuple[Memory, ...]  # of each stage
    engine: EngineMemory
    time: StepTime
    traffic: Traffic
    stages: tuple[float, ...]  # seconds of one microbatch, forward and backward

    @property
    def peak_bytes(self) -> float:
        return max(one.total for one in self.memory)

    @property
    def bubble(self) -> float:
        return pipeline_bubble(self.stages, self.layout.microbatches(self.job))

    @property
    def utilisation(self) -> float:
        """Model FLOPs of update and reference over what all GPUs could do in the whole step."""
        return useful_flops(self.job) / (self.time.total * self.cluster.num_gpus * self.cluster.device.flops_per_s)

    @property
    def update_utilisation(self) -> float:
        """The same of update and reference alone."""
        seconds = self.time.update + self.time.reference
        return useful_flops(self.job) / (seconds * self.cluster.num_gpus * self.cluster.device.flops_per_s)

    @property
    def hours(self) -> float:
        return self.time.total * self.job.num_steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.num_gpus

    @property
    def engine_memory_fraction(self) -> float:
        """Of a GPU, for sglang.memory_fraction."""
        return (self.engine.weights + self.engine.cache) / self.cluster.device.memory_bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """A division that cannot run, and what stands in its way."""

    tensor: int
    pipeline: int
    reason: str


def search(job: Job, cluster: Cluster, longest_response: int) -> tuple[list[Plan], list[Refusal]]:
    """The fastest variant of each tensor- and pipeline-parallel size, best first, and the sizes that have none."""
    plans: list[Plan] = []
    refusals: list[Refusal] = []
    for tensor in range(1, cluster.gpus_per_node + 1):
        if cluster.gpus_per_node % tensor:
            continue  # a group of ranks would span nodes
        for pipeline in PIPELINES:
            if tensor * pipeline > cluster.num_gpus:
                continue
            found = best_variant(job, cluster, tensor, pipeline, longest_response)
            if isinstance(found, Plan):
                plans.append(found)
            else:
                refusals.append(found)
    return sorted(plans, key=lambda one: one.time.total), refusals


def best_variant(job: Job, cluster: Cluster, tensor: int, pipeline: int, longest_response: int) -> Plan | Refusal:
    """The fastest recomputation, microbatch and division of layers that fits, or why none does."""
    copies, rest = divmod(cluster.num_gpus, tensor * pipeline)
    if rest:
        return Refusal(tensor, pipeline, f"{cluster.num_gpus} GPUs are no multiple of {tensor * pipeline}")
    if job.prompts_per_step % copies:
        return Refusal(
            tensor,
            pipeline,
            f"{job.prompts_per_step} prompts a step do not divide among {copies} copies of the model",
        )
    base = Layout(tensor, pipeline, copies, sequence_parallel=tensor > 1)
    plans: list[Plan] = []
    misfits: list[tuple[float, str]] = []
    for layout in _variants(job, base, cluster.device):
        try:
            check_layout(job.config.shape, layout.parallel, layout.recompute_section, cluster.num_gpus)
        except UserError as error:
            misfits.append((math.inf, str(error).splitlines()[0]))
            continue
        found = evaluate(job, layout, cluster, longest_response)
        if isinstance(found, Plan):
            plans.append(found)
        else:
            misfits.append(found)
    if plans:
        return min(plans, key=lambda one: one.time.total)
    return Refusal(tensor, pipeline, min(misfits)[1])


def evaluate(job: Job, layout: Layout, cluster: Cluster, longest_response: int) -> Plan | tuple[float, str]:
    """A plan; or the bytes that are missing, and the reason in words."""
    device = cluster.device
    memory = training_memory(job, layout, device)
    fullest = max(memory, key=lambda one: one.total)
    if (missing := fullest.total - device.memory_bytes) > 0:
        part = fullest.largest_part
        return missing, (
            f"training needs {fullest.total / 1e9:.0f} GB of {device.memory_bytes / 1e9:.0f} even with recomputation "
            f"(the most: {part}, {getattr(fullest, part) / 1e9:.0f} GB)"
        )
    resident = max(one.resident for one in memory)
    plans = [
        Plan(
            job=job,
            layout=layout,
            cluster=cluster,
            memory=memory,
            engine=engine,
            time=step_seconds(
                job,
                layout,
                device,
                cluster.gpus_per_node,
                engine_ranks=engine.ranks,
                cache_tokens=engine.tokens,
                longest_response=longest_response,
            ),
            traffic=step_traffic(job, layout),
            stages=stage_seconds(job, layout, device, training=True),
        )
        for engine in _engines(job, cluster, resident, longest_response)
    ]
    if plans:
        return min(plans, key=lambda one: one.time.total)
    return resident, (
        f"no room for an engine beside the {resident / 1e9:.0f} GB that training keeps while it samples, gradients and "
        "optimizer included"
    )


def _engines(job: Job, cluster: Cluster, resident: float, longest_response: int) -> Iterator[EngineMemory]:
    """Engines of any number of GPUs whose cache holds one group at its longest."""
    needed = job.prompt_tokens + job.group_size * longest_response
    ranks = 1
    while ranks <= min(cluster.gpus_per_node, cluster.num_gpus):
        engine = engine_memory(job, cluster.device, resident, ranks)
        divides = job.config.text.num_heads % ranks == 0
        if divides and engine.tokens >= needed:
            yield engine
        ranks *= 2


def _variants(job: Job, base: Layout, device: Device) -> Iterator[Layout]:
    groups_per_copy = job.prompts_per_step // base.copies
    for recompute in RECOMPUTES:
        groups = 1
        while groups <= groups_per_copy:
            layout = replace(base, recompute=recompute, groups_per_microbatch=groups)
            yield layout
            if base.pipeline > 1:
                yield balanced(job, layout, device)
            groups *= 2


def balanced(job: Job, layout: Layout, device: Device) -> Layout:
    """The same with the layers of first and last stage chosen so that the slowest stage is as fast as can be.

    The first stage also runs the vision tower, the last the head. Ties go to fewer keys that must be set, then to the
    more even division.
    """
    if layout.pipeline == 1:
        return layout
    num_layers = job.config.text.num_layers
    seconds_of_layers = [_affine(job, layout, device, stage) for stage in range(layout.pipeline)]
    choices: list[tuple[float, int, int, tuple[int | None, int | None]]] = []
    for first, last in product((None, *range(1, num_layers)), repeat=2):
        keys = (first is not None) + (last is not None)
        even_stages, even_layers = layout.pipeline - keys, num_layers - (first or 0) - (last or 0)
        if even_layers < even_stages or (even_layers % even_stages if even_stages else even_layers):
            continue
        even = even_layers // even_stages if even_stages else 0
        stages = [even] * layout.pipeline
        stages[0], stages[-1] = first or even, last or even
        slowest = max(base + each * layers for (base, each), layers in zip(seconds_of_layers, stages, strict=True))
        choices.append((slowest, keys, max(stages) - min(stages), (first, last)))
    if not choices:
        return layout
    least = min(choice[0] for choice in choices)
    first, last = min((one for one in choices if one[0] <= least * 1.001), key=lambda one: one[1:3])[3]
    return replace(layout, first_stage_layers=first, last_stage_layers=last)


def _affine(job: Job, layout: Layout, device: Device, stage: int) -> tuple[float, float]:
    """Seconds of a stage without layers, and of each layer."""
    one, two = (seconds_of_stage(job, layout, device, stage, layers, training=True) for layers in (1, 2))
    return 2 * one - two, two - one
