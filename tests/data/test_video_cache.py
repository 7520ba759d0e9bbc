from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.data.video import VideoError
from megatron_vcr1.data.video_cache import VideoCache
from megatron_vcr1.data.video_types import VideoFrames

FRAME_BYTES = 2 * 4 * 4 * 3


class Reads(list[str]):
    """Records the videos that are read from disk."""

    def read(self, path: str, *, fps: float = 2.0) -> VideoFrames:
        self.append(f"{path}@{fps}")
        if path == "bad":
            raise VideoError(path, "damaged")
        return VideoFrames(torch.full((2, 4, 4, 3), len(self), dtype=torch.uint8), (0.0, 0.5), 1.0, "pyav")


def test_a_video_is_read_once_with_the_same_options() -> None:
    reads = Reads()
    cache = VideoCache(10 * FRAME_BYTES, reads.read)
    assert cache.read_frames("a", fps=1) is cache.read_frames("a", fps=1)
    cache.read_frames("a", fps=2)
    assert reads == ["a@1", "a@2"]


def test_the_least_recently_used_video_is_evicted_first() -> None:
    reads = Reads()
    cache = VideoCache(2 * FRAME_BYTES, reads.read)
    for path in ("a", "b", "a", "c", "a", "b"):
        cache.read_frames(path)
    assert reads == ["a@2.0", "b@2.0", "c@2.0", "b@2.0"]


def test_large_videos_and_errors_are_not_cached() -> None:
    reads = Reads()
    cache = VideoCache(FRAME_BYTES - 1, reads.read)
    for path in ("a", "a", "bad", "bad"):
        if path == "bad":
            with pytest.raises(VideoError):
                cache.read_frames(path)
        else:
            cache.read_frames(path)
    assert len(reads) == 4


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    file, reads = tmp_path / "a.mp4", Reads()
    cache = VideoCache(10 * FRAME_BYTES, reads.read)
    for content in (b"first", b"first", b"other one"):
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
        cache.read_frames(str(file))
    assert len(reads) == 2
    file.unlink()
    cache.read_frames(str(file))
    assert len(reads) == 3, "a file that is gone is for the reader to report"
