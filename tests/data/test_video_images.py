"""Folders and lists of images as videos."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megatron_vcr1.data.video import VideoError, read_frames
from tests.data.video_clips import SIDE, draw, numbers_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 1.png ... 40.png, whose alphabetical order differs from their display order, and files to ignore."""
    for number in range(1, 41):
        Image.fromarray(draw(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "groundtruth.txt").write_text("1,2,3,4\n")
    (tmp_path / "._1.png").write_bytes(b"metadata that macOS writes beside 1.png")
    return tmp_path


def test_a_folder_is_sampled_at_its_image_rate(folder: Path) -> None:
    video = read_frames(folder, image_fps=10)
    assert numbers_of(video.frames) == [1, 7, 12, 18, 23, 29, 34, 40]  # 8 over 4 s, from the first to the last
    assert video.timestamps_s == pytest.approx([0, 0.6, 1.1, 1.7, 2.2, 2.8, 3.3, 3.9])
    assert video.duration_s == pytest.approx(4.0)
    assert video.backend == "images"


def test_all_images_of_a_list_are_used(folder: Path) -> None:
    video = read_frames([folder / "9.png", folder / "3.png", folder / "30.png"])
    assert numbers_of(video.frames) == [9, 3, 30, 30]  # an even number, to fill the last temporal patch
    assert video.timestamps_s == (0.0, 0.5, 1.0, 1.0)
    assert video.duration_s == 2.0


def test_the_frames_of_tracking_are_used_in_order(folder: Path) -> None:
    files = [folder / f"{number}.png" for number in range(1, 9)]
    assert numbers_of(read_frames(files).frames) == list(range(1, 9))


def test_bad_images_are_named(folder: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.png: no such file"):
        read_frames([folder / "1.png", folder / "gone.png"])
    with pytest.raises(VideoError, match=r"groundtruth\.txt: not an image"):
        read_frames([folder / "groundtruth.txt"])
    Image.new("RGB", (SIDE, 2 * SIDE)).save(folder / "tall.png")
    with pytest.raises(VideoError, match=r"tall\.png: its size is 112x224, but the video's first frame is 112x112"):
        read_frames([folder / "1.png", folder / "tall.png"])
    with pytest.raises(VideoError, match="the list of frames is empty"):
        read_frames([])
    (folder / "empty").mkdir()
    with pytest.raises(VideoError, match="the folder contains no images"):
        read_frames(folder / "empty")
