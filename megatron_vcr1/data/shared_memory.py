"""The way of a decoded sample from a decoding worker to its reader: tensors in shared memory, the rest pickled.

A worker packs the result itself, before it puts it on DataLoader's queue. Otherwise, the queue's feeder thread would
move the tensors to shared memory: if that fails (a container's /dev/shm is 64 MB by default), the thread prints a
traceback, the result is lost, and the reader waits for it forever. Packed here, the failure itself is the result.

The worker copies tensors before it shares them, and the reader copies them out again. So neither the worker's cache of
videos nor the prompts that training keeps occupy shared memory: only the samples on the way do, whose number DataLoader
bounds (`max_bytes_in_flight`).
"""

from __future__ import annotations

import errno
import io
import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data.frame_rules import PixelOptions
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
PREFETCH_PER_WORKER = 2
"""Number of samples that each worker decodes in advance, by default."""
_MB = 1e6
_LIMITS = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EDQUOT)
_ADVICE = (
    "Give the container more shared memory (docker: --shm-size), raise the process's limits (ulimit), or decode less "
    "at a time: lower data.num_workers (0 uses no shared memory), data.max_frames or data.total_pixels"
)


@dataclass(frozen=True, slots=True)
class PackedResult:
    """A result on its way to the reader, or the reason why it cannot get there.

    Attributes:
        content: the pickled result, whose tensors are in shared memory; None if that failed.
        failure: why it failed.
    """

    content: bytes | None
    failure: str = ""


class _SharingPickler(ForkingPickler):
    """A pickler that puts a copy of each tensor into shared memory."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.dispatch_table = {**self.dispatch_table, Tensor: _reduce}


def _reduce(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    return _rebuild_private, reduce_tensor(tensor.clone())


def _rebuild_private(rebuild: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """Rebuild a shared tensor and copy it to private memory; its shared memory is free afterwards."""
    return rebuild(*arguments).clone()


def pack(result: Any) -> PackedResult:
    """Pack a result in the worker. A lack of memory does not raise: `unpack` reports it, in the reader."""
    stream = io.BytesIO()
    try:
        _SharingPickler(stream).dump(result)
    except (OSError, RuntimeError, MemoryError) as error:
        if not _is_lack_of_memory(error):
            raise
        return PackedResult(None, str(error) or "out of memory")
    return PackedResult(stream.getvalue())


def unpack(packed: PackedResult) -> Any:
    """Return the result, with its tensors in private memory.

    Raises:
        UserError: the worker, or this process, has too little shared memory for it; says what to do.
    """
    if packed.content is None:
        raise UserError(_message(packed.failure))
    try:
        return pickle.loads(packed.content)
    except (OSError, RuntimeError, MemoryError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise UserError(_message(str(error))) from error


def _is_lack_of_memory(error: Exception) -> bool:
    """Return whether the system refused memory or file descriptors; other errors are mistakes in the code.

    torch raises a RuntimeError that contains the system's text: "unable to resize file", "unable to mmap", "unable to
    allocate shared memory(shm)" or "unable to open shared memory object".
    """
    if isinstance(error, OSError):
        return error.errno in _LIMITS
    return isinstance(error, MemoryError) or str(error).startswith("unable to ")


def _message(failure: str) -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
        room = f"{SHARED_MEMORY} has {usage.free / _MB:.0f} MB free of {usage.total / _MB:.0f} MB"
    except OSError as error:
        room = f"{SHARED_MEMORY} cannot be used: {error.strerror}"
    return f"a decoding worker cannot send a decoded sample to its rank: {failure}. {room}. {_ADVICE}"


def max_bytes_in_flight(section: DataSection, processor: PromptProcessor) -> int:
    """Return the most shared memory that the decoding workers of one rank can need, in bytes.

    DataLoader keeps `num_workers * PREFETCH_PER_WORKER` samples in flight. It orders the next sample before the reader
    has copied the current one out, which makes it one more.
    """
    return (
        (section.num_workers * PREFETCH_PER_WORKER + 1) * max_video_bytes(section, processor)
        if section.num_workers
        else 0
    )


def max_video_bytes(section: DataSection, processor: PromptProcessor) -> int:
    """Return the largest size of a decoded video within the limits of [data], in bytes (3 per pixel).

    A video is limited by data.max_frames and data.total_pixels, and by data.max_prompt_tokens: a token takes
    factor x factor pixels of the frames of a temporal patch.
    """
    options = PixelOptions(section.total_pixels, section.min_pixels)
    pixels = max(
        processor.frame_rules.most_pixels(num_frames, options)
        for num_frames in range(section.min_frames, section.max_frames + 1)
    )
    return 3 * min(pixels, processor.temporal_patch_size * processor.factor**2 * section.max_prompt_tokens)


def warn_if_shared_memory_is_small(section: DataSection, processor: PromptProcessor, *, num_readers: int) -> None:
    """Warn if the decoding workers of this host could need more shared memory than is free.

    It is no error: videos may be shorter than the settings allow. `unpack` raises one if memory does run out.

    Args:
        section: the settings of [data].
        processor: the model's processor.
        num_readers: number of ranks on this host that have decoding workers.
    """
    needed = num_readers * max_bytes_in_flight(section, processor)
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        free = 0
    if needed > free:
        logger.warning(
            "%s has %.0f MB free, but up to %.0f MB can be needed: %d ranks x (%d data.num_workers x %d samples + 1) x "
            "%.0f MB per video. %s",
            SHARED_MEMORY,
            free / _MB,
            needed / _MB,
            num_readers,
            section.num_workers,
            PREFETCH_PER_WORKER,
            max_video_bytes(section, processor) / _MB,
            _ADVICE,
        )
