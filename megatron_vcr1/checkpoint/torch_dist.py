"""Reading and writing of megatron-core ``torch_dist`` checkpoints, one chunk at a time.

Such a checkpoint is a torch.distributed.checkpoint directory with two additional files of megatron-core:
    __R_0.distcp     the chunks that rank R has written, each serialized with torch.save, one after another
    .metadata        the index: dtype and shape of every global tensor, and file, position and length of every chunk
    metadata.json    the format's name and version
    common.pt        objects that are not tensors; empty here
The chunks of a global tensor are rectangles that cover it without overlap. A reader takes from each chunk the part that
it needs, so how a tensor was cut into chunks does not matter.

``.metadata`` is a pickle. It is read as plain data, without unpickling; see `plain_pickle` and `metadata_index`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vcr1.checkpoint.disk import Checksum, create_file, file_named_in_errors, start_writeback
from megatron_vcr1.checkpoint.metadata_index import Chunk, GlobalTensor, read_index
from megatron_vcr1.checkpoint.plain_pickle import load_plain
from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import read_bytes, read_json, require_object

_METADATA_FILE = ".metadata"
_MAX_METADATA_BYTES = 2**28  # a checkpoint of a million chunks has about 2**27
_COMMON_FILE = "common.pt"
_CONFIG_FILE = "metadata.json"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


TensorSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a global tensor
ChunkData = tuple[str, tuple[int, ...], Tensor]  # key of the global tensor, offsets of the chunk in it, values


def write_chunks(path: Path, tensors: Iterable[ChunkData], checksum: Checksum | None = None) -> list[Chunk]:
    """Write chunks one after another to a new ``.distcp`` file, and fsync it.

    Args:
        path: the new file.
        tensors: the chunks. Each tensor must own its whole storage, because torch.save writes whole storages. Its
            memory may be reused as soon as the iterator is advanced.
        checksum: updated with all bytes that are written.

    Returns:
        The chunks with their positions in the file, for `write_metadata`.

    Raises:
        OSError: the disk is full or failed.
    """
    chunks = []
    with (
        file_named_in_errors(path),
        create_file(path, checksum) as file,
        _without_zip_checksums(),
        _restore_disk_errors(path),
    ):
        for key, offsets, tensor in tensors:
            position = file.tell()
            torch.save(tensor, file)
            file.flush()
            num_bytes = file.tell() - position
            start_writeback(file.fileno(), position, num_bytes)
            chunks.append(Chunk(key, offsets, tuple(tensor.shape), path.name, position, num_bytes))
        os.fsync(file.fileno())
    return chunks


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """Disable torch.save's CRC-32 of every tensor: it takes a fifth of the time, and torch.load never checks it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def _restore_disk_errors(path: Path) -> Iterator[None]:
    """Restore the OSError that torch.save turns into a RuntimeError when the file raises one."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(errno.EIO, str(error), str(path)) from None


def write_metadata(directory: Path, specs: Mapping[str, TensorSpec], chunks: Iterable[Chunk]) -> None:
    """Complete a checkpoint whose ``.distcp`` files are written: write the index and megatron-core's files, and fsync.

    Only one rank calls this, after all ranks have written their chunks.

    Args:
        directory: the checkpoint.
        specs: dtype and shape of every global tensor, by key.
        chunks: the chunks that all ranks have written.
    """
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
    chunks_of_tensor: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in specs}
    for chunk in chunks:
        chunks_of_tensor[chunk.key].append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
    metadata = Metadata(
        state_dict_metadata={
            key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks_of_tensor[key])
            for key, (dtype, shape) in specs.items()
        },
        storage_data={
            MetadataIndex(chunk.key, chunk.offsets): _StorageInfo(chunk.file, chunk.position, chunk.num_bytes)
            for chunk in chunks
        },
        storage_meta=StorageMeta(),
    )
    (directory / _CONFIG_FILE).write_text(json.dumps(_CONFIG))
    torch.save({}, directory / _COMMON_FILE)
    with (directory / _METADATA_FILE).open("xb") as file:
        pickle.dump(metadata, file)
    for name in (_CONFIG_FILE, _COMMON_FILE, _METADATA_FILE):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())


def read_metadata(directory: Path) -> dict[str, GlobalTensor]:
    """Read the index of a checkpoint; returns its tensors by key, without other objects (such as random states).

    Raises:
        UserError: the index is missing or damaged, or has another format.
    """
    _check_config(directory)
    path = directory / _METADATA_FILE
    try:
        data = read_bytes(path, max_bytes=_MAX_METADATA_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; the checkpoint is incomplete") from None
    return read_index(load_plain(data, path), path)


def _check_config(directory: Path) -> None:
    path = directory / _CONFIG_FILE
    if not path.exists():
        raise UserError(f"{path}: not found; not a Megatron checkpoint, or an incomplete one")
    backend = require_object(read_json(path), path).get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(f"{path}: a checkpoint of format {backend!r}; only torch_dist can be read")


def read_chunk(directory: Path, chunk: Chunk) -> Tensor:
    """Read the values of a chunk.

    Raises:
        UserError: the file is missing or truncated, or contains something else at the chunk's position.
    """
    path = directory / chunk.file
    try:
        with path.open("rb") as file:
            view = _create_file_view(file, chunk.position, chunk.num_bytes)
            tensor = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except Exception as error:  # damaged bytes can raise anything
        raise UserError(
            f"{path}: {chunk.key} at {chunk.offsets} cannot be read ({error!r}); the checkpoint is damaged"
        ) from None
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.shape:
        raise UserError(f"{path}: {chunk.key} at {chunk.offsets} is not the tensor that {_METADATA_FILE} describes")
    return tensor
