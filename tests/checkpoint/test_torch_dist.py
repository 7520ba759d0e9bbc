from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch

from megatron_vcr1.checkpoint import torch_dist
from megatron_vcr1.checkpoint.torch_dist import Chunk, read_chunk, read_metadata
from megatron_vcr1.errors import UserError
from tests.checkpoint.malicious_pickle import PickleThatCreatesFile


def _write(directory: Path, tensor: torch.Tensor) -> None:
    directory.mkdir()
    chunks = torch_dist.write_chunks(
        directory / "__0_0.distcp", (("w", (row, 0), tensor[row : row + 2].clone()) for row in range(0, len(tensor), 2))
    )
    torch_dist.write_metadata(directory, {"w": (tensor.dtype, tuple(tensor.shape))}, chunks)


def test_chunks_are_read_back(tmp_path: Path) -> None:
    tensor = torch.randn(5, 3, dtype=torch.bfloat16)
    _write(tmp_path / "c", tensor)
    stored = read_metadata(tmp_path / "c")["w"]
    assert (stored.dtype, stored.shape) == (torch.bfloat16, (5, 3))
    assert [chunk.offsets for chunk in stored.chunks] == [(0, 0), (2, 0), (4, 0)]
    assert torch.equal(torch.cat([read_chunk(tmp_path / "c", chunk) for chunk in stored.chunks]), tensor)


def test_a_chunk_is_written_without_the_rest_of_its_buffer(tmp_path: Path) -> None:
    buffer = bytearray(1 << 20)
    (chunk,) = torch_dist.write_chunks(
        tmp_path / "a.distcp", [("w", (0,), torch.frombuffer(buffer, dtype=torch.float32, count=4))]
    )
    assert chunk.num_bytes == (tmp_path / "a.distcp").stat().st_size < 4000


def test_an_index_that_runs_code_is_refused_before_it_runs(imported_dir: Path, tmp_path: Path) -> None:
    (imported_dir / "megatron/.metadata").write_bytes(pickle.dumps(PickleThatCreatesFile(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"\.metadata: refused or damaged: it names .*open instead of torch's Metadata"):
        read_metadata(imported_dir / "megatron")
    assert not (tmp_path / "ran").exists()


def test_a_chunk_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save(PickleThatCreatesFile(tmp_path / "ran"), tmp_path / "a.distcp")
    chunk = Chunk("w", (0,), (4,), "a.distcp", 0, (tmp_path / "a.distcp").stat().st_size)
    with pytest.raises(UserError, match=r"a\.distcp: w at \(0,\) cannot be read"):
        read_chunk(tmp_path, chunk)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("field", ["relative_path", "offsets", "chunks", "properties", "state_dict_metadata", "a dict"])
def test_a_damaged_index_is_refused(tmp_path: Path, field: str) -> None:
    _write(tmp_path / "c", torch.randn(4, 3))
    path = tmp_path / "c/.metadata"
    if field == "a dict":
        path.write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    else:
        path.write_bytes(path.read_bytes().replace(field.encode(), field.upper().encode()))
    with pytest.raises(UserError, match=r"c/\.metadata: refused or damaged: "):
        read_metadata(tmp_path / "c")


def test_a_damaged_chunk_gives_a_tensor_of_its_shape_or_an_error(tmp_path: Path) -> None:
    """The values have no checksum of their own, but the zip file and the pickle around them are checked."""
    _write(tmp_path / "c", torch.randn(2, 3))
    (chunk,) = read_metadata(tmp_path / "c")["w"].chunks
    path = tmp_path / "c" / chunk.file
    whole = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            assert read_chunk(tmp_path / "c", chunk).shape == (2, 3)
        except UserError as error:
            assert f"{path}: w at (0, 0)" in str(error)
            refused += 1
    assert refused > 50


def test_a_truncated_chunk_file_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "c", torch.randn(4, 3))
    file = tmp_path / "c/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    last = read_metadata(tmp_path / "c")["w"].chunks[-1]
    with pytest.raises(UserError, match=r"__0_0\.distcp: w at \(2, 0\) cannot be read"):
        read_chunk(tmp_path / "c", last)


def test_chunks_with_a_gap_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    chunks = torch_dist.write_chunks(tmp_path / "c/__0_0.distcp", [("w", (0, 0), torch.randn(2, 3))])
    torch_dist.write_metadata(tmp_path / "c", {"w": (torch.float32, (4, 3))}, chunks)
    with pytest.raises(UserError, match=r"the chunks of w do not cover its shape \(4, 3\)"):
        read_metadata(tmp_path / "c")


def test_a_chunk_outside_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    chunk = Chunk("w", (0, 0), (2, 3), "../secret", 0, 100)
    torch_dist.write_metadata(tmp_path / "c", {"w": (torch.float32, (2, 3))}, [chunk])
    with pytest.raises(UserError, match="is not in a file of this directory"):
        read_metadata(tmp_path / "c")


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metadata\.json: not found; not a Megatron checkpoint"):
        read_metadata(tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UserError, match="only torch_dist can be read"):
        read_metadata(tmp_path)
