"""Opening the files of videos and images, which may be anything that a path can name."""

from __future__ import annotations

import errno
import os
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import open_regular


def local_path(path: str) -> str | None:
    """Return the path on the local file system, also of a ``file://`` URL; None if a path is remote."""
    if not is_remote(path):
        return path
    file_system, inner_path = fsspec.url_to_fs(path)
    return inner_path if isinstance(file_system, LocalFileSystem) else None


def open_media(path: str) -> BinaryIO:
    """Open a video or image file, or an fsspec URL, for reading.

    Raises:
        VideoError: a local path is a folder, FIFO, socket or device, which could block the reader for ever.
        OSError: the file cannot be opened.
    """
    file = local_path(path)
    if file is None:
        return cast(BinaryIO, fsspec.open(path, "rb").open())
    try:
        return os.fdopen(open_regular(file), "rb")
    except UserError:
        pass
    except OSError as error:
        if error.errno != errno.ENXIO:  # raised for a socket
            raise
    raise VideoError(path, "not a regular file, but a folder, FIFO, socket or device; name a file")
