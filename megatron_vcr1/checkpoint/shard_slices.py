"""Slices of shards: this rank's part of the global tensors of a checkpoint, and how it is split into chunks and read.

A rank holds a shard (a rectangle) of each global tensor. A *slice* is a flat range of one shard's values: the whole
shard for a weight, or the range of it for which this data-parallel rank keeps optimizer state. A file stores
rectangles of global tensors, the *chunks*. So a slice is written as the few rectangles that it consists of, and is read
from whatever chunks another layout has written, by copying the overlaps. No rank communicates with another.

    global tensor [4, 3]    shard of TP rank 1: rows 2-3    slice [1, 6) of the shard    its rectangles
        . . .                   . . .                           . . .                        . . .
        . . .                   . . .                           . . .                        . . .
        . . .                   x x x                           . x x                        . a a   [1, 2]
        . . .                   x x x                           x x x                        b b b   [1, 3]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn

from megatron_vcr1.checkpoint.torch_dist import ChunkData, GlobalTensor, read_chunk
from megatron_vcr1.errors import UserError

# Maximum size of a chunk, except that a chunk has at least one row. Chunks are always read whole.
MAX_CHUNK_BYTES = 2**26


class ShardedModel(Protocol):
    """The interface that checkpoints expect of a model: megatron-core's sharded state dict of its parameters."""

    def sharded_state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """Values [start, start + len(values)) of a shard, counted in row-major order."""

    key: str  # key of the global tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # position of the shard's first value in the global tensor, one index per dimension
    shape: tuple[int, ...]  # shape of the shard
    start: int  # flat index of the slice's first value in the shard
    values: Tensor  # [num_values], a view of the live tensor
    is_padded: bool  # whether the global tensor may have more or fewer rows here than in a file (padded vocabulary)
    is_main_replica: bool  # False if another rank of the same data-parallel replica holds the same values

    def rectangles(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield the slice's rectangles: offsets in the global tensor, and values with as many dimensions."""
        position = 0
        for corner, shape in split_into_rectangles(self.start, self.start + len(self.values), self.shape):
            num_values = math.prod(shape)
            offsets = tuple(base + offset for base, offset in zip(self.offsets, corner, strict=True))
            yield offsets, self.values[position : position + num_values].view(shape)
            position += num_values


def split_into_rectangles(
    start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split a flat range of a tensor's values into rectangles, in row-major order.

    The range consists of a partial first row, complete rows, and a partial last row, each of which may be missing. A
    partial row is split in the same way in one dimension less, so there are at most 2 * num_dimensions - 1 rectangles.

    Args:
        start, stop: the range [start, stop).
        shape: shape of the tensor.

    Yields:
        (corner, shape) of each rectangle.
    """
    if start == stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row_size = math.prod(shape[1:])
    first, last = -(-start // row_size), stop // row_size  # rows [first, last) are complete
    if start < first * row_size:
        row_stop = min(stop, first * row_size)  # the range may end within its first row
        base = (first - 1) * row_size
        for corner, part in split_into_rectangles(start - base, row_stop - base, shape[1:]):
            yield (first - 1, *corner), (1, *part)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and last * row_size < stop:
        for corner, part in split_into_rectangles(0, stop - last * row_size, shape[1:]):
            yield (last, *corner), (1, *part)


def parameter_slices(model: ShardedModel) -> dict[nn.Parameter, list[ShardSlice]]:
    """Return the slices of each of this rank's parameters, in the order of the parameter's values.

    Most parameters are a single shard. The first weight of a gated MLP consists of two, gate and up rows, which are
    apart in the global tensor.
    """
    slices = {}
    for value in nested_values(model.sharded_state_dict()):
        shards = list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]
        slices[value.data] = [_whole_shard(shard) for shard in shards]
    return slices


def _whole_shard(shard: ShardedTensor) -> ShardSlice:
    """Convert megatron-core's description of a shard to a slice that covers the whole shard."""
    assert shard.data is not None and shard.prepend_axis_num == 0, shard
    # replica_id is a number, or a tuple that counts copies over pipeline stages (tied embeddings), tensor-parallel
    # ranks and data-parallel ranks. The last one is left out: data-parallel ranks split the writing among themselves.
    replica_id = shard.replica_id
    is_main_replica = not any(replica_id[:-1]) if isinstance(replica_id, tuple) else replica_id == 0
    return ShardSlice(
        key=shard.key,
        global_shape=tuple(shard.global_shape),
        offsets=tuple(shard.global_offset),
        shape=tuple(shard.local_shape),
        start=0,
        values=shard.data.detach().view(-1),
        is_padded=shard.allow_shape_mismatch,
        is_main_replica=is_main_replica,
    )


def slices_of_range(
    parameter: Sequence[ShardSlice], key_prefix: str, start: int, values: Tensor
) -> Iterator[ShardSlice]:
    """Yield the slices of a flat tensor that belongs to a range of a parameter's values, such as an Adam moment.

    Args:
        parameter: the slices of the parameter.
        key_prefix: the key of the new global tensor is this, followed by the parameter's key.
        start: the range's first value in the parameter.
        values: [num_values], the tensor's values for parameter values [start, start + num_values).
    """
    stop = start + len(values)
    ends = list(accumulate(len(part.values) for part in parameter))
    for part, end in zip(parameter, ends, strict=True):
        begin = end - len(part.values)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield replace(
                part,
                key=f"{key_prefix}{part.key}",
                start=first - begin,
                values=values[first - start : last - start],
            )


def slices_of_holder(slices: Sequence[ShardSlice], index: int, num_holders: int) -> list[ShardSlice]:
    """Select the slices that one rank writes, out of those that all ranks with the same weights hold.

    Every slice is written by one of them, and all of them write about equally many bytes.

    Args:
        slices: the same on all of these ranks.
        index: the rank's index among them (`mesh.weight_holder_index`).
        num_holders: number of ranks with the same weights.
    """
    sizes = [part.values.nbytes for part in slices]
    total = max(sum(sizes), 1)
    starts = accumulate(sizes, initial=0)
    return [
        part
        for part, start in zip(slices, starts, strict=False)
        if min(start * num_holders // total, num_holders - 1) == index
    ]


def split_into_chunks(slices: Iterable[ShardSlice]) -> Iterator[ChunkData]:
    """Split slices into the chunks that are written, of at most MAX_CHUNK_BYTES where rows allow it.

    The values are views of the live tensors: copy them before training changes them.
    """
    for part in slices:
        for offsets, values in part.rectangles():
            rows_per_chunk = max(1, MAX_CHUNK_BYTES * len(values) // max(values.nbytes, 1))
            for row in range(0, len(values), rows_per_chunk):
                yield part.key, (offsets[0] + row, *offsets[1:]), values[row : row + rows_per_chunk]


def read_slices(directory: Path, tensors: dict[str, GlobalTensor], slices: Iterable[ShardSlice]) -> None:
    """Fill slices in place from a checkpoint that was written under any layout.

    Args:
        directory: the torch_dist checkpoint.
        tensors: its index, from `read_metadata`.
        slices: their global shapes must be those in the checkpoint, except for the number of rows of a padded
            vocabulary. Rows that the checkpoint does not have become zero.

    Raises:
        UserError: a tensor is missing or has another shape, or its file is damaged.
    """
    for part in slices:
        stored = tensors.get(part.key)
        if stored is None:
            raise UserError(
                f"{directory}: {part.key} is missing; the checkpoint belongs to another model or other settings"
            )
        if stored.shape != part.global_shape and not (part.is_padded and stored.shape[1:] == part.global_shape[1:]):
            shapes = f"shape {stored.shape} instead of {part.global_shape}"
            raise UserError(f"{directory}: {part.key} has {shapes}; the checkpoint belongs to another model")
        for offsets, values in part.rectangles():
            if stored.shape != part.global_shape:
                values.zero_()
            _read_rectangle(directory, stored, offsets, values)


def _read_rectangle(directory: Path, stored: GlobalTensor, offsets: tuple[int, ...], values: Tensor) -> None:
    """Copy the overlap of each stored chunk with a rectangle of the global tensor into the rectangle's values."""
    for chunk in stored.chunks:
        in_rectangle, in_chunk = [], []
        for begin, size, chunk_begin, chunk_size in zip(offsets, values.shape, chunk.offsets, chunk.shape, strict=True):
            first, last = max(begin, chunk_begin), min(begin + size, chunk_begin + chunk_size)
            in_rectangle.append(slice(first - begin, last - begin))
            in_chunk.append(slice(first - chunk_begin, last - chunk_begin))
        if all(overlap.start < overlap.stop for overlap in in_rectangle):
            values[tuple(in_rectangle)].copy_(read_chunk(directory, chunk)[tuple(in_chunk)])
