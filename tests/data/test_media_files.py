"""Opening media files: regular files, remote files, and paths that are neither."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import fsspec
import pytest

from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.media_files import local_path, open_media
from megatron_vcr1.data.video import VideoError, read_frames


def _make(path: Path, kind: str) -> Path:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            # A socket's path has at most 107 bytes, and that of a test's folder may be longer.
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        case "device":
            return Path("/dev/zero")
        case "folder":
            path.mkdir()
    return path


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str, prefix: str) -> None:
    path = prefix + str(_make(tmp_path / "a.mp4", kind))
    with pytest.raises(VideoError, match="not a regular file"):
        read_image(path)
    with pytest.raises(VideoError, match=r"not a regular file|the folder contains no images"):
        read_frames(path)
    with pytest.raises(VideoError, match="not a regular file"):
        read_frames([path])


def test_local_and_remote_files_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "a b.bin"
    path.write_bytes(b"local")
    fsspec.filesystem("memory").pipe("/a.bin", b"remote")
    for name, content in ((str(path), b"local"), (f"file://{path}", b"local"), ("memory://a.bin", b"remote")):
        with open_media(name) as stream:
            assert stream.read() == content
    assert local_path(f"file://{path}") == str(path)
    assert local_path("memory://a.bin") is None


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(VideoError, match="the file is empty"):
        read_frames(path)
    with pytest.raises(VideoError, match="not an image"):
        read_image(str(path))
