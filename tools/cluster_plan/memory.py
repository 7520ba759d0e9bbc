"""Bytes that a GPU holds while it trains, by part and pipeline stage.

Activations are counted from the code: what each module keeps for its backward pass, in numbers a row, with h the hidden
size, q and k the sizes of all query and of all key heads on the rank, f the FFN's on the rank:

    two norms       2 x input: 2h; TransformerEngine's also keep their output: 4h
    attention       q and k rotated, v, the output: 2q + 2k
    gated MLP       gate and up: 2f; their product is computed again

GPUs are taken to have TransformerEngine. h stands on every rank, or is divided under sequence parallelism; without
that, the last layer keeps only the rows that predict something behind its attention. Full recomputation keeps h a layer
and one layer whole; recomputation of the MLP drops its 2f. Stage s of p holds min(microbatches, p - s) microbatches
(1F1B).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from cluster_plan.devices import Device
from cluster_plan.job import Job, Layout
from cluster_plan.parameters import StageParameters, num_parameters, stage_parameters
from megatron_vcr1.model.config import ModelConfig, VisionConfig

GRADIENT_BYTES = 4  # float32 buffers, whatever the parameters' type
GPU_CHUNK_BYTES, CPU_CHUNK_BYTES = 1280 * 2**20, 16 * 2**20  # of logits, in vcr1_kernels' head


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank at the moment that needs most."""

    parameters: float
    gradients: float
    optimizer: float
    reference: float
    activations: float  # kept for the backward pass, both towers
    working: float  # of the head or of the layer that is being computed, whichever needs more
    fixed: float  # context, libraries, fragmentation

    @property
    def total(self) -> float:
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def resident(self) -> float:
        """What stays while the engine samples."""
        return self.parameters + self.gradients + self.optimizer + self.reference + self.fixed

    @property
    def largest_part(self) -> str:
        return max((one.name for one in fields(self)), key=lambda name: getattr(self, name))


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """What one layer keeps for a row, and needs while its backward pass runs."""

    kept: float
    behind: float  # of it, behind the attention
    working: float


def text_layer_numbers(config: ModelConfig, layout: Layout, device: Device) -> LayerNumbers:
    text, ranks = config.text, layout.tensor
    key = max(text.num_kv_heads / ranks, 1) * text.head_dim
    query = text.num_heads / ranks * text.head_dim
    hidden = text.hidden_size / (ranks if layout.sequence_parallel else 1)
    norm = hidden if device.is_cpu else 2 * hidden
    return _layer_numbers(hidden, norm, query, key, text.ffn_hidden_size / ranks, layout)


def vision_layer_numbers(vision: VisionConfig, layout: Layout, device: Device) -> LayerNumbers:
    """Of a patch. Without a gate the MLP keeps its inner state and QuickGELU's sigmoid: 2f too."""
    ranks = layout.tensor
    heads = vision.hidden_size / ranks
    hidden = vision.hidden_size / (ranks if layout.sequence_parallel else 1)
    norm = hidden if device.is_cpu else 2 * hidden
    return _layer_numbers(hidden, norm, heads, heads, vision.ffn_hidden_size / ranks, layout)


def _layer_numbers(hidden: float, norm: float, query: float, key: float, ffn: float, layout: Layout) -> LayerNumbers:
    mlp = 2 * ffn
    whole = 2 * norm + 2 * query + 2 * key + mlp
    backward = 2 * hidden + 4 * ffn  # gradients of the residual stream and inside the MLP, and the product again
    if layout.recompute == "full":
        return LayerNumbers(hidden, 0.0, whole + backward)
    if layout.recompute == "mlp":
        return LayerNumbers(whole - mlp, norm, mlp + backward)
    return LayerNumbers(whole, norm + mlp, backward)


def training_memory(job: Job, layout: Layout, device: Device) -> tuple[Memory, ...]:
    """What a rank of each stage holds, first to last."""
    return tuple(
        _stage_memory(job, layout, device, stage, parameters)
        for stage, parameters in enumerate(stage_parameters(job.config, layout))
    )


def _stage_memory(job: Job, layout: Layout, device: Device, stage: int, parameters: StageParameters) -> Memory:
    learning = _learning(job, parameters)
    whole_state = 8 if job.dtype_bytes == 4 else 12  # Adam's moments, and float32 weights beside bfloat16 ones
    in_flight = min(layout.microbatches(job), layout.pipeline - stage)
    text_bytes, text_working = _text_activations(job, layout, device, stage)
    vision_bytes, vision_working = _vision_activations(job, layout, device) if stage == 0 else (0.0, 0.0)
    # The text's part is gone when the vision tower's backward pass runs, for one of the microbatches in flight.
    working = max(text_working, vision_working - text_bytes)
    if stage == layout.pipeline - 1:
        working = max(working, _head_bytes(job, layout, device))
    activations = in_flight * (text_bytes + vision_bytes)
    weights = parameters.total * job.dtype_bytes
    dynamic = activations + max(working, 0.0)
    return Memory(
        parameters=weights,
        gradients=learning * GRADIENT_BYTES,
        optimizer=learning * whole_state / layout.copies,
        reference=weights if job.with_reference and (job.reference_resident or device.is_cpu) else 0.0,
        activations=activations,
        working=max(working, 0.0),
        fixed=device.fixed_bytes + device.fragmentation * dynamic,
    )


def _learning(job: Job, parameters: StageParameters) -> int:
    """Numbers that have gradients. (The merger, under 1 % of the model, counts with the tower.)"""
    frozen_text = "language_model" in job.freeze
    vision = 0 if "vision_tower" in job.freeze else parameters.vision
    return vision + (0 if frozen_text else parameters.text + parameters.embedding)


def _text_activations(job: Job, layout: Layout, device: Device, stage: int) -> tuple[float, float]:
    """Kept bytes of one microbatch on a stage, and one layer's working bytes."""
    numbers = text_layer_numbers(job.config, layout, device)
    rows = job.group_rows * layout.groups_per_microbatch
    kept = rows * layout.stages(job.config)[stage] * numbers.kept
    if stage == layout.pipeline - 1 and not layout.sequence_parallel:
        kept -= (rows - job.groups(layout.groups_per_microbatch).targets) * numbers.behind
    return kept * job.dtype_bytes, rows * numbers.working * job.dtype_bytes


def _vision_activations(job: Job, layout: Layout, device: Device) -> tuple[float, float]:
    vision = job.config.vision
    patches = job.groups(layout.groups_per_microbatch).patches
    if {"vision_tower", "merger"} <= set(job.freeze):
        return 0.0, 0.0
    numbers = vision_layer_numbers(vision, layout, device)
    # The merger keeps its norm's input and output and two inner states. The embedding's pixels are computed again.
    merger = (2 + 2 / layout.tensor) * vision.hidden_size
    kept = vision.num_layers * numbers.kept + merger
    return patches * kept * job.dtype_bytes, patches * numbers.working * job.dtype_bytes


def _head_bytes(job: Job, layout: Layout, device: Device) -> float:
    """A chunk of logits, and gradients of the hidden states; the weight's goes straight to its buffer."""
    text = job.config.text
    targets = job.group_size * job.response_tokens * layout.groups_per_microbatch
    shard = text.vocab_size / layout.tensor
    chunk = min(CPU_CHUNK_BYTES if device.is_cpu else GPU_CHUNK_BYTES, targets * shard * job.dtype_bytes)
    return chunk + targets * text.hidden_size * (4 + job.dtype_bytes)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """A colocated engine on one GPU, beside what training leaves there."""

    ranks: int  # GPUs that share one engine
    weights: float
    cache: float  # room for keys and values
    tokens: int  # that the cache of an engine holds


def engine_memory(job: Job, device: Device, resident: float, ranks: int) -> EngineMemory:
    """What an engine of so many GPUs has for its cache; negative if its weights alone do not fit."""
    weights = num_parameters(job.config) * job.dtype_bytes / ranks
    cache = device.memory_bytes - resident - weights - device.fragmentation * device.memory_bytes
    return EngineMemory(ranks, weights, cache, max(int(cache / cache_bytes_per_token(job, ranks)), 0))


def cache_bytes_per_token(job: Job, ranks: int) -> float:
    """Keys and values of a token on one of an engine's ranks."""
    text = job.config.text
    return 2 * text.num_layers * max(text.num_kv_heads / ranks, 1) * text.head_dim * job.dtype_bytes
