"""The index of a checkpoint from plain data: what is missing or of another type is an error of the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vcr1.checkpoint.metadata_index import Chunk, GlobalTensor, read_index
from megatron_vcr1.checkpoint.plain_pickle import load_plain
from megatron_vcr1.errors import UserError

FILE = Path("c/.metadata")


def _metadata() -> Metadata:
    size = torch.Size((4, 3))
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), size)
    return Metadata(
        {
            "w": TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, [chunk]),
            "rng": BytesStorageMetadata(),
        },
        planner_data={"w": ("w",)},
        storage_data={
            MetadataIndex("w", torch.Size((0, 0))): _StorageInfo("__0_0.distcp", 10, 90),
            MetadataIndex("rng"): _StorageInfo("__0_0.distcp", 100, 5),
        },
    )


def _read(metadata: Any) -> dict[str, GlobalTensor]:
    return read_index(load_plain(pickle.dumps(metadata), FILE), FILE)


def test_tensors_are_read_and_other_objects_left_out() -> None:
    chunk = Chunk("w", (0, 0), (4, 3), "__0_0.distcp", 10, 90)
    assert _read(_metadata()) == {"w": GlobalTensor(torch.bfloat16, (4, 3), (chunk,))}


def _without(name: str) -> Metadata:
    metadata = _metadata()
    del metadata.__dict__[name]
    return metadata


def _changed(part: str, name: str, value: Any) -> Metadata:
    metadata = _metadata()
    tensor: Any = metadata.state_dict_metadata["w"]
    target = {"tensor": tensor, "chunk": tensor.chunks[0], "whole": metadata}.get(part)
    if part == "info":
        target = next(iter(metadata.storage_data.values()))
    target.__dict__[name] = value
    return metadata


@pytest.mark.parametrize(
    "metadata",
    [
        {"state_dict_metadata": {}},
        [],
        None,
        7,
        _without("storage_data"),
        _without("state_dict_metadata"),
        _changed("whole", "storage_data", [1]),
        _changed("whole", "storage_data", {"w": _StorageInfo("a", 0, 1)}),
        _changed("whole", "state_dict_metadata", 7),
        _changed("tensor", "size", "4"),
        _changed("tensor", "size", (4, -3)),
        _changed("tensor", "size", (1,) * 100),
        _changed("tensor", "size", (5, 3)),
        _changed("tensor", "chunks", None),
        _changed("tensor", "chunks", [None]),
        _changed("tensor", "properties", None),
        _changed("tensor", "properties", torch.bfloat16),
        _changed("chunk", "offsets", (0, 1)),
        _changed("chunk", "sizes", (True, 12)),
        _changed("info", "relative_path", "../secret"),
        _changed("info", "relative_path", 7),
        _changed("info", "offset", -1),
        _changed("info", "length", 2**70),
        _changed("info", "transform_descriptors", ["zstd"]),
    ],
)
def test_a_damaged_index_is_an_error_that_names_the_checkpoint(metadata: Any) -> None:
    with pytest.raises(UserError, match=r"^c(/\.metadata)?: "):
        _read(metadata)
