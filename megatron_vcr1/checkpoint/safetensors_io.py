"""Row-wise access to safetensors files: read any rows of a tensor into a buffer, write any rectangle of a tensor.

File format: 8 bytes of little-endian header length, a JSON header (name to dtype, shape and byte range), the data.
Reads and writes are positioned (pread, pwrite), so several processes may write to one file. Memory maps are not used,
because every page that was ever touched would count towards the memory of the process.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.disk import WRITE_BYTES, file_named_in_errors, start_writeback
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.text_files import open_regular, parse_json, require_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors package
_MAX_FILE_BYTES = 2**50


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int  # position of the first byte in the file

    @property
    def num_columns(self) -> int:
        """Number of values per row: the product of all dimensions after the first."""
        return math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Header of a safetensors file."""

    text: str  # exact JSON text, so that an export can restore the file byte for byte
    tensors: tuple[StoredTensor, ...]  # in the order of their bytes in the file

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return _LENGTH_BYTES + len(self.text.encode()) + sum(tensor.num_bytes for tensor in self.tensors)


def parse_header(text: str, path: Path) -> SafetensorsHeader:
    """Parse a safetensors header.

    Args:
        text: the JSON text.
        path: the file that it comes from, for error messages only.

    Raises:
        UserError: the text is not a header, a dtype is not supported, or the byte ranges have gaps or overlap.
    """
    where = f"{path}: the safetensors header"
    values = dict(require_object(parse_json(text, where), where))
    values.pop("__metadata__", None)
    entries = {name: Fields(value, f"{where}: {name}") for name, value in values.items()}
    spans = sorted((_span(entry), name) for name, entry in entries.items())
    dtypes = {name: entry.text("dtype") for name, entry in entries.items()}
    shapes = {name: entry.integers("shape", below=_MAX_FILE_BYTES) for name, entry in entries.items()}
    data_start = _LENGTH_BYTES + len(text.encode())
    position = 0
    tensors = []
    for (start, stop), name in spans:
        if dtypes[name] not in DTYPES:
            raise UserError(
                f"{path}: {name} has dtype {dtypes[name]}; use an unquantized checkpoint ({', '.join(DTYPES)})"
            )
        tensor = StoredTensor(name, DTYPES[dtypes[name]], shapes[name], data_start + start)
        if start != position or stop != start + tensor.num_bytes or min(tensor.shape, default=1) < 1:
            raise UserError(
                f"{path}: the header gives {name} bytes {start}..{stop}, which do not match its shape or the tensor "
                "before it; download the file again"
            )
        position = stop
        tensors.append(tensor)
    return SafetensorsHeader(text, tuple(tensors))


def _span(entry: Fields) -> tuple[int, int]:
    """Return the first byte of a tensor and the byte after its last, counted from the end of the header."""
    start, stop = entry.integers("data_offsets", length=2, below=_MAX_FILE_BYTES)
    return start, stop


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


class SafetensorsReader:
    """A safetensors file that is open for reading."""

    def __init__(self, path: Path) -> None:
        """Open a file and check that it is complete.

        Raises:
            UserError: the file is missing, is not safetensors, or is shorter or longer than its header says.
        """
        self.path = path
        try:
            self._descriptor = open_regular(path)
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
            raise UserError(f"{self.path}: not a complete safetensors file ({size} bytes); download it again")
        try:
            text = os.pread(self._descriptor, length, _LENGTH_BYTES).decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: the safetensors header is damaged ({error}); download the file again"
            ) from None
        header = parse_header(text, self.path)
        if size != header.file_bytes:
            raise UserError(
                f"{self.path}: {size} bytes, but its header describes {header.file_bytes}; download it again"
            )
        return header

    def read_rows(self, tensor: StoredTensor, row: int, rows: Tensor) -> None:
        """Read consecutive rows of a tensor.

        Args:
            tensor: the tensor in this file.
            row: the first row to read.
            rows: [num_rows, num_columns], contiguous and of the tensor's dtype; overwritten.

        Raises:
            UserError: the file has become shorter.
            OSError: the disk failed; it names the file.
        """
        data = _bytes_of(rows)
        position = tensor.position + row * tensor.num_columns * tensor.dtype.itemsize
        with file_named_in_errors(self.path):
            while data:
                # A read may return fewer bytes than requested.
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
    """Create a file with a header and the final length; the data is a hole that `SafetensorsWriter` fills.

    Disk space is not reserved: on file systems without support for it (NFS before 4.2, Lustre before 2.14), the C
    library's posix_fallocate writes one byte per 4 KB instead, millions of bytes for a file of weights.
    """
    text = header.text.encode()
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(header.file_bytes)


class SafetensorsWriter:
    """A file from `create_safetensors`, open for writing its tensors. Several processes may write to one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY)

    def write_rows(self, tensor: StoredTensor, row: int, column: int, rows: Tensor) -> None:
        """Write a rectangle of a tensor.

        Args:
            tensor: the tensor in this file.
            row: first row of the rectangle.
            column: first column of the rectangle.
            rows: [num_rows, num_columns of the rectangle], of the tensor's dtype.
        """
        if rows.shape[1] == tensor.num_columns:
            spans: tuple[Tensor, ...] = (rows,)  # complete rows are contiguous in the file
        else:
            spans = rows.unbind(0)
        position = tensor.position + (row * tensor.num_columns + column) * tensor.dtype.itemsize
        for span in spans:
            self._write(_bytes_of(span.contiguous()), position)
            position += tensor.num_columns * tensor.dtype.itemsize

    def _write(self, data: memoryview, start: int) -> None:
        position = start
        with file_named_in_errors(self._path):
            while data:
                count = os.pwrite(self._descriptor, data[:WRITE_BYTES], position)
                data, position = data[count:], position + count
            start_writeback(self._descriptor, start, position - start)

    def close(self) -> None:
        """Fsync and close the file."""
        try:
            with file_named_in_errors(self._path):  # a file system may report a full disk only now
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
