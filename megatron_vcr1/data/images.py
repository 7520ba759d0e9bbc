"""Image reading: single images, and the frames of videos that are stored as images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageOps import exif_transpose, invert
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from megatron_vcr1.data.media_files import open_media
from megatron_vcr1.data.video_types import OUT_OF_MEMORY, PROGRAMMING_ERRORS, VideoError

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Pillow supports more, among them EPS, which it runs through Ghostscript: an image from the
internet would then be a program that we execute."""
MAX_IMAGE_PIXELS = 2**26
"""Largest image that is decoded, in pixels: 8192 x 8192. A PNG of a few hundred kB may claim to have far more, and
decoding takes up to 12 bytes per pixel."""

# Tags of TIFF and their values.
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2


def read_image(path: str) -> Tensor:
    """Decode an image, rotate it upright by its EXIF tag, and blend transparency onto white.

    Grey images of 16 bits, and floating-point ones with values from 0 to 1, are scaled to 8 bits. For an animated image
    or a file with several pages, the first frame or page is read.

    Args:
        path: local path or fsspec URL.

    Returns:
        uint8 [height, width, 3].

    Raises:
        VideoError: the file is missing, truncated, too large, not an image, or has pixels of a kind that cannot be
            shown.
    """
    try:
        with open_media(path) as stream, Image.open(stream, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                reason = f"{image.width}x{image.height} pixels are more than {MAX_IMAGE_PIXELS}; scale the image down"
                raise VideoError(path, reason)
            return torch.from_numpy(np.array(_to_rgb(path, _decode_upright(path, image))))
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it checks while it reads the header
        raise VideoError(path, f"too large to be decoded; scale the image down ({error})") from error
    except UnidentifiedImageError as error:
        raise VideoError(path, "not an image in a known format") from error
    except MemoryError as error:
        raise VideoError(path, OUT_OF_MEMORY) from error
    except (VideoError, *PROGRAMMING_ERRORS):
        raise
    except Exception as error:  # Pillow's decoders raise errors of every type on damaged data
        raise VideoError(path, f"damaged image ({error})") from error


def _decode_upright(path: str, image: Image.Image) -> Image.Image:
    """Decode the pixels and apply the EXIF orientation."""
    try:
        image.load()
        upright = exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise errors of every type on damaged data, TypeError and AttributeError included. These two
        # calls pass nothing but the image, so no mistake in a call of ours can hide here.
        raise VideoError(path, f"damaged image ({error})") from error
    if not image.mode.startswith(("I", "F")):
        return upright
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    is_signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    grey = _to_8_bits(path, upright, tags.get(_BITS_PER_SAMPLE, (16,))[0] - is_signed)
    # Pillow inverts such images of 8 bits only.
    return invert(grey) if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _to_8_bits(path: str, image: Image.Image, bits: int) -> Image.Image:
    """Scale a grey image of more than 8 bits per pixel, which Pillow's own conversion clips to white or black.

    Args:
        path: file of the image, for errors.
        image: an image in one of the modes I and F.
        bits: bits per pixel without a sign, unless the pixels are floating-point numbers.

    Raises:
        VideoError: the range of the values is not known.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also refuses NaN
            raise VideoError(path, "floating-point pixels outside of 0 to 1; save it with 8 bits per channel")
        grey = np.rint(values * 255)
    else:
        if bits > 16 or values.min() < 0 or values.max() >= 1 << bits:
            raise VideoError(path, "integer pixels below 0 or of more than 16 bits; save it with 8 bits per channel")
        grey = np.rint(values * (255 / ((1 << bits) - 1)))
    scaled = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _to_rgb(path: str, image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        raise VideoError(path, "an image in LAB colours; save it as RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return blend_onto_white(image.convert("RGBA"))


def blend_onto_white(image: Image.Image) -> Image.Image:
    """Blend an RGBA image onto white; returns an RGB image."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
