"""Floating-point operations of the model, counted by part: for model FLOPs utilisation and for planning.

A multiplication and an addition are two operations. Matrix products and attention are counted; norms, activations and
rotary positions, well under 1 %, are not. Attention counts the pairs of rows that the mask lets through: causal
attention is half a square, and a prompt that G responses share is counted once. Behind the last layer's attention only
the rows of targets count.

Backward costs a product for each gradient: of the weights, unless frozen, and of the input, if anything before it
learns. Model FLOPs are forward and backward, whatever is computed again; utilisation is model FLOPs over the time and
the device's peak (PaLM, arXiv 2204.02311, appendix B, with half-squares where attention is causal).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.model.config import ModelConfig, TextConfig, VisionConfig
from megatron_vcr1.model.packed_batch import PackedBatch

Grid = tuple[int, int, int]  # patches in time, height, width

# Published dense peaks of matrix products in bfloat16 with float32 accumulation, without sparsity, FLOP/s. The first
# whose words are in a device's name counts.
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
    """How much a forward pass computes on; workloads add up."""

    patches: int = 0
    window_pairs: int = 0  # pairs of patches that see each other in a layer with windows
    full_pairs: int = 0  # the same in a layer that attends to whole temporal steps
    tokens: int = 0  # of the language model
    text_pairs: int = 0  # pairs of rows, query and key, that the language model's mask lets through
    targets: int = 0  # rows of the head

    def __add__(self, other: Workload) -> Workload:
        return Workload(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @classmethod
    def of_group(
        cls, config: ModelConfig, num_prompt_tokens: int, response_lengths: Sequence[int], grids: Iterable[Grid] = ()
    ) -> Workload:
        """A prompt and the responses that share it, as `pack` lays them out: the last token of each is not fed.

        Args:
            num_prompt_tokens: text and vision tokens.
            response_lengths: tokens of each response, at least 1.
            grids: of the prompt's images and videos.
        """
        fed = [length - 1 for length in response_lengths]
        lengths = (num_prompt_tokens, *fed)
        return _vision_workload(config.vision, grids) + cls(
            tokens=sum(lengths),
            text_pairs=sum(map(_half_square, lengths)) + num_prompt_tokens * sum(fed),
            targets=sum(response_lengths),
        )

    @classmethod
    def of_batch(cls, config: ModelConfig, batch: PackedBatch) -> Workload:
        """A packed microbatch."""
        layout = batch.layout
        prefixes = (0 if prefix < 0 else layout.lengths[prefix] for prefix in layout.prefixes)
        return _vision_workload(config.vision, (item.grid_thw for item in batch.vision)) + cls(
            tokens=layout.num_tokens,
            text_pairs=sum(
                _half_square(length) + length * prefix for length, prefix in zip(layout.lengths, prefixes, strict=True)
            ),
            targets=len(batch.target_ids),
        )


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by part; they add up, part by part."""

    patch_embed: float = 0
    vision_layers: float = 0  # linear layers of the vision tower
    vision_attention: float = 0
    merger: float = 0
    text_layers: float = 0
    text_attention: float = 0
    head: float = 0

    @property
    def vision(self) -> float:
        return self.patch_embed + self.vision_layers + self.vision_attention + self.merger

    @property
    def total(self) -> float:
        return self.vision + self.text_layers + self.text_attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


def forward_flops(config: ModelConfig, work: Workload) -> Flops:
    """One forward pass, head included."""
    text, vision = config.text, config.vision
    num_full = len(vision.full_attention_layers) if vision.window_size is not None else vision.num_layers
    vision_pairs = num_full * work.full_pairs + (vision.num_layers - num_full) * work.window_pairs
    return Flops(
        patch_embed=2 * work.patches * vision.hidden_size * vision.patch_dim,
        vision_layers=2 * work.patches * vision.num_layers * vision_layer_weights(vision),
        vision_attention=4 * vision_pairs * vision.hidden_size,
        merger=2 * work.patches // vision.patches_per_token * merger_weights(vision),
        text_layers=2 * work.tokens * text.num_layers * _text_qkv_weights(text)
        + 2 * _tokens_after_attention(config, work) * (text_layer_weights(text) - _text_qkv_weights(text)),
        text_attention=4 * work.text_pairs * text.num_layers * text.num_heads * text.head_dim,
        head=2 * work.targets * text.hidden_size * text.vocab_size,
    )


def training_flops(config: ModelConfig, work: Workload, *, freeze: Collection[str] = ()) -> Flops:
    """Model FLOPs of a forward and a backward pass.

    Args:
        freeze: parts that do not learn, as `model.freeze` names them.
    """
    once = forward_flops(config, work)
    text_learns, merger_learns, tower_learns = (
        part not in freeze for part in ("language_model", "merger", "vision_tower")
    )
    text = 1 + text_learns  # products of a backward pass; the input's gradient goes on to the embeddings or the merger
    merger = merger_learns + (merger_learns or tower_learns)
    tower = 2 * tower_learns
    return Flops(
        patch_embed=once.patch_embed * (1 + tower_learns),  # pixels need no gradient
        vision_layers=once.vision_layers * (1 + tower),
        vision_attention=once.vision_attention * (1 + tower),
        merger=once.merger * (1 + merger),
        text_layers=once.text_layers * (1 + text),
        text_attention=once.text_attention * 3,  # two inputs in each of its two products, and no weights
        head=once.head * (1 + text),
    )


def recomputed_flops(
    config: ModelConfig, work: Workload, recompute: RecomputeSection, *, freeze: Collection[str] = ()
) -> Flops:
    """What the backward pass computes again by choice; what attention kernels recompute inside is not in it."""
    once = forward_flops(config, work)
    if "vision_tower" in freeze:  # it has no backward pass
        once = replace(once, vision_layers=0, vision_attention=0)
    if recompute.granularity == "none":
        return Flops()
    if recompute.granularity == "full":
        return replace(once, patch_embed=0, merger=0, head=0)
    again = Flops()
    if "core_attn" in recompute.modules:
        again += Flops(vision_attention=once.vision_attention, text_attention=once.text_attention)
    if "mlp" in recompute.modules:
        again += Flops(
            vision_layers=once.vision_layers * vision_mlp_weights(config.vision) / vision_layer_weights(config.vision),
            text_layers=2 * _tokens_after_attention(config, work) * text_mlp_weights(config.text),
        )
    return again


def bf16_peak(device_name: str) -> float | None:
    """FLOP/s of a GPU by the name that CUDA gives it; None if it is not in `BF16_PEAKS`."""
    return next((peak for name, peak in BF16_PEAKS.items() if all(word in device_name for word in name.split())), None)


def text_layer_weights(text: TextConfig) -> int:
    """Numbers in the matrices of one language-model layer."""
    return _text_qkv_weights(text) + text.hidden_size * text.num_heads * text.head_dim + text_mlp_weights(text)


def _text_qkv_weights(text: TextConfig) -> int:
    return text.hidden_size * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim


def _tokens_after_attention(config: ModelConfig, work: Workload) -> int:
    """Of the output projections and MLPs, over all layers."""
    return work.tokens * (config.text.num_layers - 1) + work.targets


def text_mlp_weights(text: TextConfig) -> int:
    return 3 * text.hidden_size * text.ffn_hidden_size


def vision_layer_weights(vision: VisionConfig) -> int:
    """Numbers in the matrices of one layer of the vision tower."""
    return 4 * vision.hidden_size**2 + vision_mlp_weights(vision)


def vision_mlp_weights(vision: VisionConfig) -> int:
    return (3 if vision.gated else 2) * vision.hidden_size * vision.ffn_hidden_size


def merger_weights(vision: VisionConfig) -> int:
    """Numbers in the matrices of the patch merger."""
    unit_size = vision.hidden_size * vision.patches_per_token
    return unit_size * (unit_size + vision.out_hidden_size)


def _vision_workload(vision: VisionConfig, grids: Iterable[Grid]) -> Workload:
    total = Workload()
    for steps, height, width in grids:
        a_step = height * width
        windows = a_step**2
        if vision.window_size is not None:
            side = vision.window_size // vision.merge_size // vision.patch_size  # merge units
            windows = _squares(height // vision.merge_size, side) * _squares(width // vision.merge_size, side)
            windows *= vision.patches_per_token**2
        total += Workload(patches=steps * a_step, window_pairs=steps * windows, full_pairs=steps * a_step**2)
    return total


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the pieces that `length` is cut into, `side` long but for the last."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2


def _half_square(length: int) -> int:
    """Pairs (i, j) with 0 <= j <= i < length."""
    return length * (length + 1) // 2
