"""Predicts the memory of a GPU during training, and the host memory beside it, by part and pipeline stage.

Activation memory is counted from the code: the values per token that each module saves for its backward pass. With h
the hidden size, q and k the sizes of all query heads and all key heads of the rank, and f the FFN size of the rank:

    two norms       their input: 2h; TransformerEngine also saves their output: 4h
    attention       rotated queries and keys, values, output: 2q + 2k
    q and k norms   the query-key-value projection, in models that have them: q + 2k
    gated MLP       gate and up projection: 2f; their product is recomputed
    experts         2f for each of a token's experts on this rank; h with sequence parallelism, which gathers tokens

GPUs are assumed to run TransformerEngine layers. h is replicated on all tensor-parallel ranks, or sharded with sequence
parallelism. Without sequence parallelism, the last layer keeps only the tokens that predict a target after its
attention. Full recomputation keeps h per layer or block of layers, and one whole block while it is recomputed; MLP
recomputation drops the 2f. Stage s of p stages holds min(number of microbatches, p - s) microbatches (1F1B schedule).
Of layer inputs that are kept in host memory, each of these microbatches has at most two on the GPU.

With context parallelism a rank saves the values of its own tokens only. In backward, a layer has these temporary values
per prompt token of the microbatch, with c chunks of heads (`model.context_attention`):

    gathered keys and values            2k with full recomputation or one chunk, 4k / c otherwise: this and the next one
    their gradients                     4k / c: of this chunk, and on their way
    parts of them before the sum        2q / c in float32, with grouped-query attention only
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from vcr1_kernels.ops.linear_log_probs import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES

from megatron_vcr1.model.config import ExpertsConfig, TextConfig
from megatron_vcr1.model.key_chunks import num_chunks
from megatron_vcr1.planning.devices import Device
from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.parameters import StageParameters, num_parameters, stage_parameters


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank at the peak of a training step."""

    parameters: float
    gradients: float
    optimizer: float
    reference: float
    activations: float  # saved for the backward pass, language model and vision tower
    working: float  # temporary memory of the head, of the layer being computed or of the optimizer step, if larger
    fixed: float  # CUDA context, libraries, fragmentation

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def resident(self) -> float:
        """Return the bytes that training keeps while the engine samples. The gradient buffers are released then."""
        return self.parameters + self.optimizer + self.reference + self.fixed

    @property
    def largest_part(self) -> str:
        return max((part.name for part in fields(self)), key=lambda name: getattr(self, name))


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Values per token in one layer."""

    saved: float  # for the backward pass
    saved_after_attention: float  # the part of `saved` that comes after the attention
    working: float  # temporary values during the backward pass


def key_size(text: TextConfig, ranks: int) -> float:
    """Return the number of values of a token's keys on one of `ranks` tensor-parallel ranks."""
    return max(text.num_kv_heads / ranks, 1) * text.head_dim


def num_key_chunks(job: Job, layout: Layout) -> int:
    """Return the number of chunks in which a rank gathers its keys under context parallelism."""
    return num_chunks(max(job.config.text.num_kv_heads // layout.tensor, 1))


def query_size(text: TextConfig, ranks: int) -> float:
    """Return the number of values of a token's queries on one of `ranks` tensor-parallel ranks."""
    return text.num_heads / ranks * text.head_dim


def text_layer_activations(job: Job, layout: Layout, device: Device) -> LayerActivations:
    """Count the values per token in a layer of the language model."""
    text, ranks = job.config.text, layout.tensor
    key, query = key_size(text, ranks), query_size(text, ranks)
    mlp = _gated_mlp(text.ffn_hidden_size / ranks) if text.experts is None else _experts(text, text.experts, layout)
    layer = _layer_activations(text.hidden_size, query, key, mlp, layout, device)
    if not text.qk_norm or layout.recompute == "full":
        return layer
    # The norms of queries and keys save their inputs, views of the whole query-key-value projection.
    return replace(layer, saved=layer.saved + query + 2 * key)


def vision_layer_activations(job: Job, layout: Layout, device: Device) -> LayerActivations:
    """Count the values per patch in a layer of the vision tower.

    An MLP without a gate saves its inner state and the sigmoid of QuickGELU, which is 2f like a gated MLP.
    """
    vision, layout = job.config.vision, layout.of_vision
    ranks = layout.tensor
    heads = vision.hidden_size / ranks
    mlp = _gated_mlp(vision.padded_ffn_hidden_size / ranks)
    return _layer_activations(vision.hidden_size, heads, heads, mlp, layout, device)


@dataclass(frozen=True, slots=True)
class _MlpActivations:
    """Values per token in an MLP."""

    saved: float  # for the backward pass
    working: float  # temporary values during the backward pass


def _gated_mlp(ffn: float) -> _MlpActivations:
    return _MlpActivations(2 * ffn, 4 * ffn)  # in backward: the gradients inside, and the recomputed product


def _experts(text: TextConfig, experts: ExpertsConfig, layout: Layout) -> _MlpActivations:
    """Count the values of the experts of one tensor-parallel rank, as if every layer had experts."""
    per_token, ranks = experts.num_per_token, layout.tensor
    inputs, ffn = per_token * text.hidden_size / ranks, per_token * experts.ffn_hidden_size / ranks
    gathered = text.hidden_size if layout.sequence_parallel else 0
    # The rows of all of a token's experts, those of other ranks included, are summed in a buffer.
    return _MlpActivations(gathered + 2 * ffn, 2 * inputs + 5 * ffn + per_token * text.hidden_size)


def _layer_activations(
    hidden_size: int, query: float, key: float, mlp: _MlpActivations, layout: Layout, device: Device
) -> LayerActivations:
    hidden = hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    norm = hidden if device.is_cpu else 2 * hidden
    whole = 2 * norm + 2 * query + 2 * key + mlp.saved
    backward = 2 * hidden + mlp.working  # gradients of the residual stream, and of the MLP
    if layout.recompute == "full":
        return LayerActivations(hidden, 0.0, layout.recompute_layers * whole + backward)
    if layout.recompute == "mlp":
        return LayerActivations(whole - mlp.saved, norm, mlp.saved + backward)
    return LayerActivations(whole, norm + mlp.saved, backward)


def training_memory(job: Job, layout: Layout, device: Device) -> tuple[Memory, ...]:
    """Predict the memory on a rank of each stage, first to last."""
    if device.is_cpu:  # what is kept in host memory takes the device's memory
        job = replace(job, reference_resident=True, optimizer_resident=True, offloads_inputs=False)
    return tuple(
        _stage_memory(job, layout, device, stage, parameters)
        for stage, parameters in enumerate(stage_parameters(job.config, layout))
    )


def _stage_memory(job: Job, layout: Layout, device: Device, stage: int, parameters: StageParameters) -> Memory:
    trained = num_trained(job, parameters)
    state = _optimizer_bytes(job, layout, parameters)
    in_flight = _num_in_flight(job, layout, stage)
    text_bytes, text_working = _text_activations(job, layout, device, stage)
    vision_bytes, vision_working = _vision_activations(job, layout, device) if stage == 0 else (0.0, 0.0)
    # When the backward pass reaches the vision tower, the text activations of that microbatch are free already.
    working = max(text_working, vision_working - text_bytes)
    if stage == layout.pipeline - 1:
        working = max(working, _head_bytes(job, layout, device))
    activations = in_flight * (text_bytes + vision_bytes)
    if stage == 0 and job.keeps_features:
        activations += job.num_minibatches * layout.num_microbatches(job) * _feature_bytes(job, layout)
    # In the optimizer step, the activations are free already.
    gradient_copies = 0.0 if job.gradient_bytes == 4 else 4 * trained / layout.num_weight_holders  # in float32
    step_bytes = gradient_copies + (0.0 if job.optimizer_resident else state)
    working = max(working, step_bytes - activations, 0.0)
    weights = parameters.total * job.dtype_bytes
    return Memory(
        parameters=weights,
        gradients=trained * job.gradient_bytes,
        optimizer=state if job.optimizer_resident else 0.0,
        reference=trained * job.dtype_bytes if job.with_reference and job.reference_resident else 0.0,
        activations=activations,
        working=working,
        fixed=device.fixed_bytes + device.fragmentation * (activations + working),
    )


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of host memory that one rank keeps for training. Frames and servers take host memory, too."""

    reference: float
    optimizer: float
    activations: float  # inputs of recomputed layers
    checkpoint: float  # copy of this rank's part of a checkpoint while it is written in the background

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def host_memory(job: Job, layout: Layout, device: Device) -> tuple[HostMemory, ...]:
    """Predict the host memory of a rank of each stage, first to last, in addition to the device's memory."""
    if device.is_cpu:  # `training_memory` contains it, except for checkpoints that are written in the background
        job = replace(job, reference_resident=True, optimizer_resident=True, offloads_inputs=False)
    return tuple(
        _stage_host_memory(job, layout, stage, parameters)
        for stage, parameters in enumerate(stage_parameters(job.config, layout))
    )


def _stage_host_memory(job: Job, layout: Layout, stage: int, parameters: StageParameters) -> HostMemory:
    state = _optimizer_bytes(job, layout, parameters)
    in_host = job.with_reference and not job.reference_resident
    return HostMemory(
        reference=num_trained(job, parameters) * job.dtype_bytes if in_host else 0.0,
        optimizer=0.0 if job.optimizer_resident else state,
        activations=_num_in_flight(job, layout, stage) * _offloaded_bytes(job, layout, stage),
        # The ranks with the same weights write a part of them each.
        checkpoint=parameters.total * job.dtype_bytes / layout.num_weight_holders + state
        if job.saves_in_background
        else 0.0,
    )


def _offloaded_bytes(job: Job, layout: Layout, stage: int) -> float:
    """Return the bytes of one microbatch's layer inputs in host memory, in buffers of powers of two."""
    if not job.offloads_inputs or layout.recompute != "full":
        return 0.0
    text, vision = job.config.text, job.config.vision

    def buffer_bytes(num_rows: float, hidden_size: int, layout: Layout) -> int:
        sharded = hidden_size / (layout.tensor if layout.sequence_parallel else 1)
        return 1 << math.ceil(math.log2(num_rows * sharded * job.dtype_bytes))

    tokens = job.group_tokens * layout.groups_per_microbatch * layout.token_share(job)
    num_inputs = _num_recomputed(layout, layout.stages(job.config)[stage])
    total = num_inputs * buffer_bytes(tokens, text.hidden_size, layout)
    if stage == 0 and "vision_tower" not in job.freeze:
        patches = job.groups(layout.groups_per_microbatch).patches * layout.frame_share(job)
        total += vision.num_layers * buffer_bytes(patches, vision.hidden_size, layout.of_vision)
    return total


def _num_in_flight(job: Job, layout: Layout, stage: int) -> int:
    """Return the microbatches whose activations a stage holds at once (1F1B schedule)."""
    return min(layout.num_microbatches(job), layout.pipeline - stage)


def _optimizer_bytes(job: Job, layout: Layout, parameters: StageParameters) -> float:
    """Return the bytes of a rank's optimizer state, which the distributed optimizer shards."""
    return num_trained(job, parameters) * optimizer_state_bytes(job) / layout.num_weight_holders


def optimizer_state_bytes(job: Job) -> int:
    """Return the bytes per trained parameter: Adam's moments, and float32 master weights if the model is bfloat16."""
    return job.moment_bytes + (0 if job.dtype_bytes == 4 else 4)


def checkpoint_bytes(job: Job) -> int:
    """Return the size of a checkpoint: weights and optimizer state."""
    (whole,) = stage_parameters(job.config, Layout())
    return whole.total * job.dtype_bytes + num_trained(job, whole) * optimizer_state_bytes(job)


def num_trained(job: Job, parameters: StageParameters) -> int:
    """Return the parameters with gradients. The merger, below 1 % of the model, counts as part of the vision tower."""
    vision = 0 if "vision_tower" in job.freeze else parameters.vision
    return vision + (0 if "language_model" in job.freeze else parameters.text + parameters.embedding)


def _text_activations(job: Job, layout: Layout, device: Device, stage: int) -> tuple[float, float]:
    """Return the saved bytes of one microbatch on a stage, and the temporary bytes of one layer."""
    layer = text_layer_activations(job, layout, device)
    tokens = job.group_tokens * layout.groups_per_microbatch * layout.token_share(job)
    saved = tokens * _num_saved(job, layout, layout.stages(job.config)[stage]) * layer.saved
    if stage == layout.pipeline - 1 and not layout.sequence_parallel:
        targets = job.groups(layout.groups_per_microbatch).targets * layout.response_share(job)
        saved -= (tokens - targets) * layer.saved_after_attention
    working = tokens * layer.working * job.dtype_bytes + _gathered_bytes(job, layout)
    working += _expert_gradient_bytes(job, layout)
    return saved * job.dtype_bytes, working


def _num_saved(job: Job, layout: Layout, num_layers: int) -> int:
    """Return the number of layers, or of recomputed blocks of layers, with saved activations on the device."""
    if layout.recompute != "full":
        return num_layers
    num_blocks = _num_recomputed(layout, num_layers)
    return min(num_blocks, 2) if job.offloads_inputs else num_blocks


def _num_recomputed(layout: Layout, num_layers: int) -> int:
    """Return the number of recomputed blocks, each of which stores its input."""
    return -(-num_layers // layout.recompute_layers)


def _expert_gradient_bytes(job: Job, layout: Layout) -> float:
    """Return the bytes of a layer's largest expert weight: its gradient is a tensor of its own before it is summed."""
    text = job.config.text
    if text.experts is None or "language_model" in job.freeze:
        return 0.0
    weight = text.experts.num_experts * 2 * text.experts.ffn_hidden_size * text.hidden_size
    return weight / layout.tensor * job.dtype_bytes


def _gathered_bytes(job: Job, layout: Layout) -> float:
    """Return the temporary bytes of gathered keys and values in the backward pass of one layer."""
    if layout.context == 1:
        return 0.0
    text, ranks = job.config.text, layout.tensor
    key, query = key_size(text, ranks), query_size(text, ranks)
    chunks = num_key_chunks(job, layout)
    gathered = 2 * key if layout.recompute == "full" or chunks == 1 else 4 * key / chunks
    parts = 2 * query / chunks * 4 if query > key else 0.0
    values = (gathered + 4 * key / chunks) * job.dtype_bytes + parts
    return job.prompt_tokens * layout.groups_per_microbatch * values


def _vision_activations(job: Job, layout: Layout, device: Device) -> tuple[float, float]:
    """Return the saved bytes of one microbatch in the vision tower and merger, and the temporary bytes of one layer."""
    if {"vision_tower", "merger"} <= set(job.freeze):
        return 0.0, 0.0
    vision = job.config.vision
    patches = job.groups(layout.groups_per_microbatch).patches * layout.frame_share(job)
    layer = vision_layer_activations(job, layout, device)
    # The merger saves the input and output of its norm and two inner states. The patch embedding's pixels are
    # recomputed.
    num_mergers = 1 + job.config.family.num_feature_layers(vision)
    merger = num_mergers * (2 + 2 / layout.of_vision.tensor) * vision.hidden_size
    layers = 0.0 if "vision_tower" in job.freeze else _num_saved(job, layout.of_vision, vision.num_layers) * layer.saved
    working = 0.0 if "vision_tower" in job.freeze else layer.working
    return patches * (layers + merger) * job.dtype_bytes, patches * working * job.dtype_bytes


def _feature_bytes(job: Job, layout: Layout) -> float:
    """Return the bytes of the vision features of one microbatch, on a rank of the first stage."""
    config = job.config
    patches = job.groups(layout.groups_per_microbatch).patches / layout.context
    features_per_token = 1 + config.family.num_feature_layers(config.vision)
    return patches / config.vision.patches_per_token * features_per_token * config.text.hidden_size * job.dtype_bytes


def _head_bytes(job: Job, layout: Layout, device: Device) -> float:
    """Return the bytes of a chunk of logits and of the hidden states' gradients.

    The gradient of the head's weight is accumulated into its gradient buffer and needs no temporary memory.
    """
    text = job.config.text
    targets = job.group_size * job.response_tokens * layout.groups_per_microbatch * layout.response_share(job)
    vocab_shard = text.vocab_size / layout.tensor
    chunk = min(CPU_CHUNK_BYTES if device.is_cpu else GPU_CHUNK_BYTES, targets * vocab_shard * job.dtype_bytes)
    return chunk + targets * text.hidden_size * (4 + job.dtype_bytes)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Memory of a colocated engine on one GPU."""

    ranks: int  # GPUs of one engine
    weights: float
    cache: float  # bytes for keys and values
    tokens: int  # capacity of the KV cache of one engine


def engine_memory(job: Job, device: Device, resident: float, ranks: int) -> EngineMemory:
    """Return the memory of an engine next to the resident memory of training.

    The cache size is negative if not even the engine's weights fit.
    """
    weights = num_parameters(job.config) * job.dtype_bytes / ranks
    cache = device.memory_bytes - resident - weights - device.fragmentation * device.memory_bytes
    return EngineMemory(ranks, weights, cache, max(int(cache / cache_bytes_per_token(job, ranks)), 0))


def cache_bytes_per_token(job: Job, ranks: int) -> float:
    """Return the bytes of one token's keys and values on one rank of an engine."""
    text = job.config.text
    return 2 * text.num_layers * key_size(text, ranks) * job.dtype_bytes
