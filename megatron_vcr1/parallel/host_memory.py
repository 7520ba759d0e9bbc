"""Tensors that the ranks of a node read from one place in host memory, instead of a copy each.

The memory belongs to an anonymous file (memfd), which has no name in a file system and is not limited by the size of
/dev/shm. Other processes of the same user open it through the process that created it. The memory is free when the last
tensor in it is gone, however the processes end.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from math import prod
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 16
_cannot_share: WeakSet[dist.ProcessGroup] = WeakSet()  # their ranks do not try again


def share_within_host(tensor: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    """Put a tensor of the group's first rank into memory that all ranks of the group share.

    All ranks of the group must call it.

    Args:
        tensor: the contents, on the group's first rank, on the CPU; on the other ranks, a tensor of the same shape and
            dtype on any device, "meta" included.
        group: a gloo group.

    Returns:
        The tensor in shared memory, which no rank may change; None on every rank if they cannot share memory, for
        example because they are on different nodes or in different containers.
    """
    if group in _cannot_share:
        return None
    source = dist.get_global_rank(group, 0)
    num_bytes = prod(tensor.shape) * tensor.dtype.itemsize
    if not num_bytes:
        return None
    address: list[tuple[str, bytes] | None] = [None]
    descriptor: int | None = None
    memory: Tensor | None = None
    can_create = hasattr(os, "memfd_create")
    reason: object = "they do not see one file, as on different nodes" if can_create else "only Linux has memfd"
    if dist.get_rank() == source and can_create:
        try:
            descriptor = os.memfd_create("vcr1-frames", os.MFD_CLOEXEC)
            token = secrets.token_bytes(_TOKEN_BYTES)
            memory = _write(descriptor, tensor, num_bytes, token)
            address = [(f"/proc/{os.getpid()}/fd/{descriptor}", token)]
        except OSError as error:
            reason = error
    dist.broadcast_object_list(address, src=source, group=group)
    if memory is None and address[0] is not None:
        with suppress(OSError, RuntimeError):  # torch raises RuntimeErrors for files that it cannot map
            memory = _open(*address[0], num_bytes)
    num_without = torch.tensor([memory is None], dtype=torch.int32)
    dist.all_reduce(num_without, group=group)  # all ranks have opened the file, or never will
    if descriptor is not None:
        os.close(descriptor)
    if int(num_without) or memory is None:
        _cannot_share.add(group)
        if dist.get_rank() == source:
            text = "%d ranks of a first stage cannot share host memory (%s): each has a copy of the frames"
            logger.warning(text, num_without, reason)
        return None
    return memory[:num_bytes].view(tensor.dtype).view(tensor.shape)


def _write(descriptor: int, tensor: Tensor, num_bytes: int, token: bytes) -> Tensor:
    """Write a tensor and the token to the file, and return its memory."""
    # Allocated before it is written: if there is no memory left, this fails, and a write would end the process.
    os.posix_fallocate(descriptor, 0, num_bytes + _TOKEN_BYTES)
    memory = _map(descriptor, num_bytes)
    memory[:num_bytes] = tensor.contiguous().flatten().view(torch.uint8)
    memory[num_bytes:] = torch.frombuffer(bytearray(token), dtype=torch.uint8)
    return memory


def _open(path: str, token: bytes, num_bytes: int) -> Tensor | None:
    """Return the memory of another process's file; None if the path leads to another file, as on another node."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size != num_bytes + _TOKEN_BYTES:  # torch would enlarge a shorter file
            return None
        memory = _map(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    return memory if bytes(memory[num_bytes:].tolist()) == token else None


def _map(descriptor: int, num_bytes: int) -> Tensor:
    """Map a file with a tensor and the token. The mapping needs no open file, whereas Python's mmap keeps one."""
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=num_bytes + _TOKEN_BYTES, dtype=torch.uint8)
