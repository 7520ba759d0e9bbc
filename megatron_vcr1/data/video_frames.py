"""Decoded frames of FFmpeg: checking them, turning them upright and converting them to RGB."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vcr1.data.images import blend_onto_white
from megatron_vcr1.data.video_open import VideoSource
from megatron_vcr1.data.video_types import VideoError


def intact_frames(source: VideoSource, frames: Sequence[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield frames that the decoder returned.

    Raises:
        VideoError: the decoder marked a frame as damaged.
    """
    for frame in frames:
        # Check every decoded frame, not only the chosen ones: a chosen frame may refer to it.
        if frame.is_corrupt:
            which = "a frame" if frame.time is None else f"the frame at {frame.time:.2f} s"  # raw H.264 has no times
            raise VideoError(source.file, f"damaged: {which} did not decode cleanly")
        yield frame


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored frame is turned for display: transposed first, then flipped. Covers all eight orientations."""

    transpose: bool = False
    flip_vertically: bool = False
    flip_horizontally: bool = False

    def apply(self, frame: Tensor) -> Tensor:
        """Turn a frame [height, width, 3] upright; returns a contiguous tensor."""
        if self.transpose:
            frame = frame.transpose(0, 1)
        flipped = [dim for dim, flips in ((0, self.flip_vertically), (1, self.flip_horizontally)) if flips]
        return torch.flip(frame, flipped) if flipped else frame.contiguous()


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Read the orientation from the frame's display matrix, as FFmpeg's autorotate does.

    The matrix maps stored coordinates to displayed ones: x' = a x + c y and y' = b x + d y, as 16.16 fixed-point
    numbers [a, b, u, c, d, v, x, y, w]. Angles between right angles are rounded to the nearest one.
    """
    # Side data is looked up by its name: frame.rotation, of newer versions of PyAV only, does not tell mirrored videos.
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV fails for side data of a kind that it does not know, for example EXIF in JPEG frames (PyAV 18).
        return _ROTATIONS[round(frame.rotation / 90) % 4]
    if data is None:
        return Orientation()
    # It is a buffer, although PyAV's annotations do not say so.
    a, b, _, c, d, *_ = struct.unpack("=9i", data)  # type: ignore[arg-type]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, flip_vertically=d < 0, flip_horizontally=a < 0)
    return Orientation(True, flip_vertically=b < 0, flip_horizontally=c < 0)


_ROTATIONS = (  # counterclockwise, by the number of right angles
    Orientation(),
    Orientation(True, flip_vertically=True),
    Orientation(False, True, True),
    Orientation(True, flip_horizontally=True),
)


def upright_rgb(frame: av.VideoFrame) -> Tensor:
    """Convert a frame to RGB, blend transparency onto white, and turn it upright; uint8 [height, width, 3]."""
    has_alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    # One frame is too little work for threads.
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1)
    if has_alpha:
        pixels = np.array(blend_onto_white(Image.fromarray(pixels)))
    return orientation_of(frame).apply(torch.from_numpy(pixels))
