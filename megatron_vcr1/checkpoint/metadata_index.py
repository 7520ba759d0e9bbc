"""The index of a ``torch_dist`` checkpoint, from the plain data of its ``.metadata`` file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vcr1.checkpoint.plain_pickle import Global, Node, Pairs
from megatron_vcr1.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata."
_MAX_DIMENSIONS = 16
_MAX_SIZE = 2**62


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a global tensor, and the location of its serialized form."""

    key: str  # key of the global tensor
    offsets: tuple[int, ...]  # position of the rectangle's first value in the global tensor, one index per dimension
    shape: tuple[int, ...]  # shape of the rectangle
    file: str  # name of a .distcp file
    position: int  # position of the first byte in the file
    num_bytes: int  # length of the serialized form


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """A whole tensor in a checkpoint, and the chunks that cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_index(metadata: Any, path: Path) -> dict[str, GlobalTensor]:
    """Return the tensors of an index by key, without other objects.

    Args:
        metadata: torch's Metadata, as `plain_pickle.load_plain` returns it.
        path: the ``.metadata`` file, for error messages.

    Raises:
        UserError: something is missing or of another type, a chunk is in no file of the checkpoint's directory, or
            chunks do not cover their tensor.
    """
    try:
        if not isinstance(metadata, Node):
            raise ValueError("it is not torch's Metadata")
        if metadata.function.path != _METADATA + "Metadata":
            raise ValueError(f"it names {metadata.function.path} instead of torch's Metadata")
        entries = _fields(metadata, "state_dict_metadata", "storage_data")
        locations = dict(_location(key, info) for key, info in _items(entries["storage_data"]))
        return {
            _string(key): _global_tensor(_string(key), entry, locations, path)
            for key, entry in _items(entries["state_dict_metadata"])
            if _is_instance(entry, "TensorStorageMetadata")
        }
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: refused or damaged: {error}") from None


_Location = tuple[str, int, int]  # file, position, number of bytes


def _location(key: Any, info: Any) -> tuple[tuple[str, tuple[int, ...] | None], _Location | None]:
    """Return an item of storage_data; None as the location of a chunk that this project cannot read."""
    index = _fields(key, "fqn")
    offset = index.get("offset")
    stored = _fields(info, "relative_path", "offset", "length")
    file = _string(stored["relative_path"])
    position, num_bytes = _integer(stored["offset"]), _integer(stored["length"])
    # A file outside the checkpoint's directory, or a transformed (for example compressed) chunk.
    is_readable = Path(file).name == file and not stored.get("transform_descriptors")
    location = (file, position, num_bytes) if is_readable else None
    return (_string(index["fqn"]), None if offset is None else _sizes(offset)), location


def _global_tensor(key: str, entry: Node, locations: dict[Any, _Location | None], path: Path) -> GlobalTensor:
    fields = _fields(entry, "properties", "size", "chunks")
    shape = _sizes(fields["size"])
    if not isinstance(fields["chunks"], list):
        raise ValueError("chunks is not a list")
    chunks = tuple(_chunk(key, stored, locations, path) for stored in fields["chunks"])
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):  # chunks never overlap
        raise UserError(f"{path.parent}: the chunks of {key} do not cover its shape {shape}; the checkpoint is damaged")
    return GlobalTensor(_dtype(fields["properties"]), shape, chunks)


def _chunk(key: str, stored: Any, locations: dict[Any, _Location | None], path: Path) -> Chunk:
    fields = _fields(stored, "offsets", "sizes")
    offsets = _sizes(fields["offsets"])
    location = locations.get((key, offsets))
    if location is None:
        raise UserError(f"{path}: {key} at {offsets} is not in a file of this directory; the index is damaged")
    return Chunk(key, offsets, _sizes(fields["sizes"]), *location)


def _dtype(properties: Any) -> torch.dtype:
    """Return the dtype of torch's TensorProperties, whose state is a tuple that begins with it."""
    state = properties.state if isinstance(properties, Node) else None
    name = state[0] if type(state) is tuple and state else None
    dtype = getattr(torch, name.name, None) if isinstance(name, Global) and name.module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError("properties has no dtype")
    return dtype


def _is_instance(value: Any, name: str) -> bool:
    return isinstance(value, Node) and value.function.path == _METADATA + name


def _fields(value: Any, *required: str) -> dict[str, Any]:
    """Return the attributes of a dataclass instance by name."""
    if not isinstance(value, Node) or not isinstance(value.state, Pairs):
        raise ValueError(f"an object with the fields {', '.join(required)} is missing")
    fields = {_string(name): content for name, content in value.state}
    for name in required:
        if name not in fields:
            raise ValueError(f"{value.function.name} has no field {name!r}")
    return fields


def _items(value: Any) -> Pairs:
    """Return the items of a dictionary, or of an instance of a dictionary class such as OrderedDict."""
    items = value.items if isinstance(value, Node) else value
    if not isinstance(items, Pairs):
        raise ValueError("a dictionary is missing")
    return items


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string is missing")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise ValueError("a size is not a non-negative integer")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a shape: torch.Size, called with a tuple, or a tuple or list of integers."""
    if isinstance(value, Node):
        if value.function.path != "torch.Size" or len(value.args) != 1:
            raise ValueError("a shape is missing")
        (value,) = value.args
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise ValueError("a shape is missing")
    return tuple(_integer(size) for size in value)
