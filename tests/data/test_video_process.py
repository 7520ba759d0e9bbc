"""`VideoReader` returns the same frames as `read_frames`, and a crash or a hang costs one video."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vcr1.data.frame_rules import PER_FRAME_RULES, WholeVideoRules
from megatron_vcr1.data.video import VideoError, read_frames
from megatron_vcr1.data.video_process import VideoReader
from tests.data.video_clips import write_clip


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader() as reader:
        yield reader


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("process") / "clip.mp4")


def test_results_equal_those_of_read_frames(reader: VideoReader, clip: Path) -> None:
    whole_video = WholeVideoRules(min_video_pixels=4096, max_video_pixels=50_000)
    rules = ({"rules": PER_FRAME_RULES}, {"rules": whole_video, "fps": 3.2, "factor": 32})
    for options in ({}, {"fps": 10.0}, {"max_pixels": 20 * 784, "min_frames": 2}, *rules):
        actual, expected = reader.read_frames(clip, **options), read_frames(clip, **options)  # type: ignore[arg-type]
        assert torch.equal(actual.frames, expected.frames)
        assert actual.timestamps_s == expected.timestamps_s
        assert (actual.duration_s, actual.backend) == (expected.duration_s, expected.backend)


def test_errors_are_raised_in_the_calling_process(reader: VideoReader, clip: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.mp4: no such file"):
        reader.read_frames("gone.mp4")
    with pytest.raises(VideoError, match=r"gone\.png: no such file"):
        reader.read_frames(["gone.png"])
    with pytest.raises(ValueError, match="fps must be above 0"):
        reader.read_frames(clip, fps=0)
    with pytest.raises(ValueError, match="owns the GPU"):
        reader.read_frames(clip, backend="dali-gpu")


def test_a_crash_costs_one_video(reader: VideoReader, clip: Path) -> None:
    reader.read_frames(clip)
    process = reader._process
    assert process is not None
    os.kill(process.pid, signal.SIGSEGV)
    with pytest.raises(VideoError, match=r"clip\.mp4: the decoder crashed \(SIGSEGV\)"):
        reader.read_frames(clip)
    assert reader.read_frames(clip).frames.shape[0] == 4


def test_the_decoder_is_killed_first_when_memory_is_short(reader: VideoReader, clip: Path) -> None:
    reader.read_frames(clip)
    assert reader._process is not None
    assert Path(f"/proc/{reader._process.pid}/oom_score_adj").read_text() == "1000\n"


def test_a_hang_is_ended_by_the_time_limit(reader: VideoReader, clip: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the FTP client waits for a greeting
        url = f"ftp://127.0.0.1:{silent.getsockname()[1]}/never.mp4"
        with pytest.raises(VideoError, match=r"never\.mp4: the decoder hung and was ended by the time limit"):
            reader.read_frames(url, time_limit_s=0.2)
    assert reader.read_frames(clip).frames.shape[0] == 4


def test_closing_a_reader_ends_its_process(clip: Path) -> None:
    with VideoReader() as reader:
        reader.read_frames(clip)
        process = reader._process
    assert process is not None
    assert process.returncode == -signal.SIGKILL
