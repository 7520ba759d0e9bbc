"""Single pictures, and folders and lists of them as videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.video import VideoError, read_frames
from tests.data.video_clips import SIDE, draw, numbers_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 1.png ... 40.png, whose alphabetical order is not the right one, and a file that is no image."""
    for number in range(1, 41):
        Image.fromarray(draw(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "groundtruth.txt").write_text("1,2,3,4\n")
    return tmp_path


def test_a_folder_is_a_video_at_its_image_rate(folder: Path) -> None:
    video = read_frames(folder, image_fps=10)
    assert numbers_of(video.frames) == [1, 7, 12, 18, 23, 29, 34, 40]  # 8 over 4 s, from the first to the last
    assert video.timestamps_s == pytest.approx([0, 0.6, 1.1, 1.7, 2.2, 2.8, 3.3, 3.9])
    assert video.duration_s == pytest.approx(4.0)
    assert video.backend == "images"


def test_a_list_is_used_as_it_is(folder: Path) -> None:
    video = read_frames([folder / "9.png", folder / "3.png", folder / "30.png"])
    assert numbers_of(video.frames) == [9, 3, 30, 30]  # an even number, for the temporal patch
    assert video.timestamps_s == (0.0, 0.5, 1.0, 1.0)
    assert video.duration_s == 2.0


def test_tracking_frames(folder: Path) -> None:
    files = [folder / f"{number}.png" for number in range(1, 9)]
    assert numbers_of(read_frames(files).frames) == list(range(1, 9))


def test_bad_images_are_named(folder: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.png: no such file"):
        read_frames([folder / "1.png", folder / "gone.png"])
    with pytest.raises(VideoError, match=r"groundtruth\.txt: not a picture"):
        read_frames([folder / "groundtruth.txt"])
    (folder / "half.png").write_bytes((folder / "1.png").read_bytes()[:150])
    with pytest.raises(VideoError, match=r"half\.png: damaged picture"):
        read_frames([folder / "half.png"])
    Image.fromarray(draw(1)).save(folder / "odd.avif")
    content = bytearray((folder / "odd.avif").read_bytes())
    content[content.index(b"mdat") + 4 :] = bytes(len(content) - content.index(b"mdat") - 4)
    (folder / "odd.avif").write_bytes(content)
    with pytest.raises(VideoError, match=r"odd\.avif: damaged picture"):  # its decoder raises a RuntimeError
        read_frames([folder / "odd.avif"])
    Image.new("RGB", (SIDE, 2 * SIDE)).save(folder / "tall.png")
    with pytest.raises(VideoError, match=r"tall\.png: 112x224 in a video of other size"):
        read_frames([folder / "1.png", folder / "tall.png"])
    with pytest.raises(VideoError, match="without frames"):
        read_frames([])
    (folder / "empty").mkdir()
    with pytest.raises(VideoError, match="a folder without images"):
        read_frames(folder / "empty")


def test_read_image_turns_upright_and_puts_transparency_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(draw(5)).save(tmp_path / "turned.png", exif=exif)
    upright = read_image(str(tmp_path / "turned.png"))
    assert torch.equal(upright, torch.rot90(torch.from_numpy(draw(5)), -1, (0, 1)))
    glass = np.zeros((2, 2, 4), dtype=np.uint8)
    glass[0, 0] = (10, 20, 30, 255)
    Image.fromarray(glass).save(tmp_path / "glass.png")
    assert read_image(str(tmp_path / "glass.png")).tolist() == [
        [[10, 20, 30], [255, 255, 255]],
        [[255, 255, 255], [255, 255, 255]],
    ]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16"])
def test_read_image_gives_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (7, 5)).save(path)
    assert read_image(str(path)).shape == (5, 7, 3)
