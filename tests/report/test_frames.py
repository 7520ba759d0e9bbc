from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.report.frames import MAX_FRAMES, read_strip
from megatron_vcr1.tasks import GroundingTarget
from megatron_vcr1.types import Interval, VideoSample
from tests.data.video_clips import write_clip


def test_a_strip_holds_evenly_spaced_frames_as_small_images(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", num_frames=60)
    with VideoReader() as reader:
        strip = read_strip(VideoSample("a", str(clip), GroundingTarget(Interval(0, 1)), "when?"), reader)
    assert len(strip.frames) == MAX_FRAMES
    times = [frame.time_s for frame in strip.frames]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= strip.duration_s
    for frame in strip.frames:
        content = base64.b64decode(frame.uri.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(content)).size == (frame.width, frame.height)
        assert frame.width * frame.height <= 176 * 176


def test_a_missing_video_is_an_error(tmp_path: Path) -> None:
    sample = VideoSample("a", str(tmp_path / "absent.mp4"), GroundingTarget(Interval(0, 1)), "when?")
    with VideoReader() as reader, pytest.raises(VideoError, match=r"absent\.mp4"):
        read_strip(sample, reader)
