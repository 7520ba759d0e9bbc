"""megatron-core ``torch_dist`` checkpoints, chunk by chunk.

Such a checkpoint is a torch.distributed.checkpoint directory (``.metadata`` and ``*.distcp`` files) that also holds
megatron-core's ``metadata.json`` and ``common.pt``. A global tensor is cut into chunks, rectangles that fill it, each
serialized on its own; whoever loads it takes the parts of the chunks that it needs, so how it was cut does not matter.

``.metadata`` is a pickle. It is read by an unpickler that knows the few classes of that format and refuses all others.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from megatron_vcr1.checkpoint.disk import Checksum, create, start_writing
from megatron_vcr1.errors import UserError

_METADATA_FILE = ".metadata"
_COMMON_FILE = "common.pt"
_CONFIG_FILE = "metadata.json"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


Kind = tuple[torch.dtype, tuple[int, ...]]  # a global tensor's type and shape


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a global tensor, and where its serialized form stands."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    position: int
    num_bytes: int  # serialized


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """A tensor of a checkpoint and the chunks that fill it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def write_chunks(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...], Tensor]], checksum: Checksum | None = None
) -> list[Chunk]:
    """Write chunks ``(key, offsets, tensor)`` one behind the other into a new ``.distcp`` file, down to the disk.

    A tensor may be overwritten as soon as the next one is asked for; it must own its whole storage. ``checksum`` is
    told everything that is written.

    Raises:
        OSError: the disk is full, or another fault of it.
    """
    chunks = []
    with create(path, checksum) as file, _without_checksums(), _disk_errors(path):
        for key, offsets, tensor in tensors:
            position = file.tell()
            torch.save(tensor, file)
            file.flush()
            num_bytes = file.tell() - position
            start_writing(file.fileno(), position, num_bytes)
            chunks.append(Chunk(key, offsets, tuple(tensor.shape), path.name, position, num_bytes))
        os.fsync(file.fileno())
    return chunks


@contextmanager
def _without_checksums() -> Iterator[None]:
    """No CRC-32 of every tensor: it takes a fifth of the time, and torch.load never looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """torch.save wraps what the file raises into a RuntimeError; give the OSError back."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(errno.EIO, str(error), str(path)) from None


def write_metadata(directory: Path, kinds: Mapping[str, Kind], chunks: Iterable[Chunk]) -> None:
    """Complete a checkpoint whose ``.distcp`` files are written: the index of its chunks, and megatron-core's files.

    Args:
        kinds: of the global tensors, by key.
        chunks: what every process has written of them.
    """
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
    of_tensor: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in kinds}
    for chunk in chunks:
        of_tensor[chunk.key].append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
    metadata = Metadata(
        state_dict_metadata={
            key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), of_tensor[key])
            for key, (dtype, shape) in kinds.items()
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
    """The tensors of a checkpoint. Objects that are no tensors (random states, optimizer settings) are left out.

    Raises:
        UserError: missing, damaged, of another format, or holding classes that do not belong into such a file.
    """
    _check_config(directory)
    path = directory / _METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        return {
            key: _global_tensor(directory, metadata, key, entry)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except UserError:
        raise
    except Exception as error:  # damaged bytes make a pickle raise anything, and leave objects without their fields
        raise UserError(f"{path}: refused or damaged: {error!r}") from None


def _global_tensor(directory: Path, metadata: Metadata, key: str, entry: TensorStorageMetadata) -> GlobalTensor:
    shape = tuple(entry.size)
    chunks = tuple(_find_chunk(directory, metadata, key, stored) for stored in entry.chunks)
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):  # DCP's chunks never overlap
        raise UserError(f"{directory}: the chunks of {key} do not fill its shape {shape}; the checkpoint is damaged")
    return GlobalTensor(entry.properties.dtype, shape, chunks)


def _find_chunk(directory: Path, metadata: Metadata, key: str, stored: ChunkStorageMetadata) -> Chunk:
    info = metadata.storage_data.get(MetadataIndex(key, stored.offsets))
    if info is None or info.transform_descriptors or Path(info.relative_path).name != info.relative_path:
        where = f"{key} at {tuple(stored.offsets)}"
        raise UserError(f"{directory / _METADATA_FILE}: places {where} in no file of this directory; it is damaged")
    return Chunk(key, tuple(stored.offsets), tuple(stored.sizes), info.relative_path, info.offset, info.length)


def _check_config(directory: Path) -> None:
    path = directory / _CONFIG_FILE
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no Megatron checkpoint here, or an unfinished one ({error!r})") from None
    if backend != "torch_dist":
        raise UserError(f"{path}: a checkpoint of format {backend!r}; only torch_dist is read")


def read_chunk(directory: Path, chunk: Chunk) -> Tensor:
    """The chunk's tensor.

    Raises:
        UserError: the file is missing or cut off, or holds something else.
    """
    path = directory / chunk.file
    try:
        with path.open("rb") as file:
            view = _create_file_view(file, chunk.position, chunk.num_bytes)
            tensor = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except Exception as error:  # of any kind where bytes are damaged
        raise UserError(
            f"{path}: {chunk.key} at {chunk.offsets} cannot be read ({error!r}); the checkpoint is damaged"
        ) from None
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.shape:
        raise UserError(f"{path}: {chunk.key} at {chunk.offsets} is not the tensor that {_METADATA_FILE} describes")
    return tensor


_ADMITTED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of ``.metadata`` and nothing else; a pickle that names another one could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint's metadata")
        return super().find_class(module, name)
