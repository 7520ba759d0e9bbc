"""The weights of a sharded model as a stream of Hugging Face tensors, for engines that sample from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout, to_hf
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """The place of a shard in its global tensor, and a rank that holds it."""

    rank: int  # global rank
    row: int
    column: int
    num_rows: int
    num_columns: int
    dtype: torch.dtype


class HfTensorStream:
    """An iterable over (published name, whole tensor) of all weights; see `stream_hf_tensors`.

    It can be iterated any number of times, and each time yields the weights of that moment.
    """

    def __init__(self, model: VideoLanguageModel) -> None:
        self._model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        shards: dict[tuple[str, int, int], Tensor] = {}  # by (key, first row, first column), as matrices
        for shard in chain.from_iterable(parameter_slices(self._model).values()):
            column = shard.offsets[1] if len(shard.offsets) > 1 else 0
            shards[shard.key, shard.offsets[0], column] = shard.values.view(shard.shape[0], -1)
        rectangles = _gather_rectangles(shards)
        for key, layout in model_layout(self._model.model_config).items():
            shards_of_key = {place[1:]: values for place, values in shards.items() if place[0] == key}
            yield from to_hf(layout, _gather_tensor(layout, rectangles[key], shards_of_key)).items()


def stream_hf_tensors(model: VideoLanguageModel) -> HfTensorStream:
    """Return the weights of a model under their Hugging Face names, gathered from tensor- and pipeline-parallel shards.

    Iteration is collective: all ranks of a replica must iterate to the end, in step. Every rank gets every tensor, on
    its device and in the parameters' dtype. At most one Megatron tensor is held whole at a time, besides the tensors
    that the caller keeps. A tied embedding appears once, under the embedding's name, as in the published files. Padding
    rows of the vocabulary are left out.
    """
    return HfTensorStream(model)


def _gather_rectangles(shards: dict[tuple[str, int, int], Tensor]) -> dict[str, list[_Rectangle]]:
    """Gather from all ranks of the replica the rectangles that cover each global tensor.

    If several ranks hold the same rectangle (replicated parameters), the first rank is listed. All ranks compute the
    same result, so they agree on who broadcasts.
    """
    my_rank = dist.get_rank()
    mine = [
        (key, _Rectangle(my_rank, row, column, values.shape[0], values.shape[1], values.dtype))
        for (key, row, column), values in shards.items()
    ]
    group = parallel_state.get_model_parallel_group()
    gathered: list[list[tuple[str, _Rectangle]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(gathered, mine, group=group)
    rectangles: dict[str, list[_Rectangle]] = {}
    for key, found in chain.from_iterable(gathered):
        known = rectangles.setdefault(key, [])
        if all((other.row, other.column) != (found.row, found.column) for other in known):
            known.append(found)
    return rectangles


def _gather_tensor(layout: TensorLayout, rectangles: list[_Rectangle], shards: dict[tuple[int, int], Tensor]) -> Tensor:
    """Gather a whole Megatron tensor on every rank of the replica, padding rows of the vocabulary included.

    Each rectangle is broadcast by the rank that holds it; all ranks must go through the rectangles in the same order.
    """
    num_rows = max(part.row + part.num_rows for part in rectangles)
    whole = torch.empty(num_rows, layout.num_columns, dtype=rectangles[0].dtype, device=mesh.device())
    for part in rectangles:
        target = whole[part.row : part.row + part.num_rows, part.column : part.column + part.num_columns]
        if part.rank == dist.get_rank():
            values = shards[part.row, part.column]
        else:
            values = torch.empty(target.shape, dtype=part.dtype, device=whole.device)
        dist.broadcast(values, src=part.rank, group=parallel_state.get_model_parallel_group())
        target.copy_(values)
    return whole
