"""Weights into a sharded model, from an imported (or trained) directory or straight from a Hugging Face one.

Either way each rank reads only what its shards need, at any tensor- and pipeline-parallel size.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from megatron_vcr1.checkpoint.hf_import import CHUNK_BYTES
from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, is_imported
from megatron_vcr1.checkpoint.pieces import Piece, ShardedModel, parameter_pieces, read_pieces
from megatron_vcr1.checkpoint.stored_model import read_model_metadata
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout


def load_model_weights(model: ShardedModel, model_dir: Path) -> None:
    """Fill the model's parameters from a model directory, in their own dtype.

    Args:
        model: this rank's share of the model that ``model_dir``'s config.json describes.
        model_dir: a Hugging Face directory, one made by import, or a checkpoint made by training.

    Raises:
        UserError: the directory is incomplete or damaged, or does not hold this model; names the tensor or file.
    """
    layouts = model_layout(ModelConfig.from_pretrained(model_dir))
    if is_imported(model_dir):
        tensors = read_model_metadata(model_dir / MEGATRON_DIR, layouts)
        read_pieces(model_dir / MEGATRON_DIR, tensors, _pieces(model))
    else:
        with HfWeights(model_dir, layouts) as weights:
            for piece in _pieces(model):
                _fill(piece, layouts[piece.key], weights)


def _pieces(model: ShardedModel) -> list[Piece]:
    return list(chain.from_iterable(parameter_pieces(model).values()))


def _fill(shard: Piece, layout: TensorLayout, weights: HfWeights) -> None:
    """Copy the shard's rectangle out of the Hugging Face tensors; rows beyond the vocabulary become zero."""
    target = shard.values.view(shard.shape[0], -1)
    first = shard.offsets[0]
    first_column = shard.offsets[1] if len(shard.offsets) > 1 else 0
    dtype = weights.dtype(layout)
    num_rows = min(target.shape[0], layout.shape[0] - first)
    rows_each = max(1, CHUNK_BYTES // (layout.num_columns * dtype.itemsize))
    for start in range(0, num_rows, rows_each):
        stop = min(start + rows_each, num_rows)
        rows = torch.empty(stop - start, layout.num_columns, dtype=dtype)
        weights.read_rows(layout, first + start, rows)
        target[start:stop].copy_(rows[:, first_column : first_column + target.shape[1]])
    target[max(num_rows, 0) :].zero_()
