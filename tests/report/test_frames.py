from __future__ import annotations

import base64
import io
from pathlib import Path

import PIL.Image
import pytest

from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.report.frames import MAX_FRAMES, FilmStrip, read_strip
from megatron_vcr1.tasks import QualityTarget
from megatron_vcr1.types import Image, Medium, Sample, Video
from tests.data.video_clips import write_clip


def _strip(medium: Medium, reader: VideoReader) -> FilmStrip:
    return read_strip(Sample("a", (medium,), QualityTarget("good"), "how good?"), medium, reader)


def test_a_strip_holds_evenly_spaced_frames_as_small_images(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", num_frames=60)
    with VideoReader() as reader:
        strip = _strip(Video(str(clip)), reader)
    assert len(strip.frames) == MAX_FRAMES
    times = [frame.time_s for frame in strip.frames if frame.time_s is not None]
    assert times == sorted(times) and times[0] >= 0 and strip.duration_s is not None and times[-1] <= strip.duration_s
    for frame in strip.frames:
        content = base64.b64decode(frame.uri.removeprefix("data:image/jpeg;base64,"))
        assert PIL.Image.open(io.BytesIO(content)).size == (frame.width, frame.height)
        assert frame.width * frame.height <= 176 * 176


def test_a_missing_video_is_an_error(tmp_path: Path) -> None:
    with VideoReader() as reader, pytest.raises(VideoError, match=r"absent\.mp4"):
        _strip(Video(str(tmp_path / "absent.mp4")), reader)


@pytest.mark.parametrize("size", [(60, 40), (900, 700), (4000, 3)])
def test_an_image_is_a_strip_of_one_small_frame(tmp_path: Path, size: tuple[int, int]) -> None:
    PIL.Image.new("RGB", size, "red").save(tmp_path / "image.png")
    with VideoReader() as reader:
        strip = _strip(Image(str(tmp_path / "image.png")), reader)
    (frame,) = strip.frames
    assert (strip.duration_s, frame.time_s) == (None, None)
    assert frame.width / frame.height == pytest.approx(size[0] / size[1], rel=0.02) or frame.height == 1
    assert frame.width * frame.height <= 176 * 176
