"""Safetensors files by rows: read any rows of a tensor into a buffer, write any rectangle of it.

The format: 8 bytes of little-endian header length, a JSON header (name to dtype, shape and byte range), the bytes.
Reads and writes carry their position (pread, pwrite), so several processes may share a file. They are no memory maps:
a map would count every page that was ever touched towards the process's memory.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.disk import PIECE_BYTES, start_writing
from megatron_vcr1.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int  # of its first byte in the file

    @property
    def num_columns(self) -> int:
        """Numbers in a row: everything behind the first dimension."""
        return math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of one file: its exact text, and what it says."""

    text: str
    tensors: tuple[StoredTensor, ...]  # in the order of their bytes

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return _LENGTH_BYTES + len(self.text.encode()) + sum(tensor.num_bytes for tensor in self.tensors)


def parse_header(text: str, path: Path) -> SafetensorsHeader:
    """Read the JSON header of the file at ``path`` (which is only named in errors).

    Raises:
        UserError: not a header, a dtype that no published model has, or byte ranges that are no seamless sequence.
    """
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        spans = sorted((tuple(entry["data_offsets"]), name) for name, entry in entries.items())
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        shapes = {name: tuple(int(size) for size in entry["shape"]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: the safetensors header is damaged ({error!r}); fetch the file again") from None
    data_start = _LENGTH_BYTES + len(text.encode())
    position = 0
    tensors = []
    for (start, stop), name in spans:
        if dtypes[name] not in DTYPES:
            raise UserError(
                f"{path}: {name} has dtype {dtypes[name]}; convert an unquantized checkpoint ({', '.join(DTYPES)})"
            )
        tensor = StoredTensor(name, DTYPES[dtypes[name]], shapes[name], data_start + start)
        if start != position or stop != start + tensor.num_bytes or min(tensor.shape, default=1) < 1:
            raise UserError(
                f"{path}: the header gives {name} bytes {start}..{stop}, which its shape or its neighbour contradicts"
            )
        position = stop
        tensors.append(tensor)
    return SafetensorsHeader(text, tuple(tensors))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


class SafetensorsReader:
    """An open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Open the file and check that it is whole.

        Raises:
            UserError: missing, not safetensors, or shorter or longer than its header says.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self.header = self._read_header()
        except UserError:
            self.close()
            raise

    def _read_header(self) -> SafetensorsHeader:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, _LENGTH_BYTES, 0), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise UserError(f"{self.path}: not a whole safetensors file ({size} bytes); fetch it again")
        try:
            text = os.pread(self._descriptor, length, _LENGTH_BYTES).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: the safetensors header is damaged ({error}); fetch the file again") from None
        header = parse_header(text, self.path)
        if size != header.file_bytes:
            raise UserError(f"{self.path}: {size} bytes, but its header describes {header.file_bytes}; fetch it again")
        return header

    def read_rows(self, tensor: StoredTensor, row: int, rows: Tensor) -> None:
        """Fill ``rows`` [num_rows, num_columns], contiguous and of the tensor's dtype, from row ``row`` on."""
        data = _bytes_of(rows)
        position = tensor.position + row * tensor.num_columns * tensor.dtype.itemsize
        while data:
            count = os.preadv(self._descriptor, [data], position)
            if count == 0:
                raise UserError(f"{self.path}: ended inside {tensor.name}; the file changed while it was read")
            data, position = data[count:], position + count

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def create_safetensors(path: Path, header: SafetensorsHeader) -> None:
    """Create a file with ``header`` and the length that its tensors give it.

    Their room is not reserved: where the file system cannot (NFS before 4.2, Lustre before 2.14), the C library's
    posix_fallocate writes a byte to every 4 KB instead, millions of them for a shard.
    """
    text = header.text.encode()
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(header.file_bytes)


class SafetensorsWriter:
    """A file made by `create_safetensors`, open for its tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY)

    def write_rows(self, tensor: StoredTensor, row: int, column: int, rows: Tensor) -> None:
        """Write ``rows`` [num_rows, num_columns], of the tensor's dtype, at a row and a column of ``tensor``."""
        if rows.shape[1] == tensor.num_columns:
            pieces: tuple[Tensor, ...] = (rows,)  # whole rows lie one behind the other
        else:
            pieces = rows.unbind(0)
        position = tensor.position + (row * tensor.num_columns + column) * tensor.dtype.itemsize
        for piece in pieces:
            self._write(_bytes_of(piece.contiguous()), position)
            position += tensor.num_columns * tensor.dtype.itemsize

    def _write(self, data: memoryview, start: int) -> None:
        position = start
        while data:
            count = os.pwrite(self._descriptor, data[:PIECE_BYTES], position)
            data, position = data[count:], position + count
        start_writing(self._descriptor, start, position - start)

    def close(self) -> None:
        """Bring the bytes to the disk and close."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)
