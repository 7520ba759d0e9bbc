"""An imported or trained directory: its chunks, and where their rows belong in the Hugging Face files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_vcr1.checkpoint.hf_weights import Placed, place_tensors
from megatron_vcr1.checkpoint.model_dir import MANIFEST_FILE, MEGATRON_DIR, read_manifest
from megatron_vcr1.checkpoint.safetensors_io import SafetensorsHeader
from megatron_vcr1.checkpoint.torch_dist import Chunk, GlobalTensor, read_chunk, read_metadata
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout

# Training may pad the vocabulary so that it divides among the ranks.
_PADDED_KEYS = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a Hugging Face tensor, as a chunk holds them."""

    hf_name: str  # the published one
    row: int  # of the Hugging Face tensor
    column: int
    values: Tensor  # [num_rows, num_columns]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A directory whose metadata are read and checked, and whose weights are read chunk by chunk."""

    megatron_dir: Path
    layouts: Mapping[str, TensorLayout]
    headers: Mapping[str, SafetensorsHeader]  # of the files that an export writes
    places: Mapping[str, tuple[Placed, ...]]  # in those files, by published name
    chunks: tuple[Chunk, ...]  # of the model's tensors only

    @property
    def num_bytes(self) -> int:
        """Size of all tensors of an export."""
        return sum(tensor.num_bytes for header in self.headers.values() for tensor in header.tensors)

    def read(self, chunk: Chunk) -> Iterator[StoredRows]:
        """The rows that a chunk holds. Raises UserError when the checkpoint is damaged."""
        rows = read_chunk(self.megatron_dir, chunk).reshape(chunk.shape[0], -1)
        start = chunk.offsets[0]
        column = chunk.offsets[1] if len(chunk.offsets) > 1 else 0
        for block in self.layouts[chunk.key].blocks_in(start, start + chunk.shape[0]):
            yield StoredRows(block.hf_name, block.hf_row, column, rows[block.row : block.row + block.num_rows])


def open_model(model_dir: Path) -> StoredModel:
    """Read and check what an imported or trained directory says of itself.

    Raises:
        UserError: something is missing, damaged or does not fit config.json.
    """
    layouts = model_layout(ModelConfig.from_pretrained(model_dir))
    headers = read_manifest(model_dir)
    places = place_tensors(headers, layouts, model_dir / MANIFEST_FILE)
    tensors = read_model_metadata(model_dir / MEGATRON_DIR, layouts)
    chunks = tuple(chunk for key in layouts for chunk in tensors[key].chunks)
    return StoredModel(model_dir / MEGATRON_DIR, layouts, headers, places, chunks)


def read_model_metadata(megatron_dir: Path, layouts: Mapping[str, TensorLayout]) -> dict[str, GlobalTensor]:
    """The tensors of a Megatron checkpoint, which must hold the model; beside it there may be others (the optimizer's).

    Raises:
        UserError: a tensor of the model is missing or of another shape, or config.json does not know it.
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
