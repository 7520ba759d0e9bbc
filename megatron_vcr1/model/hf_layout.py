"""The mapping between the rows of Megatron tensors and Hugging Face tensors, which all conversions share.

A Megatron tensor is a stack of row blocks of Hugging Face tensors. The query-key-value projection interleaves its
rows by key-value group, the gated MLP stacks the gate on top of the up projection, and every other tensor is
one block. Rows are the first dimension; the remaining dimensions are flattened into columns and never split. A row of
an expert weight is the matrix of one expert, which the two formats store transposed to each other. Every Hugging Face
tensor belongs to exactly one Megatron tensor. Rows that no block covers, and columns beyond those of the
Hugging Face tensors, are zero: they pad the vision tower's MLPs (`config.mlp_padding`).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vcr1.model.config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig

EMBEDDING_KEY = "language_model.embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class RowBlock:
    """A range of rows that is contiguous both in a Hugging Face tensor and in a Megatron tensor."""

    hf_name: str  # published name of the Hugging Face tensor, see `published_name`
    hf_row: int  # first row in the Hugging Face tensor
    row: int  # first row in the Megatron tensor
    num_rows: int


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A Megatron tensor: its checkpoint key, its global shape, and the blocks that cover its rows without padding."""

    key: str
    shape: tuple[int, ...]
    blocks: tuple[RowBlock, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]  # shapes of the Hugging Face tensors, by published name
    # Whether each row is a matrix that the published tensor has transposed. transformers 5 writes it as it is here.
    is_transposed: bool = False

    def shapes_in_files(self, hf_name: str) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that a Hugging Face tensor may have in a file; the published one is the first."""
        return (self.hf_shapes[hf_name], *((self.shape,) if self.is_transposed else ()))

    def from_hf_rows(self, rows: Tensor, hf_shape: Sequence[int]) -> Tensor:
        """Convert whole rows of a Hugging Face tensor, [num_rows, num_hf_columns], to rows of the Megatron tensor.

        Args:
            hf_shape: shape of the Hugging Face tensor, one of `shapes_in_files`.
        """
        return _transpose_rows(rows, self.shape[2]) if self._is_swapped(hf_shape) else rows

    def to_hf_rows(self, rows: Tensor, hf_shape: Sequence[int]) -> Tensor:
        """Convert whole rows of the Megatron tensor without padding to rows of a Hugging Face tensor of a shape."""
        return _transpose_rows(rows, self.shape[1]) if self._is_swapped(hf_shape) else rows

    def _is_swapped(self, hf_shape: Sequence[int]) -> bool:
        return self.is_transposed and tuple(hf_shape) != self.shape

    @property
    def num_columns(self) -> int:
        """Number of columns: the product of all dimensions after the first."""
        return math.prod(self.shape[1:])

    @property
    def num_hf_columns(self) -> int:
        """Number of columns of the Hugging Face tensors; columns after them are padding."""
        return math.prod(next(iter(self.hf_shapes.values()))[1:])

    @property
    def is_padded(self) -> bool:
        """Whether some values are in no Hugging Face tensor, and zero."""
        return math.prod(self.shape) > sum(map(math.prod, self.hf_shapes.values()))

    def blocks_in(self, start: int, stop: int) -> Iterator[RowBlock]:
        """Yield the parts of the blocks in Megatron rows [start, stop); their ``row`` is relative to ``start``."""
        for block in self.blocks:
            first = max(start, block.row)
            last = min(stop, block.row + block.num_rows)
            if first < last:
                yield RowBlock(block.hf_name, block.hf_row + first - block.row, first - start, last - first)


def _transpose_rows(rows: Tensor, num_matrix_rows: int) -> Tensor:
    """Transpose the matrix in each row; [num_rows, columns] to the same shape.

    Args:
        num_matrix_rows: rows of each matrix.
    """
    return rows.reshape(len(rows), num_matrix_rows, -1).transpose(1, 2).flatten(1)


def model_layout(config: ModelConfig) -> dict[str, TensorLayout]:
    """Return the layout of every tensor of the model by Megatron key, in the order of the forward pass."""
    return {layout.key: layout for layout in config.family.tensor_layouts(config)}


def hf_shapes(layouts: Mapping[str, TensorLayout]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor by published name."""
    return {name: shape for layout in layouts.values() for name, shape in layout.hf_shapes.items()}


def published_name(hf_name: str, published: Container[str]) -> str:
    """Return the published name of a tensor, which another version of transformers may have renamed.

    A model is published with flat names (``visual.*``, ``model.layers.*``) or nested ones (``model.visual.*``,
    ``model.language_model.layers.*``).

    Args:
        hf_name: the name in a file, or in transformers' model.
        published: the published names. A name that is not among them in either form is returned unchanged.

    >>> published_name("model.language_model.norm.weight", {"model.norm.weight"})
    'model.norm.weight'
    >>> published_name("visual.merger.norm.weight", {"model.visual.merger.norm.weight"})
    'model.visual.merger.norm.weight'
    """
    if hf_name in published:
        return hf_name
    for flat, nested in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        for old, new in ((nested, flat), (flat, nested)):
            renamed = new + hf_name.removeprefix(old)
            if hf_name.startswith(old) and renamed in published:
                return renamed
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
    first = hf_tensors[layout.blocks[0].hf_name]
    rows = torch.zeros(layout.shape[0], layout.num_columns, dtype=first.dtype, device=first.device)
    for block in layout.blocks:
        source = hf_tensors[block.hf_name].reshape(-1, layout.num_hf_columns)
        target = rows[block.row : block.row + block.num_rows, : layout.num_hf_columns]
        source = source[block.hf_row : block.hf_row + block.num_rows]
        target.copy_(layout.from_hf_rows(source, hf_tensors[block.hf_name].shape))
    return rows.reshape(layout.shape)


def to_hf(layout: TensorLayout, tensor: Tensor) -> dict[str, Tensor]:
    """Split a whole Megatron tensor into its Hugging Face tensors, by published name; the inverse of `to_megatron`.

    Padding is dropped, and so are rows beyond ``layout.shape``, which pad the vocabulary.
    """
    rows = tensor.reshape(tensor.shape[0], layout.num_columns)[:, : layout.num_hf_columns]
    hf_tensors = {}
    for name, shape in layout.hf_shapes.items():
        blocks = sorted((block for block in layout.blocks if block.hf_name == name), key=lambda block: block.hf_row)
        parts = [layout.to_hf_rows(rows[block.row : block.row + block.num_rows], shape) for block in blocks]
        hf_tensors[name] = torch.cat(parts).reshape(shape)
    return hf_tensors


def language_model_layouts(config: TextConfig, hf_name: str) -> Iterator[TensorLayout]:
    """Yield the tensors of the language model.

    Args:
        config: the language model.
        hf_name: published name of the module that contains the embedding, the layers and the final norm.
    """
    hidden = config.hidden_size
    yield whole(EMBEDDING_KEY, f"{hf_name}.embed_tokens.weight", config.vocab_size, hidden)
    for index in range(config.num_layers):
        key, hf_layer = f"language_model.decoder.layers.{index}", f"{hf_name}.layers.{index}"
        yield from _language_attention(config, key, hf_layer)
        experts = config.layer_experts(index)
        if experts is None:
            yield from _language_mlp(config, key, hf_layer)
        else:
            yield from _experts(experts, config.hidden_size, key, hf_layer)
    yield whole("language_model.decoder.final_layernorm.weight", f"{hf_name}.norm.weight", hidden)
    if not config.tied_embeddings:
        yield whole("language_model.output_layer.weight", "lm_head.weight", config.vocab_size, hidden)


def _language_attention(config: TextConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    hidden = config.hidden_size
    query_rows = config.num_heads // config.num_kv_heads * config.head_dim  # query rows of one key-value group
    attention, hf_attention = f"{key}.self_attention", f"{hf_name}.self_attn"
    yield whole(f"{attention}.linear_qkv.layer_norm_weight", f"{hf_name}.input_layernorm.weight", hidden)
    for part in ("weight", "bias") if config.qkv_bias else ("weight",):
        columns = (hidden,) if part == "weight" else ()
        sources = [(f"{hf_attention}.q_proj.{part}", 0, query_rows)]
        sources += [(f"{hf_attention}.{name}.{part}", 0, config.head_dim) for name in ("k_proj", "v_proj")]
        yield interleaved(f"{attention}.linear_qkv.{part}", sources, config.num_kv_heads, columns)
    for name in ("q", "k") if config.qk_norm else ():
        yield whole(f"{attention}.{name}_layernorm.weight", f"{hf_attention}.{name}_norm.weight", config.head_dim)
    yield whole(
        f"{attention}.linear_proj.weight", f"{hf_attention}.o_proj.weight", hidden, config.num_heads * config.head_dim
    )


def _language_mlp(config: TextConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    hidden, ffn_hidden = config.hidden_size, config.ffn_hidden_size
    yield whole(f"{key}.mlp.linear_fc1.layer_norm_weight", f"{hf_name}.post_attention_layernorm.weight", hidden)
    yield gate_on_up(f"{key}.mlp.linear_fc1", f"{hf_name}.mlp", "weight", ffn_hidden, (hidden,))
    yield whole(f"{key}.mlp.linear_fc2.weight", f"{hf_name}.mlp.down_proj.weight", hidden, ffn_hidden)


def _experts(experts: ExpertsConfig, hidden: int, key: str, hf_name: str) -> Iterator[TensorLayout]:
    yield whole(f"{key}.pre_mlp_layernorm.weight", f"{hf_name}.post_attention_layernorm.weight", hidden)
    yield whole(f"{key}.mlp.router.weight", f"{hf_name}.mlp.gate.weight", experts.num_experts, hidden)
    # Gate rows on top of up rows, as in `gate_on_up`; they are columns in the published files.
    for part, name, rows, columns in (
        ("linear_fc1", "gate_up_proj", 2 * experts.ffn_hidden_size, hidden),
        ("linear_fc2", "down_proj", hidden, experts.ffn_hidden_size),
    ):
        published = f"{hf_name}.mlp.experts.{name}"
        yield TensorLayout(
            f"{key}.mlp.experts.{part}.weight",
            (experts.num_experts, rows, columns),
            (RowBlock(published, 0, 0, experts.num_experts),),
            {published: (experts.num_experts, columns, rows)},
            is_transposed=True,
        )


def patch_embed_layout(vision: VisionConfig, hf_name: str) -> TensorLayout:
    """Describe the weight of the patch embedding, which is published as a 3-D convolution."""
    patch_shape = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    name = f"{hf_name}.weight"
    return TensorLayout(
        "vision_tower.patch_embed.weight",
        (vision.hidden_size, vision.patch_dim),
        (RowBlock(name, 0, 0, vision.hidden_size),),
        {name: (vision.hidden_size, *patch_shape)},
    )


def norm_parts(normalization: str) -> tuple[str, ...]:
    """Return the names of a norm's parameters."""
    return ("weight",) if normalization == "RMSNorm" else ("weight", "bias")


def vision_attention_layouts(vision: VisionConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    """Yield the tensors of a vision layer's attention and of the norm before it.

    Args:
        vision: the vision tower.
        key: key of the attention module.
        hf_name: published name of the layer.
    """
    hidden = vision.hidden_size
    for part in norm_parts(vision.normalization):
        yield whole(f"{key}.linear_qkv.layer_norm_{part}", f"{hf_name}.norm1.{part}", hidden)
    for part in ("weight", "bias"):
        columns = (hidden,) if part == "weight" else ()
        qkv = f"{hf_name}.attn.qkv.{part}"  # all query heads, then all key heads, then all value heads
        sources = [(qkv, first, vision.head_dim) for first in (0, hidden, 2 * hidden)]
        yield interleaved(f"{key}.linear_qkv.{part}", sources, vision.num_heads, columns)
        yield whole(f"{key}.linear_proj.{part}", f"{hf_name}.attn.proj.{part}", hidden, *columns)


def whole(key: str, hf_name: str, *shape: int, padded_shape: tuple[int, ...] | None = None) -> TensorLayout:
    """Describe a Megatron tensor that equals a Hugging Face tensor, except for padding at the end of its dimensions."""
    return TensorLayout(key, padded_shape or shape, (RowBlock(hf_name, 0, 0, shape[0]),), {hf_name: shape})


def gate_on_up(
    key: str, hf_mlp: str, part: str, ffn_hidden: int, columns: tuple[int, ...], padding: int = 0
) -> TensorLayout:
    """Describe the first layer of a gated MLP: all rows of the gate projection, then all rows of the up projection.

    Args:
        padding: number of zero rows after each projection.
    """
    sources = [(f"{hf_mlp}.{name}.{part}", 0, ffn_hidden) for name in ("gate_proj", "up_proj")]
    return interleaved(f"{key}.{part}", sources, 1, columns, padding)


def interleaved(
    key: str, sources: list[tuple[str, int, int]], num_groups: int, columns: tuple[int, ...], padding: int = 0
) -> TensorLayout:
    """Describe a tensor that is a sequence of groups, each with rows of every source.

    Args:
        key: checkpoint key of the Megatron tensor.
        sources: for each Hugging Face source ``(name, first row of group 0, rows per group)``, in the order within a
            group. One name may occur several times.
        num_groups: number of groups.
        columns: the dimensions after the first.
        padding: number of zero rows after the rows of each source.
    """
    blocks: list[RowBlock] = []
    hf_rows: dict[str, int] = {}
    row = 0
    for group in range(num_groups):
        for name, first, rows in sources:
            blocks.append(RowBlock(name, first + group * rows, row, rows))
            hf_rows[name] = hf_rows.get(name, 0) + rows
            row += rows + padding
    return TensorLayout(key, (row, *columns), tuple(blocks), {name: (rows, *columns) for name, rows in hf_rows.items()})
