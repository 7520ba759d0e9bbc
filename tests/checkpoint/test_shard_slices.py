from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vcr1.checkpoint import torch_dist
from megatron_vcr1.checkpoint.shard_slices import (
    ShardSlice,
    read_slices,
    slices_of_holder,
    slices_of_range,
    split_into_chunks,
    split_into_rectangles,
)
from megatron_vcr1.checkpoint.torch_dist import read_metadata
from megatron_vcr1.errors import UserError


def _slice(values: Tensor, shape: tuple[int, ...], *, start: int = 0, padded: bool = False) -> ShardSlice:
    return ShardSlice("w", shape, (0,) * len(shape), shape, start, values, is_padded=padded, is_main_replica=True)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1, 6)])
def test_rectangles_cover_a_flat_range_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in combinations(range(math.prod(shape) + 1), 2):
        found = []
        for corner, size in split_into_rectangles(start, stop, shape):
            part = numbers[tuple(slice(at, at + length) for at, length in zip(corner, size, strict=True))]
            assert tuple(part.shape) == size
            found += part.flatten().tolist()
        assert found == list(range(start, stop))
        assert len(list(split_into_rectangles(start, stop, shape))) <= 2 * len(shape) - 1
    assert not list(split_into_rectangles(2, 2, shape))


def test_a_range_over_two_shards_gives_a_slice_of_each() -> None:
    gate, up = _slice(torch.zeros(12), (4, 3)), _slice(torch.zeros(6), (2, 3))
    moments = torch.arange(8.0)
    first, second = slices_of_range([gate, up], "optimizer.", 9, moments)
    assert (first.key, first.start, first.values.tolist()) == ("optimizer.w", 9, [0, 1, 2])
    assert (second.start, second.values.tolist()) == (0, [3, 4, 5, 6, 7])


def test_replicas_split_the_writing_evenly() -> None:
    slices = [_slice(torch.zeros(size), (size,)) for size in (50, 1, 1, 1, 30, 40, 7)]
    shares = [slices_of_holder(slices, index, 3) for index in range(3)]
    assert [len(part.values) for share in shares for part in share] == [50, 1, 1, 1, 30, 40, 7]
    assert all(sum(len(part.values) for part in share) <= 43 + 50 for share in shares)


def _write(directory: Path, slices: list[ShardSlice]) -> None:
    directory.mkdir()
    owned = ((key, offsets, values.clone()) for key, offsets, values in split_into_chunks(slices))
    chunks = torch_dist.write_chunks(directory / "__0_0.distcp", owned)
    torch_dist.write_metadata(directory, {"w": (slices[0].values.dtype, slices[0].global_shape)}, chunks)


@pytest.mark.parametrize("cuts", [(0, 35), (0, 1, 6, 7, 23, 35)])
def test_slices_are_read_from_chunks_of_other_slices(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    numbers, shape = torch.randn(35), (5, 7)
    _write(tmp_path / "c", [_slice(numbers[a:b], shape, start=a) for a, b in pairwise(cuts)])
    stored = read_metadata(tmp_path / "c")
    for start, stop in ((0, 35), (3, 4), (5, 30), (13, 16)):
        values = torch.full((stop - start,), torch.nan)
        read_slices(tmp_path / "c", stored, [_slice(values, shape, start=start)])
        assert torch.equal(values, numbers[start:stop])


@pytest.mark.parametrize("num_rows", [3, 7])
def test_only_a_padded_vocabulary_may_have_another_number_of_rows(tmp_path: Path, num_rows: int) -> None:
    numbers = torch.randn(5, 2)
    _write(tmp_path / "c", [_slice(numbers.flatten(), (5, 2))])
    stored = read_metadata(tmp_path / "c")
    values = torch.full((num_rows * 2,), torch.nan)
    with pytest.raises(UserError, match=r"w has shape \(5, 2\) instead of \(\d, 2\)"):
        read_slices(tmp_path / "c", stored, [_slice(values, (num_rows, 2))])
    read_slices(tmp_path / "c", stored, [_slice(values, (num_rows, 2), padded=True)])
    rows = values.view(num_rows, 2)
    assert torch.equal(rows[:5], numbers[:num_rows])
    assert not rows[5:].any()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: w is missing"):
        read_slices(tmp_path, {}, [_slice(torch.zeros(2), (2,))])
