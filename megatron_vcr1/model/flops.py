"""The model's floating-point operations by part, for model FLOPs utilization (MFU) and for planning.

A multiplication and an addition count as two operations. Matmuls and attention are counted. Norms, activations and
rotary positions are not counted: they are well under 1 %. Attention counts the query-key pairs that the mask allows:
causal attention is half a square, and a prompt that G responses share is counted once. After the last layer's
attention, only the tokens that predict targets are counted, because only those are computed.

Backward has one matmul per gradient: the weight's, unless it is frozen, and the input's, if anything before it is
trained. Model FLOPs are those of forward and backward without recomputation. MFU is model FLOPs divided by the time and
by the device's peak (PaLM, arXiv 2204.02311, appendix B, but with half squares for causal attention).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.model.config import ModelConfig, TextConfig, VisionConfig
from megatron_vcr1.model.families.base import Grid

if TYPE_CHECKING:  # the planner must not load megatron-core, which takes seconds
    from megatron_vcr1.model.packed_batch import PackedBatch

# Published peaks of dense bfloat16 matmuls with float32 accumulation, in FLOP/s. The first entry whose words are all in
# the device's name is used, so longer names come before the names that they contain.
BF16_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of a forward pass. Workloads can be added."""

    patches: int = 0  # patches of the vision tower
    vision_pairs: int = 0  # pairs of query and key patches, summed over the layers of the vision tower
    tokens: int = 0  # tokens of the language model
    text_pairs: int = 0  # pairs of query and key tokens that the language model's mask allows
    targets: int = 0  # tokens that the head scores

    def __add__(self, other: Workload) -> Workload:
        return Workload(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @classmethod
    def of_group(
        cls, config: ModelConfig, num_prompt_tokens: int, response_lengths: Sequence[int], grids: Iterable[Grid] = ()
    ) -> Workload:
        """Return the workload of a prompt and the responses that share it, packed as `packed_batch.pack` packs them.

        Args:
            config: the model.
            num_prompt_tokens: number of text and vision tokens of the prompt.
            response_lengths: number of tokens of each response, at least 1.
            grids: patches of each of the prompt's images and videos.
        """
        input_lengths = [length - 1 for length in response_lengths]  # a response's last token is not an input
        lengths = (num_prompt_tokens, *input_lengths)
        return _vision_workload(config, grids) + cls(
            tokens=sum(lengths),
            text_pairs=sum(map(_half_square, lengths)) + num_prompt_tokens * sum(input_lengths),
            targets=sum(response_lengths),
        )

    @classmethod
    def of_batch(cls, config: ModelConfig, batch: PackedBatch) -> Workload:
        """Return the workload of the next pass over a packed microbatch.

        Under context parallelism, it is that of all ranks together. Vision features that an earlier pass has kept cost
        nothing.
        """
        is_encoded = batch.memo is not None and batch.memo.features is not None
        layout, targets = batch.layout, len(batch.target_ids)
        if batch.context is not None:
            layout, targets = batch.context.layout, batch.context.num_targets
        prefixes = (0 if prefix < 0 else layout.lengths[prefix] for prefix in layout.prefixes)
        return _vision_workload(config, () if is_encoded else batch.grids) + cls(
            tokens=layout.num_tokens,
            text_pairs=sum(
                _half_square(length) + length * prefix for length, prefix in zip(layout.lengths, prefixes, strict=True)
            ),
            targets=targets,
        )


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations by part of the model. They can be added, part by part."""

    patch_embed: float = 0
    vision_layers: float = 0  # linear layers of the vision tower
    vision_attention: float = 0  # scores and weighted values, without the projections
    merger: float = 0
    text_layers: float = 0  # linear layers of the language model
    text_attention: float = 0  # scores and weighted values, without the projections
    head: float = 0

    @property
    def vision(self) -> float:
        return self.patch_embed + self.vision_layers + self.vision_attention + self.merger

    @property
    def total(self) -> float:
        return self.vision + self.text_layers + self.text_attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def forward_flops(config: ModelConfig, work: Workload) -> Flops:
    """Count one forward pass, including the head."""
    text, vision = config.text, config.vision
    merged_units = work.patches // vision.patches_per_token * (1 + config.family.num_feature_layers(vision))
    return Flops(
        patch_embed=2 * work.patches * vision.hidden_size * vision.patch_dim,
        vision_layers=2 * work.patches * vision.num_layers * vision_layer_weights(vision),
        vision_attention=4 * work.vision_pairs * vision.hidden_size,
        merger=2 * merged_units * merger_weights(vision),
        text_layers=2 * work.tokens * text.num_layers * _text_qkv_weights(text)
        + 2 * sum(_tokens_after_attention(config, work)) * text.hidden_size * text.num_heads * text.head_dim
        + _text_mlp_flops(config, work),
        text_attention=4 * work.text_pairs * text.num_layers * text.num_heads * text.head_dim,
        head=2 * work.targets * text.hidden_size * text.vocab_size,
    )


def training_flops(config: ModelConfig, work: Workload, *, freeze: Collection[str] = ()) -> Flops:
    """Count the model FLOPs of a forward and a backward pass.

    Args:
        config: the model.
        work: size of the forward pass.
        freeze: frozen parts, by their names in the setting `model.freeze`.
    """
    forward = forward_flops(config, work)
    trains_text, trains_merger, trains_tower = (
        part not in freeze for part in ("language_model", "merger", "vision_tower")
    )
    # Matmuls of the backward pass for each matmul of the forward pass: one for the weight's gradient, one for the
    # input's. The language model always computes the input's gradient, for the embeddings or the merger.
    text = 1 + trains_text
    merger = trains_merger + (trains_merger or trains_tower)
    tower = 2 * trains_tower
    return Flops(
        patch_embed=forward.patch_embed * (1 + trains_tower),  # pixels need no gradient
        vision_layers=forward.vision_layers * (1 + tower),
        vision_attention=forward.vision_attention * (1 + tower),
        merger=forward.merger * (1 + merger),
        text_layers=forward.text_layers * (1 + text),
        text_attention=forward.text_attention * 3,  # both matmuls have two activations as inputs, and no weight
        head=forward.head * (1 + text),
    )


def recomputed_flops(
    config: ModelConfig, work: Workload, recompute: RecomputeSection, *, freeze: Collection[str] = ()
) -> Flops:
    """Count what the backward pass recomputes because of the [recompute] settings.

    The recomputation inside attention kernels is not included.
    """
    forward = forward_flops(config, work)
    if "vision_tower" in freeze:  # it has no backward pass
        forward = replace(forward, vision_layers=0, vision_attention=0)
    if recompute.granularity == "none":
        return Flops()
    if recompute.granularity == "full":
        return replace(forward, patch_embed=0, merger=0, head=0)
    recomputed = Flops()
    if "core_attn" in recompute.modules:
        recomputed += Flops(vision_attention=forward.vision_attention, text_attention=forward.text_attention)
    if "mlp" in recompute.modules:
        recomputed += Flops(
            vision_layers=forward.vision_layers
            * vision_mlp_weights(config.vision)
            / vision_layer_weights(config.vision),
            text_layers=_text_mlp_flops(config, work),
        )
    return recomputed


def bf16_peak(device_name: str) -> float | None:
    """Return the peak FLOP/s of a GPU, by the name that CUDA reports; None if it is not in `BF16_PEAKS`."""
    return next((peak for name, peak in BF16_PEAKS.items() if all(word in device_name for word in name.split())), None)


def _text_qkv_weights(text: TextConfig) -> int:
    return text.hidden_size * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim


def _tokens_after_attention(config: ModelConfig, work: Workload) -> list[int]:
    """Return the number of tokens that the output projection and the MLP of each layer compute.

    The last layer computes only the tokens that predict targets (`layer_specs.TokenSelectingLayer`).
    """
    return [work.tokens] * (config.text.num_layers - 1) + [work.targets]


def _text_mlp_flops(config: ModelConfig, work: Workload) -> int:
    """Count the operations of the MLPs of all language-model layers."""
    tokens_of_layer = _tokens_after_attention(config, work)
    return 2 * sum(tokens * _text_mlp_weights(config.text, layer) for layer, tokens in enumerate(tokens_of_layer))


def _text_mlp_weights(text: TextConfig, layer: int) -> int:
    """Return the number of weights by which one token is multiplied in the MLP of a language-model layer (0-based).

    They are the gate, up and down projections; with experts, those of the token's experts, and the router.
    """
    experts = text.layer_experts(layer)
    if experts is None:
        return 3 * text.hidden_size * text.ffn_hidden_size
    return text.hidden_size * (3 * experts.num_per_token * experts.ffn_hidden_size + experts.num_experts)


def vision_layer_weights(vision: VisionConfig) -> int:
    """Return the number of weights in the matrices of one layer of the vision tower."""
    return 4 * vision.hidden_size**2 + vision_mlp_weights(vision)


def vision_mlp_weights(vision: VisionConfig) -> int:
    """Return the number of weights in the MLP matrices of one layer of the vision tower."""
    return (3 if vision.gated else 2) * vision.hidden_size * vision.ffn_hidden_size


def merger_weights(vision: VisionConfig) -> int:
    """Return the number of weights in the matrices of a patch merger."""
    unit_size = vision.hidden_size * vision.patches_per_token
    return unit_size * (unit_size + vision.out_hidden_size)


def _vision_workload(config: ModelConfig, grids: Iterable[Grid]) -> Workload:
    total = Workload()
    for grid in grids:
        total += Workload(patches=math.prod(grid), vision_pairs=config.family.vision_pairs(config.vision, grid))
    return total


def _half_square(length: int) -> int:
    """Return the number of pairs (i, j) with 0 <= j <= i < length: the pairs of causal attention."""
    return length * (length + 1) // 2
