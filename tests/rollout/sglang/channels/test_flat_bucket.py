"""Tests of flattened buckets: what a reader finds in them, and what the description of GPU memory contains."""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from megatron_vcr1.rollout.sglang.channels import flat_bucket
from megatron_vcr1.rollout.sglang.channels.flat_bucket import SHARED_MEMORY, FlatBucket

BUCKET = [
    ("float", torch.randn(3, 5)),
    ("bytes", torch.arange(7, dtype=torch.uint8)),
    ("transposed", torch.randn(4, 2, dtype=torch.bfloat16).t()),
    ("scalar", torch.tensor(0.5, dtype=torch.float64)),
]


def shared_files() -> set[Path]:
    """Find the shared memory that this process has created; tests in other processes create some of their own."""
    return set(SHARED_MEMORY.glob(f"torch_{os.getpid()}_*"))


def open_bucket(description: str) -> list[tuple[str, torch.Tensor]]:
    """Read a bucket as SGLang's FlattenedTensorBucket does."""
    contents = pickle.loads(base64.b64decode(description))
    memory = contents["flattened_tensor"]
    return [
        (each.name, memory[each.start_idx : each.end_idx].view(each.dtype).reshape(each.shape))
        for each in contents["metadata"]
    ]


def test_a_reader_finds_the_tensors_bit_for_bit() -> None:
    bucket = FlatBucket(BUCKET, torch.device("cpu"))
    for description in (bucket.describe(), bucket.describe()):
        found = open_bucket(description)
        assert [name for name, _ in found] == [name for name, _ in BUCKET]
        for (_, tensor), (_, expected) in zip(found, BUCKET, strict=True):
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_a_bucket_without_room_in_shared_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, the first write would end the process with SIGBUS."""
    usage = shutil.disk_usage(SHARED_MEMORY)._replace(free=96)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    FlatBucket([("small", torch.zeros(24))], torch.device("cpu"))
    with pytest.raises(OSError, match=r"no room for 0 MiB of weights; lower sglang.weight_sync_bucket_mb: '/dev/shm'"):
        FlatBucket([("large", torch.zeros(25))], torch.device("cpu"))


def test_gpu_memory_is_described_by_the_uuid_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may number GPUs in another way than this process. Only the driver's part is replaced here."""
    arguments = [torch.Tensor, torch.Size([8]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 3, b"handle"]
    monkeypatch.setattr(flat_bucket, "reduce_tensor", lambda memory: (rebuild_cuda_tensor, (*arguments, 8, 0, False)))
    monkeypatch.setattr(flat_bucket, "gpu_uuid", lambda index: f"uuid of GPU {index}")
    pickled = pickle.dumps(flat_bucket._DeviceHandle(torch.zeros(8)))
    functions: list[str] = []

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            functions.append(f"{module}.{name}")
            return (lambda *found: found) if name == "rebuild_cuda_tensor" else super().find_class(module, name)

    found = Reader(io.BytesIO(pickled)).load()
    assert found == (*arguments[:6], "uuid of GPU 3", b"handle", 8, 0, False)
    # SGLang's unpickler allows no others, and replaces the first function by its own, which looks for the UUID in the
    # seventh argument.
    assert {*functions} == {
        "torch.multiprocessing.reductions.rebuild_cuda_tensor",
        "torch.Tensor",
        "torch.Size",
        "torch.storage.TypedStorage",
        "torch.uint8",
    }


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:native, expandable_segments : True"])
def test_memory_of_expandable_segments_is_not_shared(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    assert flat_bucket.shareable_gpu() is None  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    allocator = "native"
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(flat_bucket, "gpu_uuid", lambda index: f"uuid of GPU {index}")
    assert flat_bucket.shareable_gpu() == "uuid of GPU 1"
    allocator = "cudaMallocAsync"
    assert flat_bucket.shareable_gpu() is None
    allocator = "native"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    assert flat_bucket.shareable_gpu() is None


# Opens GPU memory as SGLang's servers do, with a function that finds the GPU by its UUID.
GPU_READER = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions
rebuild = reductions.rebuild_cuda_tensor
def rebuild_on_the_gpu_with_the_uuid(*arguments):
    count = torch.cuda.device_count()
    indices = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(count)}
    return rebuild(*arguments[:6], indices[arguments[6]], *arguments[7:])
reductions.rebuild_cuda_tensor = rebuild_on_the_gpu_with_the_uuid
contents = pickle.loads(base64.b64decode(sys.stdin.read()))
memory = contents["flattened_tensor"]
print([memory[each.start_idx : each.end_idx].view(each.dtype).sum().item() for each in contents["metadata"]])
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_process_reads_gpu_memory_and_gives_it_back() -> None:
    tensors = [("a", torch.ones(2**22, device="cuda")), ("b", torch.ones(2**23, device="cuda", dtype=torch.bfloat16))]
    allocated = torch.cuda.memory_allocated()
    for _ in range(3):
        bucket = FlatBucket(tensors, torch.device("cuda"))
        command = [sys.executable, "-c", GPU_READER]
        read = subprocess.run(command, input=bucket.describe(), capture_output=True, text=True, check=True)
        assert read.stdout.strip() == str([2.0**22, 2.0**23])
        del bucket
        assert torch.cuda.memory_allocated() == allocated
