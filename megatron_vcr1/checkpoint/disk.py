"""How the converters write to the disk: in small pieces, and early."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

# A recent Linux gives a large write large pages of its cache, and finding those can take longer than the copying: 2 GB
# took 2.5 to 6 s in writes of 16 MB and 0.8 s in writes of 1 MB (ext4, kernel 6.18, in a virtual machine).
PIECE_BYTES = 2**20


class _SmallWrites(io.FileIO):
    """A file that takes PIECE_BYTES at a time; a buffered writer on it comes back for the rest."""

    def write(self, data: Any) -> int:  # any buffer
        return super().write(memoryview(data).cast("B")[:PIECE_BYTES]) or 0


def create(path: Path) -> io.BufferedWriter:
    """Open a new file for writing. Raises FileExistsError."""
    return io.BufferedWriter(_SmallWrites(path, "x"))


def start_writing(descriptor: int, position: int, num_bytes: int) -> None:
    """Have the kernel write these bytes of a file to the disk now, without waiting: fsync then finds little left to do.

    Linux starts the write-back of a range that is declared as no longer needed. At the end of 2 GB, fsync took 0.02 s
    instead of 0.7 s.
    """
    if num_bytes >= PIECE_BYTES:
        os.posix_fadvise(descriptor, position, num_bytes, os.POSIX_FADV_DONTNEED)
