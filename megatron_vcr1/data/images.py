"""Image reading: single images, and the frames of videos that are stored as images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageOps import exif_transpose
from torch import Tensor

from megatron_vcr1.data.media_files import open_media
from megatron_vcr1.data.video_types import PROGRAMMING_ERRORS, VideoError

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Pillow supports more, among them EPS, which it runs through Ghostscript: an image from the
internet would then be a program that we execute."""
MAX_IMAGE_PIXELS = 2**26
"""Largest image that is decoded, in pixels: 8192 x 8192. A PNG of a few hundred kB may claim to have far more, and
decoding takes up to 12 bytes per pixel."""


def read_image(path: str) -> Tensor:
    """Decode an image, rotate it upright by its EXIF tag, and blend transparency onto white.

    Args:
        path: local path or fsspec URL.

    Returns:
        uint8 [height, width, 3].

    Raises:
        VideoError: the file is missing, truncated, too large, or not an image.
    """
    try:
        with open_media(path) as stream, Image.open(stream, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                reason = f"{image.width}x{image.height} pixels are more than {MAX_IMAGE_PIXELS}; scale the image down"
                raise VideoError(path, reason)
            return torch.from_numpy(np.array(_to_rgb(_decode_upright(path, image))))
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it checks while it reads the header
        raise VideoError(path, f"too large to be decoded; scale the image down ({error})") from error
    except UnidentifiedImageError as error:
        raise VideoError(path, "not an image in a known format") from error
    except (VideoError, *PROGRAMMING_ERRORS):
        raise
    except Exception as error:
        raise VideoError(path, f"damaged image ({error})") from error


def _decode_upright(path: str, image: Image.Image) -> Image.Image:
    """Decode the pixels and apply the EXIF orientation."""
    try:
        image.load()
        return exif_transpose(image)
    except Exception as error:
        # Pillow's decoders raise errors of every type on damaged data, TypeError and AttributeError included. These two
        # calls pass nothing but the image, so no mistake in a call of ours can hide here.
        raise VideoError(path, f"damaged image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
