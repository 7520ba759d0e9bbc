"""The tensors of a training checkpoint: weights and optimizer state, from the live model to files and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megatron_vcr1.checkpoint.disk import Checksum
from megatron_vcr1.checkpoint.optimizer_state import optimizer_slices
from megatron_vcr1.checkpoint.shard_slices import (
    ShardSlice,
    parameter_slices,
    read_slices,
    slices_of_holder,
    split_into_chunks,
)
from megatron_vcr1.checkpoint.torch_dist import Chunk, ChunkData, TensorSpec, read_metadata, write_chunks
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh


@dataclass(frozen=True, slots=True)
class RankFile:
    """Description of the file of chunks that one rank has written. Rank 0 needs it to write the index."""

    name: str
    chunks: list[Chunk]
    checksum: Checksum
    specs: dict[str, TensorSpec]  # dtype and shape of the global tensors, by key


def slices_to_write(model: nn.Module, optimizer: MegatronOptimizer) -> list[ShardSlice]:
    """Return the slices that this rank writes, so that all ranks together write every value exactly once.

    Weights, and the state of an optimizer that is not distributed, are replicated on all data- and context-parallel
    ranks, which split them among themselves. State of the distributed optimizer exists on one rank only.
    """
    parameters = parameter_slices(unwrap(model))
    replicated = [
        *chain.from_iterable(parameters.values()),
        *optimizer_slices(optimizer, parameters, distributed=False),
    ]
    mine = slices_of_holder(
        [part for part in replicated if part.is_main_replica], mesh.weight_holder_index(), mesh.num_weight_holders()
    )
    sharded = optimizer_slices(optimizer, parameters, distributed=True)
    return [*mine, *(part for part in sharded if part.is_main_replica)]


def copy_lazily(slices: list[ShardSlice]) -> Iterator[ChunkData]:
    """Copy chunks to host memory one at a time, for a save during which training waits."""
    for key, offsets, values in split_into_chunks(slices):
        yield key, offsets, values.to("cpu", copy=True)


def copy_to_host(slices: list[ShardSlice]) -> list[ChunkData]:
    """Copy all chunks to host memory, for a save in the background: training may change the live tensors afterwards.

    Copies from a GPU go to pinned memory and overlap each other; the final synchronization makes all of them complete.
    """
    copies = []
    for key, offsets, values in split_into_chunks(slices):
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        copies.append((key, offsets, copy.copy_(values, non_blocking=True)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def write_rank_file(megatron_dir: Path, slices: list[ShardSlice], chunks: Iterable[ChunkData]) -> RankFile:
    """Write this rank's chunks to its file, and fsync it.

    Args:
        megatron_dir: the torch_dist checkpoint.
        slices: the slices that the chunks were cut from; only their dtypes and shapes are used.
        chunks: copies of their values in host memory.

    Raises:
        OSError: the disk is full or failed.
    """
    checksum = Checksum()
    name = f"__{mesh.rank()}_0.distcp"
    written = write_chunks(megatron_dir / name, chunks, checksum)
    specs = {part.key: (part.values.dtype, part.global_shape) for part in slices}
    return RankFile(name, written, checksum, specs)


def load_tensors(megatron_dir: Path, model: nn.Module, optimizer: MegatronOptimizer) -> None:
    """Load weights and optimizer state in place, from a checkpoint that was written under any layout.

    Raises:
        UserError: a tensor is missing or damaged, or has another shape or dtype.
    """
    tensors = read_metadata(megatron_dir)
    parameters = parameter_slices(unwrap(model))
    weights = list(chain.from_iterable(parameters.values()))
    for part in weights:
        stored = tensors.get(part.key)
        # `read_slices` would convert the values, but training could then not continue exactly: float32 weights would be
        # rounded, and master weights would be missing.
        if stored is not None and stored.dtype != part.values.dtype:
            dtypes = f"{part.key} is {stored.dtype} in the checkpoint, but {part.values.dtype} in this run"
            raise UserError(
                f"{megatron_dir}: {dtypes.replace('torch.', '')}; resume with the model.dtype that it was saved with"
            )
    states = chain.from_iterable(
        optimizer_slices(optimizer, parameters, distributed=distributed) for distributed in (False, True)
    )
    read_slices(megatron_dir, tensors, [*weights, *states])


def unwrap(model: nn.Module) -> Any:
    """Return the model inside megatron-core's wrappers for data parallelism and mixed precision."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model
