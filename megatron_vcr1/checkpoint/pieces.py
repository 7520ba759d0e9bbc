"""This rank's pieces of the global tensors of a checkpoint, and their way to the disk and back.

A piece is a run of values of one shard of a global tensor: a whole shard of a weight, or the part of one that this copy
of the model keeps the optimizer's state for. On disk a global tensor is cut into rectangles, so a run is written as the
few rectangles that it consists of, and read from whatever rectangles a run at another layout wrote. No rank sends
anything to another.
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

from megatron_vcr1.checkpoint.torch_dist import GlobalTensor, read_chunk
from megatron_vcr1.errors import UserError

WRITE_BYTES = 2**26  # of a chunk at most, as far as rows allow: what a reader of a part of it must read


class ShardedModel(Protocol):
    """What is asked of a model: megatron-core's sharded state dict, of tensors that are its parameters."""

    def sharded_state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Values [start, start + len(values)) of a shard, counted row by row."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # of the shard in the global tensor
    shape: tuple[int, ...]  # of the shard
    start: int
    values: Tensor  # [num_values], a view of the live tensor
    is_padded: bool  # whether the global tensor may have more rows here than on disk, or fewer
    is_main: bool  # False for what another rank of the same copy of the model has, too

    def rectangles(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Its offsets in the global tensor and its values, in the global tensor's number of dimensions, for each."""
        position = 0
        for corner, shape in rectangles(self.start, self.start + len(self.values), self.shape):
            num_values = math.prod(shape)
            offsets = tuple(base + offset for base, offset in zip(self.offsets, corner, strict=True))
            yield offsets, self.values[position : position + num_values].view(shape)
            position += num_values


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The rectangles (corner, shape) that values [start, stop) of a tensor of ``shape`` consist of, in their order."""
    if start == stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row_size = math.prod(shape[1:])
    first, last = -(-start // row_size), stop // row_size  # whole rows
    if start < first * row_size:
        row_stop = min(stop, first * row_size)
        base = (first - 1) * row_size
        for corner, part in rectangles(start - base, row_stop - base, shape[1:]):
            yield (first - 1, *corner), (1, *part)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and last * row_size < stop:
        for corner, part in rectangles(0, stop - last * row_size, shape[1:]):
            yield (last, *corner), (1, *part)


def parameter_pieces(model: ShardedModel) -> dict[nn.Parameter, list[Piece]]:
    """The pieces of each of this rank's parameters, in the parameter's order of values.

    A gated MLP's weight is two, its gate and its up rows, which are apart in the global tensor.
    """
    pieces = {}
    for value in nested_values(model.sharded_state_dict()):
        shards = list(nested_values(value.build())) if isinstance(value, ShardedTensorFactory) else [value]
        pieces[value.data] = [_whole_shard(shard) for shard in shards]
    return pieces


def _whole_shard(shard: ShardedTensor) -> Piece:
    assert shard.data is not None and shard.prepend_axis_num == 0, shard
    return Piece(
        key=shard.key,
        global_shape=tuple(shard.global_shape),
        offsets=tuple(shard.global_offset),
        shape=tuple(shard.local_shape),
        start=0,
        values=shard.data.detach().view(-1),
        is_padded=shard.allow_shape_mismatch,
        # megatron-core counts replicas over pipeline stages (tied embeddings), tensor ranks and copies of the model.
        is_main=not any(shard.replica_id[:-1]) if isinstance(shard.replica_id, tuple) else shard.replica_id == 0,
    )


def run_of(pieces: Sequence[Piece], key_prefix: str, start: int, values: Tensor) -> Iterator[Piece]:
    """The pieces of a tensor that belongs to values [start, start + len(values)) of a parameter with these pieces."""
    stop = start + len(values)
    ends = list(accumulate(len(piece.values) for piece in pieces))
    for piece, end in zip(pieces, ends, strict=True):
        begin = end - len(piece.values)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield replace(
                piece,
                key=f"{key_prefix}{piece.key}",
                start=first - begin,
                values=values[first - start : last - start],
            )


def shard_of_replica(pieces: Sequence[Piece], index: int, num_replicas: int) -> list[Piece]:
    """Which of the pieces that every copy of the model has the copy ``index`` writes: about as much as each other."""
    sizes = [piece.values.nbytes for piece in pieces]
    total = max(sum(sizes), 1)
    starts = accumulate(sizes, initial=0)
    return [
        piece
        for piece, start in zip(pieces, starts, strict=False)
        if min(start * num_replicas // total, num_replicas - 1) == index
    ]


def cut(pieces: Iterable[Piece]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """The chunks (key, offsets, view of the live tensor) that pieces are written as, of WRITE_BYTES where possible."""
    for piece in pieces:
        for offsets, values in piece.rectangles():
            rows_each = max(1, WRITE_BYTES * len(values) // max(values.nbytes, 1))
            for row in range(0, len(values), rows_each):
                yield piece.key, (offsets[0] + row, *offsets[1:]), values[row : row + rows_each]


def read_pieces(directory: Path, tensors: dict[str, GlobalTensor], pieces: Iterable[Piece]) -> None:
    """Fill pieces' values, in place, from a checkpoint that was written at any layout.

    Args:
        directory: of the torch_dist checkpoint.
        tensors: its metadata.
        pieces: their global shapes must be the stored ones, but for the rows of a padded vocabulary; rows that are not
            stored become zero.

    Raises:
        UserError: a tensor is missing or of another shape, or its file is damaged.
    """
    for piece in pieces:
        stored = tensors.get(piece.key)
        if stored is None:
            raise UserError(
                f"{directory}: {piece.key} is missing; the checkpoint is of another model or other settings"
            )
        if stored.shape != piece.global_shape and not (piece.is_padded and stored.shape[1:] == piece.global_shape[1:]):
            shapes = f"shape {stored.shape} instead of {piece.global_shape}"
            raise UserError(f"{directory}: {piece.key} has {shapes}; the checkpoint is of another model")
        for offsets, values in piece.rectangles():
            if stored.shape != piece.global_shape:
                values.zero_()
            _read_rectangle(directory, stored, offsets, values)


def _read_rectangle(directory: Path, stored: GlobalTensor, offsets: tuple[int, ...], values: Tensor) -> None:
    for chunk in stored.chunks:
        inside, of_chunk = [], []
        for begin, size, chunk_begin, chunk_size in zip(offsets, values.shape, chunk.offsets, chunk.shape, strict=True):
            first, last = max(begin, chunk_begin), min(begin + size, chunk_begin + chunk_size)
            inside.append(slice(first - begin, last - begin))
            of_chunk.append(slice(first - chunk_begin, last - chunk_begin))
        if all(part.start < part.stop for part in inside):
            values[tuple(inside)].copy_(read_chunk(directory, chunk)[tuple(of_chunk)])
