"""Loading of weights into a sharded model, from a Megatron checkpoint or directly from a Hugging Face directory.

In both cases every rank reads only the rows or chunks that its shards need, at any layout, without communication.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Protocol

import torch

from megatron_vcr1.checkpoint.hf_import import CHUNK_BYTES
from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, is_imported
from megatron_vcr1.checkpoint.shard_slices import ShardedModel, ShardSlice, parameter_slices, read_slices
from megatron_vcr1.checkpoint.stored_model import read_model_metadata
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout


class LoadableModel(ShardedModel, Protocol):
    """The interface that loading expects of a model: its configuration and its sharded parameters."""

    model_config: ModelConfig


def load_model_weights(model: LoadableModel, model_dir: Path) -> None:
    """Load the model's parameters from a model directory, converted to the parameters' own dtype.

    Args:
        model: this rank's part of the model, built for the configuration of ``model_dir``.
        model_dir: a Hugging Face directory, an imported model or a training checkpoint.

    Raises:
        UserError: the directory is incomplete or damaged, or contains another model; the message names the tensor or
            file.
    """
    layouts = model_layout(model.model_config)
    if is_imported(model_dir):
        tensors = read_model_metadata(model_dir / MEGATRON_DIR, layouts)
        read_slices(model_dir / MEGATRON_DIR, tensors, _shards(model))
    else:
        with HfWeights(model_dir, layouts) as weights:
            for shard in _shards(model):
                _read_shard(shard, layouts[shard.key], weights)


def _shards(model: ShardedModel) -> list[ShardSlice]:
    """Return the slices of all parameters, which are whole shards."""
    return list(chain.from_iterable(parameter_slices(model).values()))


def _read_shard(shard: ShardSlice, layout: TensorLayout, weights: HfWeights) -> None:
    """Read a shard from Hugging Face tensors, a few megabytes at a time; padding rows of the vocabulary become zero."""
    target = shard.values.view(shard.shape[0], -1)
    first_row = shard.offsets[0]
    first_column = shard.offsets[1] if len(shard.offsets) > 1 else 0
    dtype = weights.dtype(layout)
    # Rows of the shard that exist in the file; negative if the shard has padding rows only.
    num_rows = min(target.shape[0], layout.shape[0] - first_row)
    rows_per_read = max(1, CHUNK_BYTES // (layout.num_columns * dtype.itemsize))
    for start in range(0, num_rows, rows_per_read):
        stop = min(start + rows_per_read, num_rows)
        rows = torch.empty(stop - start, layout.num_columns, dtype=dtype)
        weights.read_rows(layout, first_row + start, rows)
        target[start:stop].copy_(rows[:, first_column : first_column + target.shape[1]])
    target[max(num_rows, 0) :].zero_()
