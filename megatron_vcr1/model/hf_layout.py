"""The mapping between the rows of Megatron tensors and Hugging Face tensors, which all conversions share.

A Megatron tensor is a stack of row blocks of Hugging Face tensors. The query-key-value projection interleaves its
rows by key-value group, the gated MLP stacks the gate on top of the up projection, and every other tensor is
one block. Rows are the first dimension; the remaining dimensions are flattened into columns and never split. Every
Hugging Face tensor belongs to exactly one Megatron tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vcr1.model.config import ModelConfig, TextConfig, VisionConfig


@dataclass(frozen=True, slots=True)
class RowBlock:
    """A range of rows that is contiguous both in a Hugging Face tensor and in a Megatron tensor."""

    hf_name: str  # published name of the Hugging Face tensor, see `published_name`
    hf_row: int  # first row in the Hugging Face tensor
    row: int  # first row in the Megatron tensor
    num_rows: int


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A Megatron tensor: its checkpoint key, its global shape, and the blocks that cover its rows without gaps."""

    key: str
    shape: tuple[int, ...]
    blocks: tuple[RowBlock, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]  # shapes of the Hugging Face tensors, by published name

    @property
    def num_columns(self) -> int:
        """Number of columns: the product of all dimensions after the first."""
        return math.prod(self.shape[1:])

    def blocks_in(self, start: int, stop: int) -> Iterator[RowBlock]:
        """Yield the parts of the blocks in Megatron rows [start, stop); their ``row`` is relative to ``start``."""
        for block in self.blocks:
            first = max(start, block.row)
            last = min(stop, block.row + block.num_rows)
            if first < last:
                yield RowBlock(block.hf_name, block.hf_row + first - block.row, first - start, last - first)


def model_layout(config: ModelConfig) -> dict[str, TensorLayout]:
    """Return the layout of every tensor of the model by Megatron key, in the order of the forward pass."""
    layouts = [*_vision_tower(config.vision), *_language_model(config.text)]
    return {layout.key: layout for layout in layouts}


def hf_shapes(layouts: Mapping[str, TensorLayout]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor by published name."""
    return {name: shape for layout in layouts.values() for name, shape in layout.hf_shapes.items()}


def published_name(hf_name: str) -> str:
    """Return the published name (``visual.*``, ``model.layers.*``) of a tensor, which transformers may have renamed.

    >>> published_name("model.language_model.norm.weight"), published_name("model.visual.merger.ln_q.weight")
    ('model.norm.weight', 'visual.merger.ln_q.weight')
    """
    if hf_name.startswith("model.visual."):
        return hf_name.removeprefix("model.")
    if hf_name.startswith("model.language_model."):
        return "model." + hf_name.removeprefix("model.language_model.")
    return hf_name


def to_megatron(layout: TensorLayout, hf_tensors: Mapping[str, Tensor]) -> Tensor:
    """Build a whole Megatron tensor from Hugging Face tensors.

    Args:
        layout: the tensor to build.
        hf_tensors: Hugging Face tensors by published name.

    Returns:
        A tensor of shape ``layout.shape``.

    Raises:
        KeyError: a Hugging Face tensor is missing.
    """
    rows = [
        hf_tensors[block.hf_name].reshape(-1, layout.num_columns)[block.hf_row : block.hf_row + block.num_rows]
        for block in layout.blocks
    ]
    return torch.cat(rows).reshape(layout.shape)


def to_hf(layout: TensorLayout, tensor: Tensor) -> dict[str, Tensor]:
    """Split a whole Megatron tensor into its Hugging Face tensors, by published name; the inverse of `to_megatron`.

    Rows beyond ``layout.shape``, which pad the vocabulary, are dropped.
    """
    rows = tensor.reshape(tensor.shape[0], layout.num_columns)
    hf_tensors = {}
    for name, shape in layout.hf_shapes.items():
        blocks = sorted((block for block in layout.blocks if block.hf_name == name), key=lambda block: block.hf_row)
        parts = [rows[block.row : block.row + block.num_rows] for block in blocks]
        hf_tensors[name] = torch.cat(parts).reshape(shape)
    return hf_tensors


def _language_model(config: TextConfig) -> Iterator[TensorLayout]:
    hidden = config.hidden_size
    yield _whole(
        "language_model.embedding.word_embeddings.weight", "model.embed_tokens.weight", config.vocab_size, hidden
    )
    for index in range(config.num_layers):
        yield from _language_layer(config, f"language_model.decoder.layers.{index}", f"model.layers.{index}")
    yield _whole("language_model.decoder.final_layernorm.weight", "model.norm.weight", hidden)
    if not config.tied_embeddings:
        yield _whole("language_model.output_layer.weight", "lm_head.weight", config.vocab_size, hidden)


def _language_layer(config: TextConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    hidden, ffn_hidden = config.hidden_size, config.ffn_hidden_size
    query_rows = config.num_heads // config.num_kv_heads * config.head_dim  # query rows of one key-value group
    attention, hf_attention = f"{key}.self_attention", f"{hf_name}.self_attn"
    yield _whole(f"{attention}.linear_qkv.layer_norm_weight", f"{hf_name}.input_layernorm.weight", hidden)
    for part, columns in (("weight", (hidden,)), ("bias", ())):
        sources = [(f"{hf_attention}.q_proj.{part}", 0, query_rows)]
        sources += [(f"{hf_attention}.{name}.{part}", 0, config.head_dim) for name in ("k_proj", "v_proj")]
        yield _interleaved(f"{attention}.linear_qkv.{part}", sources, config.num_kv_heads, columns)
    yield _whole(
        f"{attention}.linear_proj.weight", f"{hf_attention}.o_proj.weight", hidden, config.num_heads * config.head_dim
    )
    yield _whole(f"{key}.mlp.linear_fc1.layer_norm_weight", f"{hf_name}.post_attention_layernorm.weight", hidden)
    yield _gate_on_up(f"{key}.mlp.linear_fc1", f"{hf_name}.mlp", "weight", ffn_hidden, (hidden,))
    yield _whole(f"{key}.mlp.linear_fc2.weight", f"{hf_name}.mlp.down_proj.weight", hidden, ffn_hidden)


def _vision_tower(config: VisionConfig) -> Iterator[TensorLayout]:
    patch_shape = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    name = "visual.patch_embed.proj.weight"
    yield TensorLayout(
        "vision_tower.patch_embed.weight",
        (config.hidden_size, config.patch_dim),
        (RowBlock(name, 0, 0, config.hidden_size),),
        {name: (config.hidden_size, *patch_shape)},
    )
    for index in range(config.num_layers):
        yield from _vision_layer(config, f"vision_tower.decoder.layers.{index}", f"visual.blocks.{index}")
    yield from _merger(config)


def _vision_layer(config: VisionConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    hidden, ffn_hidden = config.hidden_size, config.ffn_hidden_size
    norm_parts = ("weight",) if config.gated else ("weight", "bias")  # RMSNorm or LayerNorm
    attention = f"{key}.self_attention"
    for part in norm_parts:
        yield _whole(f"{attention}.linear_qkv.layer_norm_{part}", f"{hf_name}.norm1.{part}", hidden)
        yield _whole(f"{key}.mlp.linear_fc1.layer_norm_{part}", f"{hf_name}.norm2.{part}", hidden)
    for part in ("weight", "bias"):
        columns = (hidden,) if part == "weight" else ()
        qkv = f"{hf_name}.attn.qkv.{part}"  # all query heads, then all key heads, then all value heads
        sources = [(qkv, first, config.head_dim) for first in (0, hidden, 2 * hidden)]
        yield _interleaved(f"{attention}.linear_qkv.{part}", sources, config.num_heads, columns)
        yield _whole(f"{attention}.linear_proj.{part}", f"{hf_name}.attn.proj.{part}", hidden, *columns)
        if config.gated:
            yield _gate_on_up(f"{key}.mlp.linear_fc1", f"{hf_name}.mlp", part, ffn_hidden, columns)
        else:
            yield _whole(f"{key}.mlp.linear_fc1.{part}", f"{hf_name}.mlp.fc1.{part}", ffn_hidden, *columns)
        down = "down_proj" if config.gated else "fc2"
        down_columns = (ffn_hidden,) if part == "weight" else ()
        yield _whole(f"{key}.mlp.linear_fc2.{part}", f"{hf_name}.mlp.{down}.{part}", hidden, *down_columns)


def _merger(config: VisionConfig) -> Iterator[TensorLayout]:
    merged = config.hidden_size * config.patches_per_token
    for part in ("weight",) if config.gated else ("weight", "bias"):
        yield _whole(f"vision_tower.merger.norm.{part}", f"visual.merger.ln_q.{part}", config.hidden_size)
    for part in ("weight", "bias"):
        columns = (merged,) if part == "weight" else ()
        yield _whole(f"vision_tower.merger.linear_fc1.{part}", f"visual.merger.mlp.0.{part}", merged, *columns)
        yield _whole(
            f"vision_tower.merger.linear_fc2.{part}", f"visual.merger.mlp.2.{part}", config.out_hidden_size, *columns
        )


def _whole(key: str, hf_name: str, *shape: int) -> TensorLayout:
    """Describe a Megatron tensor that equals a Hugging Face tensor."""
    return TensorLayout(key, shape, (RowBlock(hf_name, 0, 0, shape[0]),), {hf_name: shape})


def _gate_on_up(key: str, hf_mlp: str, part: str, ffn_hidden: int, columns: tuple[int, ...]) -> TensorLayout:
    """Describe the first layer of a gated MLP: all rows of the gate projection, then all rows of the up projection."""
    sources = [(f"{hf_mlp}.{name}.{part}", 0, ffn_hidden) for name in ("gate_proj", "up_proj")]
    return _interleaved(f"{key}.{part}", sources, 1, columns)


def _interleaved(
    key: str, sources: list[tuple[str, int, int]], num_groups: int, columns: tuple[int, ...]
) -> TensorLayout:
    """Describe a tensor that is a sequence of groups, each with rows of every source.

    Args:
        key: checkpoint key of the Megatron tensor.
        sources: for each Hugging Face source ``(name, first row of group 0, rows per group)``, in the order within a
            group. One name may occur several times.
        num_groups: number of groups.
        columns: the dimensions after the first.
    """
    blocks: list[RowBlock] = []
    hf_rows: dict[str, int] = {}
    row = 0
    for group in range(num_groups):
        for name, first, rows in sources:
            blocks.append(RowBlock(name, first + group * rows, row, rows))
            hf_rows[name] = hf_rows.get(name, 0) + rows
            row += rows
    return TensorLayout(key, (row, *columns), tuple(blocks), {name: (rows, *columns) for name, rows in hf_rows.items()})
