"""Weights into a sharded model, from an imported (or trained) directory or straight from a Hugging Face one.

Either way each rank reads only what its shards need, at any tensor- and pipeline-parallel size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_vcr1.checkpoint.hf_import import CHUNK_BYTES
from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, is_imported
from megatron_vcr1.checkpoint.stored_model import read_model_metadata
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout


class ShardedModel(Protocol):
    """What is asked of a model: megatron-core's sharded state dict, of tensors that are its parameters."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any: ...


def load_model_weights(model: ShardedModel, model_dir: Path) -> None:
    """Fill the model's parameters from a model directory, in their own dtype; every rank of the world must call it.

    Args:
        model: this rank's share of the model that ``model_dir``'s config.json describes.
        model_dir: a Hugging Face directory, one made by import, or a checkpoint made by training.

    Raises:
        UserError: the directory is incomplete or damaged, or does not hold this model; names the tensor or file.
    """
    layouts = model_layout(ModelConfig.from_pretrained(model_dir))
    if is_imported(model_dir):
        _load_megatron(model, model_dir / MEGATRON_DIR, layouts)
    else:
        with HfWeights(model_dir, layouts) as weights, torch.no_grad():
            for shard in _shards(model):
                _fill(shard, layouts[shard.key], weights)


def _load_megatron(model: ShardedModel, megatron_dir: Path, layouts: dict[str, TensorLayout]) -> None:
    # megatron-core unpickles the metadata without a filter; ours, here, refuses a file that could run code.
    read_model_metadata(megatron_dir, layouts)
    state = model.sharded_state_dict()
    keys = list(state)
    loaded = dist_checkpointing.load(state, str(megatron_dir))
    model.load_state_dict({key: loaded[key] for key in keys}, strict=False)


def _shards(model: ShardedModel) -> list[ShardedTensor]:
    """This rank's shards; their data are views of the model's parameters."""
    state = model.sharded_state_dict()
    apply_factories(state)  # cuts the gated MLP's weight into its gate and its up shard
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def _fill(shard: ShardedTensor, layout: TensorLayout, weights: HfWeights) -> None:
    """Copy the shard's rectangle out of the Hugging Face tensors; rows beyond the vocabulary become zero."""
    target = shard.data.view(shard.data.shape[0], -1)
    first = shard.global_offset[0]
    first_column = shard.global_offset[1] if len(shard.global_offset) > 1 else 0
    dtype = weights.dtype(layout)
    num_rows = min(target.shape[0], layout.shape[0] - first)
    rows_each = max(1, CHUNK_BYTES // (layout.num_columns * dtype.itemsize))
    for start in range(0, num_rows, rows_each):
        stop = min(start + rows_each, num_rows)
        rows = torch.empty(stop - start, layout.num_columns, dtype=dtype)
        weights.read_rows(layout, first + start, rows)
        target[start:stop].copy_(rows[:, first_column : first_column + target.shape[1]])
    target[max(num_rows, 0) :].zero_()
