"""Decoding of single images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

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


def save_grey(path: Path, values: np.ndarray) -> str:
    Image.fromarray(values).save(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["png", "tiff", "jp2", "pgm"])
def test_16_bit_grey_is_scaled_to_8_bits(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]] * 4, dtype=np.uint16)
    path = tmp_path / f"depth.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    else:
        save_grey(path, values)
    image = read_image(str(path))
    assert image[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_big_endian_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (2, 1), np.array([0, 65535], dtype=">u2").tobytes())
    image.save(tmp_path / "big.tiff")
    assert read_image(str(tmp_path / "big.tiff"))[0].tolist() == [[0] * 3, [255] * 3]


def test_16_bit_grey_is_turned_upright_and_transparency_becomes_white(tmp_path: Path) -> None:
    values = np.array([[0, 100 * 257]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    assert read_image(str(tmp_path / "turned.png"))[0, :, 0].tolist() == [100, 0]
    Image.fromarray(values).save(tmp_path / "glass.png", transparency=0)
    assert read_image(str(tmp_path / "glass.png"))[0, :, 0].tolist() == [255, 100]


def test_floating_point_pixels_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    path = save_grey(tmp_path / "unit.tiff", np.array([[0, 0.5, 1]], dtype=np.float32))
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255]
    for number, value in enumerate([1.5, -0.1, float("nan")]):
        path = save_grey(tmp_path / f"{number}.tiff", np.array([[0, value]], dtype=np.float32))
        with pytest.raises(VideoError, match=r"\.tiff: floating-point pixels outside of 0 to 1"):
            read_image(path)


def test_32_bit_integers_are_refused(tmp_path: Path) -> None:
    path = save_grey(tmp_path / "wide.tiff", np.array([[0, 1 << 20]], dtype=np.int32))
    with pytest.raises(VideoError, match=r"wide\.tiff: integer pixels below 0 or of more than 16 bits"):
        read_image(path)


def test_16_bit_grey_of_other_kinds_of_tiff_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 100 * 128, 32767]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "signed.tiff", tiffinfo={339: 2})  # sample format: signed integers
    assert read_image(str(tmp_path / "signed.tiff"))[0, :, 0].tolist() == [0, 100, 255]
    path = tmp_path / "inverted.tiff"
    Image.fromarray(values * 2).save(path)
    content = bytearray(path.read_bytes())
    tag = content.index(struct.pack("<HHI", 262, 3, 1))  # photometric interpretation, one short integer
    struct.pack_into("<H", content, tag + 8, 0)  # 0 is white
    path.write_bytes(content)
    assert read_image(str(path))[0, :, 0].tolist() == [255, 155, 0]


def test_lab_colours_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tiff")
    with pytest.raises(VideoError, match=r"lab\.tiff: an image in LAB colours"):
        read_image(str(tmp_path / "lab.tiff"))


@pytest.mark.parametrize(
    ("mode", "suffix", "colour", "expected"),
    [
        ("1", "png", 1, [255, 255, 255]),
        ("L", "png", 77, [77, 77, 77]),
        ("LA", "png", (77, 255), [77, 77, 77]),
        ("LA", "png", (77, 0), [255, 255, 255]),
        ("RGBA", "png", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", "tiff", (10, 20, 30, 0), [255, 255, 255]),
        ("CMYK", "tiff", (0, 255, 0, 0), [255, 0, 255]),
        ("CMYK", "jpg", (255, 0, 0, 0), [0, 255, 255]),
    ],
)
def test_every_mode_keeps_its_colours(tmp_path: Path, mode: str, suffix: str, colour: Any, expected: list[int]) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.new(mode, (16, 16), colour).save(path)
    assert np.abs(np.array(read_image(str(path))[3, 3].tolist()) - expected).max() <= 2


def test_palettes_keep_their_colours_and_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png")
    assert read_image(str(tmp_path / "palette.png"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    image.save(tmp_path / "glass.gif", transparency=1)
    assert read_image(str(tmp_path / "glass.gif"))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(np.array(read_image(str(path))[0, 0].tolist()) - [255, 0, 0]).max() <= 4
