from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_vcr1.checkpoint.safetensors_io import (
    SafetensorsReader,
    SafetensorsWriter,
    create_safetensors,
    parse_header,
)
from megatron_vcr1.errors import UserError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(7, 5, dtype=torch.bfloat16),
        "vector": torch.randn(4),
        "convolution": torch.randn(3, 2, 2, dtype=torch.float16),
        "double": torch.randn(2, 3, dtype=torch.float64),
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_rows_equal_what_the_safetensors_package_wrote(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with SafetensorsReader(file) as reader:
        assert {tensor.name for tensor in reader.header.tensors} == tensors.keys()
        for stored in reader.header.tensors:
            expected = tensors[stored.name]
            assert (stored.shape, stored.dtype) == (tuple(expected.shape), expected.dtype)
            rows = torch.empty(len(expected) - 1, stored.num_columns, dtype=stored.dtype)
            reader.read_rows(stored, 1, rows)
            assert torch.equal(rows, expected[1:].reshape(rows.shape))


def test_written_rectangles_are_read_by_the_safetensors_package(
    file: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with SafetensorsReader(file) as reader:
        header = reader.header
    copy = tmp_path / "b.safetensors"
    create_safetensors(copy, header)
    with closing(SafetensorsWriter(copy)) as writer:
        for stored in header.tensors:
            rows = tensors[stored.name].reshape(-1, stored.num_columns)
            for first in (0, 2):  # rows 0 and 1, then the rest
                for column in range(stored.num_columns):
                    writer.write_rows(stored, first, column, rows[first:][: 2 if first == 0 else None, column, None])
    assert copy.read_bytes() == file.read_bytes()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in safetensors.torch.load_file(copy).items())


def test_a_new_file_has_its_length_but_occupies_no_disk_space(tmp_path: Path) -> None:
    size = 2**28
    header = parse_header(_header(a={"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}), tmp_path)
    create_safetensors(tmp_path / "new.safetensors", header)
    status = (tmp_path / "new.safetensors").stat()
    assert status.st_size == header.file_bytes > size
    assert status.st_blocks * 512 < 2**20


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match=r"a\.safetensors: .*download it again"):
        SafetensorsReader(file)


def test_a_file_with_trailing_bytes_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match="but its header describes"):
        SafetensorsReader(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors: cannot be opened: No such file"):
        SafetensorsReader(tmp_path / "none.safetensors")


def _header(**entries: object) -> str:
    return json.dumps(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a.safetensors: the safetensors header: expected a JSON object, got a list"),
        ("{", "the safetensors header: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (_header(a=[1]), "header: a: expected a JSON object"),
        (_header(a={"dtype": "F32", "shape": [2]}), "header: a: lacks 'data_offsets'"),
        (_header(a={"dtype": 7, "shape": [2], "data_offsets": [0, 8]}), "dtype is 7; it must be a string"),
        (_header(a={"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}), r"shape is \['2'\]; it must be a list"),
        (_header(a={"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]}), "shape is .*; it must be a list"),
        (
            '{"a": {"dtype": "F32", "data_offsets": [0, 8], "shape": [' + "9" * 5_000 + "]}}",
            "not JSON that can be read",
        ),
        (_header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}), "data_offsets is .* a list of 2"),
        (_header(a={"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}), "a has dtype F8_E4M3"),
        (_header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}), "a bytes 0..4"),
        (_header(a={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}), "a bytes 4..12"),
        (_header(a={"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}), "data_offsets is .* a list of 2"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_header(text, Path("a.safetensors"))


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: not a regular file"):
        SafetensorsReader(tmp_path / "a.safetensors")
