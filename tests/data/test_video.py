"""`read_frames`: options, sizes, remote files, and the errors of files that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
import torch

from megatron_vcr1.data import video, video_open
from megatron_vcr1.data.video import VideoError, read_frames
from tests.data.video_clips import write_clip


def test_frames_are_resized_to_the_budget(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "wide.mp4", size=(448, 224))
    assert read_frames(path).frames.shape == (4, 224, 448, 3)
    # a frame's share of 16 tokens is raised to 1.05 * 16, and the sides are rounded down to 2 x 5 tokens
    assert read_frames(path, total_pixels=32 * 784).frames.shape == (4, 56, 140, 3)
    assert read_frames(path, max_pixels=50 * 784).frames.shape == (4, 140, 280, 3)
    assert read_frames(path, min_pixels=200 * 784).frames.shape == (4, 280, 560, 3)


def test_a_video_that_is_too_narrow_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "line.mkv", size=(3232, 16), codec="mpeg4", num_frames=4)
    with pytest.raises(VideoError, match=r"line\.mkv: 3232x16: the aspect ratio is over 200"):
        read_frames(path)


def test_remote_paths_go_through_fsspec(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "here.mp4")
    fsspec.filesystem("memory").pipe("/there.mp4", path.read_bytes())
    there = read_frames("memory://there.mp4")
    assert torch.equal(there.frames, read_frames(path).frames)
    with pytest.raises(VideoError, match=r"gone\.mp4: no such file"):
        read_frames("memory://gone.mp4")


def _bad_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.mp4"
    if kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not a video\n" * 100, "zeros": bytes(5000)}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "the file is empty"),
        ("text", "not a video"),
        ("zeros", "not a video"),
        ("sound", "no video stream"),
    ],
)
def test_a_file_that_is_not_a_video_is_refused_with_file_and_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = _bad_file(tmp_path, kind)
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(path)
    assert caught.value.file == os.fspath(path)
    assert str(path) in str(caught.value)


def test_an_unexpected_error_costs_one_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("an odd frame")

    monkeypatch.setattr(video, "decode_with_pyav", fail)
    with pytest.raises(VideoError, match=r"odd\.mp4: cannot be read \(RuntimeError: an odd frame\)"):
        read_frames("odd.mp4")
    assert "Traceback" in caplog.text


def test_a_lack_of_memory_costs_one_video(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(video, "decode_with_pyav", fail)
    with pytest.raises(VideoError, match=r"large\.mp4: decoding it needs more memory than there is"):
        read_frames("large.mp4")


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError, ImportError])
def test_a_programming_error_is_not_a_bad_video(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error("our own mistake")

    monkeypatch.setattr(video, "decode_with_pyav", fail)
    with pytest.raises(error, match="our own mistake"):
        read_frames("good.mp4")


def test_an_argument_that_pyav_does_not_know_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of PyAV that drops an argument must not turn every video into a damaged one."""
    path = write_clip(tmp_path / "good.mp4", num_frames=4)
    monkeypatch.setattr(video_open, "_METADATA_OPTIONS", {"argument_of_another_version": 1})
    with pytest.raises(TypeError, match="argument_of_another_version"):
        read_frames(path)


def test_a_missing_file_system_package_ends_the_run() -> None:
    fsspec.register_implementation("uninstalled", "package_that_is_not_installed.FileSystem", clobber=True)
    with pytest.raises(ImportError):
        read_frames("uninstalled://bucket/clip.mp4")


class _ServiceError(Exception):
    """An error of a storage service's library, which is not an OSError."""


class _Failing(fsspec.AbstractFileSystem):
    def _open(self, path: str, *args: Any, **kwargs: Any) -> None:
        raise _ServiceError("503, slow down")


def test_a_remote_service_that_fails_costs_one_video() -> None:
    fsspec.register_implementation("failing", _Failing, clobber=True)
    with pytest.raises(VideoError, match=r"cannot be read \(_ServiceError: 503, slow down\)"):
        read_frames("failing://bucket/clip.mp4")


def test_the_time_limit_ends_decoding(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="longer than 0 s"):
        read_frames(write_clip(tmp_path / "slow.mp4"), time_limit_s=0)


def test_options_are_checked() -> None:
    for options in (
        {"fps": 0},
        {"min_frames": 1},
        {"min_frames": 8, "max_frames": 4},
        {"min_pixels": 9, "max_pixels": 8},
        {"total_pixels": 0},
        {"start_s": 2, "end_s": 1},
        {"image_fps": 0},
        {"backend": "cuda"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            read_frames("any.mp4", **options)  # type: ignore[arg-type]


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match=r"pipe\.mp4: not a regular file"):
        read_frames(tmp_path / "pipe.mp4")
