"""Animated images as videos: every frame for as long as the animation shows it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vcr1.data.video import VideoError, read_frames
from tests.data.video_clips import SIDE, draw, numbers_of

DURATIONS_MS = [200, 200, 1000, 200, 200, 400]


def write_animation(path: Path, durations_ms: list[int] = DURATIONS_MS) -> Path:
    first, *others = (Image.fromarray(draw(number)) for number in range(len(durations_ms)))
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=durations_ms, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".avif"])
def test_an_animation_is_a_video(tmp_path: Path, suffix: str) -> None:
    video = read_frames(write_animation(tmp_path / f"animation{suffix}"), fps=5)
    assert video.duration_s == pytest.approx(2.2)
    instants_s = np.linspace(
        0.1, 2.09, 10
    )  # of 10 parts of 2.2 s, from the middle of the first frame to that of the last part
    shown = np.searchsorted(np.cumsum(DURATIONS_MS) / 1000, instants_s, side="right")
    assert numbers_of(video.frames) == shown.tolist()
    starts_s = np.cumsum([0, *DURATIONS_MS[:-1]]) / 1000
    assert video.timestamps_s == pytest.approx(starts_s[shown].tolist())


def test_a_webp_frame_without_a_duration_is_shown_as_in_browsers(tmp_path: Path) -> None:
    assert read_frames(write_animation(tmp_path / "a.webp", [0, 0, 0, 0])).duration_s == pytest.approx(0.4)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_a_still_image_is_a_video_of_one_frame(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(draw(5)).save(tmp_path / f"still{suffix}")
    assert numbers_of(read_frames(tmp_path / f"still{suffix}").frames) == [5, 5]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
def test_transparency_is_blended_onto_white(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)) for _ in range(2)]
    pictures[1].putpixel((0, 0), (255, 0, 0, 255))
    path = tmp_path / f"clear{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200)
    assert torch.equal(read_frames(path).frames[:, 50, 50], torch.full((2, 3), 255, dtype=torch.uint8))


def test_exif_in_frames_does_not_hide_the_picture(tmp_path: Path) -> None:
    """FFmpeg returns EXIF with each frame, as side data of a kind that older versions of PyAV do not know."""
    picture, exif = Image.fromarray(draw(5)), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise for display
    file = io.BytesIO()
    picture.save(file, "jpeg", exif=exif)
    (tmp_path / "photo.jpg").write_bytes(file.getvalue())
    frame = read_frames(tmp_path / "photo.jpg").frames[0]
    assert numbers_of(torch.rot90(frame, 1, (0, 1))[None]) == [5]


def test_a_damaged_animation_is_an_error(tmp_path: Path) -> None:
    path = write_animation(tmp_path / "a.webp")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match=r"a\.webp: damaged"):
        read_frames(path)
