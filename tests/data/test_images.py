"""Decoding of single images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vcr1.data import images
from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.video import VideoError
from tests.data.video_clips import draw


def test_exif_orientation_is_applied_and_transparency_becomes_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter clockwise for display
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
def test_every_mode_is_converted_to_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (7, 5)).save(path)
    assert read_image(str(path)).shape == (5, 7, 3)


def test_unreadable_images_are_video_errors_that_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.png: no such file"):
        read_image(str(tmp_path / "gone.png"))
    (tmp_path / "text.png").write_text("1,2,3,4\n")
    with pytest.raises(VideoError, match=r"text\.png: not an image in a known format"):
        read_image(str(tmp_path / "text.png"))
    Image.fromarray(draw(1)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:150])
    with pytest.raises(VideoError, match=r"half\.png: damaged image"):
        read_image(str(tmp_path / "half.png"))
    Image.fromarray(draw(1)).save(tmp_path / "odd.avif")
    content = bytearray((tmp_path / "odd.avif").read_bytes())
    content[content.index(b"mdat") + 4 :] = bytes(len(content) - content.index(b"mdat") - 4)
    (tmp_path / "odd.avif").write_bytes(content)
    with pytest.raises(VideoError, match=r"odd\.avif: damaged image"):  # its decoder raises a RuntimeError
        read_image(str(tmp_path / "odd.avif"))


def test_any_error_of_a_decoder_is_a_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise TypeError("an error that Pillow's decoders raise on damaged data")

    Image.fromarray(draw(1)).save(tmp_path / "odd.png")
    monkeypatch.setattr(images, "exif_transpose", fail)
    with pytest.raises(VideoError, match=r"odd\.png: damaged image"):
        read_image(str(tmp_path / "odd.png"))


def test_a_programming_error_is_not_a_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_without_formats(stream: object) -> None:
        raise NotImplementedError

    Image.fromarray(draw(1)).save(tmp_path / "good.png")
    monkeypatch.setattr(images.Image, "open", open_without_formats)
    with pytest.raises(TypeError, match="unexpected keyword argument 'formats'"):
        read_image(str(tmp_path / "good.png"))


@pytest.mark.parametrize("size", [(20000, 4000), (30000, 20000)], ids=["over_our_limit", "over_pillows_limit"])
def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))))
    with pytest.raises(VideoError, match=r"bomb\.png: .*(20000x4000|600000000) pixels.*") as error:
        read_image(str(path))
    assert "scale the image down" in error.value.reason
