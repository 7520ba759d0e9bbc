"""A model in a Megatron checkpoint: its chunks, and the positions of their rows in the Hugging Face files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_vcr1.checkpoint.hf_weights import TensorLocation, locate_tensors
from megatron_vcr1.checkpoint.model_dir import HF_LAYOUT_FILE, MEGATRON_DIR, read_hf_layout
from megatron_vcr1.checkpoint.safetensors_io import SafetensorsHeader
from megatron_vcr1.checkpoint.torch_dist import Chunk, GlobalTensor, read_chunk, read_metadata
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import EMBEDDING_KEY, TensorLayout, model_layout

# Training may pad the vocabulary so that it is divisible by the tensor-parallel size.
_PADDED_KEYS = (EMBEDDING_KEY, "language_model.output_layer.weight")


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a Hugging Face tensor that a chunk contains."""

    hf_name: str  # published name
    row: int  # first row in the Hugging Face tensor
    column: int  # first column
    values: Tensor  # [num_rows, num_columns]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """An imported model or a training checkpoint, opened and checked. Its weights are read chunk by chunk."""

    megatron_dir: Path
    layouts: Mapping[str, TensorLayout]
    headers: Mapping[str, SafetensorsHeader]  # headers of the safetensors files that an export writes, by file name
    locations: Mapping[str, tuple[TensorLocation, ...]]  # places of the tensors in those files, by published name
    chunks: tuple[Chunk, ...]  # all chunks of the model's tensors, without those of the optimizer

    @property
    def num_bytes(self) -> int:
        """Size of all tensors of an export in bytes."""
        return sum(tensor.num_bytes for header in self.headers.values() for tensor in header.tensors)

    def read(self, chunk: Chunk) -> Iterator[StoredRows]:
        """Read a chunk, as rows of Hugging Face tensors, without padding.

        Raises UserError if the checkpoint is damaged.
        """
        layout = self.layouts[chunk.key]
        start = chunk.offsets[0]
        column = chunk.offsets[1] if len(chunk.offsets) > 1 else 0
        if column >= layout.num_hf_columns:
            return
        if layout.is_transposed and chunk.shape[1:] != layout.shape[1:]:
            raise UserError(f"{self.megatron_dir}: {chunk.key} has chunks that divide an expert; it cannot be exported")
        rows = read_chunk(self.megatron_dir, chunk).reshape(chunk.shape[0], -1)[:, : layout.num_hf_columns - column]
        for block in layout.blocks_in(start, start + chunk.shape[0]):
            hf_shape = self.locations[block.hf_name][0].tensor.shape
            values = layout.to_hf_rows(rows[block.row : block.row + block.num_rows], hf_shape)
            yield StoredRows(block.hf_name, block.hf_row, column, values)


def open_model(model_dir: Path) -> StoredModel:
    """Open an imported model or a training checkpoint, and check its index and hf_layout.json against config.json.

    Raises:
        UserError: something is missing or damaged, or does not match config.json.
    """
    layouts = model_layout(ModelConfig.from_pretrained(model_dir))
    headers = read_hf_layout(model_dir)
    locations = locate_tensors(headers, layouts, model_dir / HF_LAYOUT_FILE)
    tensors = read_model_metadata(model_dir / MEGATRON_DIR, layouts)
    chunks = tuple(chunk for key in layouts for chunk in tensors[key].chunks)
    return StoredModel(model_dir / MEGATRON_DIR, layouts, headers, locations, chunks)


def read_model_metadata(megatron_dir: Path, layouts: Mapping[str, TensorLayout]) -> dict[str, GlobalTensor]:
    """Read the index of a Megatron checkpoint and check that it contains the model.

    Args:
        megatron_dir: the checkpoint.
        layouts: the model's tensors.

    Returns:
        All tensors of the checkpoint by key, the optimizer's included.

    Raises:
        UserError: a tensor of the model is missing or has another shape, or there are tensors of another model.
    """
    tensors = read_metadata(megatron_dir)
    advice = "the checkpoint belongs to another config.json"
    missing = [key for key in layouts if key not in tensors]
    if missing:
        raise UserError(f"{megatron_dir}: {missing[0]} is missing ({len(missing)} tensors); {advice}")
    parts = tuple({key.split(".")[0] + "." for key in layouts})
    unexpected = [key for key in tensors if key.startswith(parts) and key not in layouts]
    if unexpected:
        raise UserError(f"{megatron_dir}: {unexpected[0]} is unexpected ({len(unexpected)} tensors); {advice}")
    for key, layout in layouts.items():
        shape = tensors[key].shape
        is_padded = key in _PADDED_KEYS and shape[0] > layout.shape[0] and shape[1:] == layout.shape[1:]
        if shape != layout.shape and not is_padded:
            raise UserError(f"{megatron_dir}: {key} has shape {shape} instead of {layout.shape}; {advice}")
    return tensors
