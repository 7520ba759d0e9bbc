"""The weights of a sharded model as Hugging Face tensors, one after another: for engines that sample from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcr1.checkpoint.pieces import parameter_pieces
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout, to_hf
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.parallel import mesh


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A piece's place in the whole Megatron tensor, and a rank that has it."""

    rank: int  # of the world
    row: int
    column: int
    num_rows: int
    num_columns: int
    dtype: torch.dtype


class HfTensorStream:
    """Iterating gives (published name, tensor) of every weight, whole, as `stream_hf_tensors` explains.

    It can be iterated any number of times, each time with the weights of the moment.
    """

    def __init__(self, model: QwenVLModel) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        mine = {}
        for piece in chain.from_iterable(parameter_pieces(self._model).values()):
            column = piece.offsets[1] if len(piece.offsets) > 1 else 0
            mine[piece.key, piece.offsets[0], column] = piece.values.view(piece.shape[0], -1)
        owners = _owners(mine)
        for key, layout in model_layout(self._model.model_config).items():
            whole = _gather(layout, owners[key], {place[1:]: rows for place, rows in mine.items() if place[0] == key})
            yield from to_hf(layout, whole).items()


def stream_hf_tensors(model: QwenVLModel) -> HfTensorStream:
    """The weights of a model under their Hugging Face names, gathered from tensor- and pipeline-parallel shards.

    A collective of the ranks of one copy of the model: all iterate to the end, in step. Every rank gets every tensor,
    on its device, in the parameters' dtype; no more than one Megatron tensor is held whole at a time, beyond what the
    caller keeps. Tied embeddings come once, under the embedding's name, as in the published files; what pads the
    vocabulary is left out.
    """
    return HfTensorStream(model)


def _owners(mine: dict[tuple[str, int, int], Tensor]) -> dict[str, list[_Rectangle]]:
    """The rectangles that make up each Megatron tensor; of ranks that hold the same one, the first gives it."""
    my_rank = dist.get_rank()
    places = [
        (key, _Rectangle(my_rank, row, column, rows.shape[0], rows.shape[1], rows.dtype))
        for (key, row, column), rows in mine.items()
    ]
    group = parallel_state.get_model_parallel_group()
    everyone: list[list[tuple[str, _Rectangle]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, places, group=group)
    owners: dict[str, list[_Rectangle]] = {}
    for key, found in (pair for one in everyone for pair in one):
        others = owners.setdefault(key, [])
        if all((other.row, other.column) != (found.row, found.column) for other in others):
            others.append(found)
    return owners


def _gather(layout: TensorLayout, owners: list[_Rectangle], mine: dict[tuple[int, int], Tensor]) -> Tensor:
    """A whole Megatron tensor, with the rows that pad the vocabulary, on every rank."""
    num_rows = max(one.row + one.num_rows for one in owners)
    whole = torch.empty(num_rows, layout.num_columns, dtype=owners[0].dtype, device=mesh.device())
    for one in owners:
        target = whole[one.row : one.row + one.num_rows, one.column : one.column + one.num_columns]
        is_mine = one.rank == dist.get_rank()
        piece = (
            mine[one.row, one.column] if is_mine else torch.empty(target.shape, dtype=one.dtype, device=whole.device)
        )
        dist.broadcast(piece, src=one.rank, group=parallel_state.get_model_parallel_group())
        target.copy_(piece)
    return whole
