"""Pinned host memory for large copies that live as long as a run: the reference's weights, the optimizer's state."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from megatron_vcr1.errors import UserError

# Memory whose owner ended while a copy may have been under way. It stays pinned until the process ends.
_in_use: list[Tensor] = []


def pinned_memory(num_bytes: int, owner: object, setting: str) -> Tensor:
    """Allocate host memory; on a machine with GPUs it is pinned, so that copies are fast and asynchronous.

    The memory is allocated first and registered with CUDA then: torch's allocator of pinned memory would round its size
    up to a power of two, and would keep it when it is no longer needed.

    Args:
        owner: the memory stays pinned until this object is gone. No other object may use it longer.
        setting: the key that is "host", for the error message.

    Returns:
        uint8 [num_bytes], with undefined contents.

    Raises:
        UserError: the memory cannot be pinned.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    if torch.cuda.is_available() and num_bytes:
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        if code:
            raise UserError(
                f"{setting} = 'host': {num_bytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {code}); "
                "raise the limit of locked memory (ulimit -l), or set it to 'resident'"
            )
        # The finalizer holds the memory, so that it is not freed before it is unregistered.
        weakref.finalize(owner, _unpin, memory).atexit = False
    return memory


def _unpin(memory: Tensor) -> None:
    # A rank that ends with an error must not wait for its GPU, where a collective may wait for another rank.
    if not torch.cuda.current_stream().query():
        _in_use.append(memory)
        return
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(memory.data_ptr())
