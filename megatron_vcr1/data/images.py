"""Pictures: single images, and the frames of videos that are stored as images."""

from __future__ import annotations

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from megatron_vcr1.data.video_types import VideoError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, but among them EPS, which it hands to Ghostscript: a picture would be a program."""


def read_image(path: str) -> Tensor:
    """Decode a picture, turned upright by its EXIF tag, transparency on white.

    Args:
        path: local path or fsspec URL.

    Returns:
        uint8 [height, width, 3].

    Raises:
        VideoError: missing, truncated, or not a picture.
    """
    try:
        with fsspec.open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
            image.load()
            return torch.from_numpy(np.array(_to_rgb(ImageOps.exif_transpose(image))))
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except UnidentifiedImageError as error:
        raise VideoError(path, "not a picture in a known format") from error
    except Exception as error:  # Pillow's readers let errors of every kind pass
        raise VideoError(path, f"damaged picture ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
