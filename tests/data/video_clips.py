"""Tiny videos whose frames carry their own number, and what reads it back."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SIDE = 112
"""112 x 112 pixels are the least that read_frames gives, so that it need not resize."""
NUM_BITS = 8
RATE = 25


def draw(number: int, *, width: int = SIDE, height: int = SIDE) -> NDArray[np.uint8]:
    """A grey picture with the number as eight bars, least significant left, over its upper half."""
    picture = np.full((height, width, 3), 60, dtype=np.uint8)
    for bit in range(NUM_BITS):
        if number >> bit & 1:
            picture[: height // 2, bit * width // NUM_BITS : (bit + 1) * width // NUM_BITS] = 200
    return picture


def number_of(frame: Tensor) -> int:
    """The number that a frame [height, width, 3] carries."""
    height, width, _ = frame.shape
    bars = frame[: height // 2].float().mean((0, 2)).view(NUM_BITS, width // NUM_BITS)[:, 4:-4].mean(1)
    return sum(1 << bit for bit in range(NUM_BITS) if bars[bit] > 130)


def numbers_of(frames: Tensor) -> list[int]:
    return [number_of(frame) for frame in frames]


def write_clip(
    path: Path,
    *,
    num_frames: int = 40,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
    rotation: int = 0,
    size: tuple[int, int] = (SIDE, SIDE),
    extra_streams: bool = False,
) -> Path:
    """Write a clip at 25 frames a second, or with the given presentation times.

    Args:
        options: of the encoder.
        container_options: of the muxer.
        times_ms: when each frame is shown.
        rotation: in the metadata, counterclockwise degrees.
        size: width and height.
        extra_streams: a small second video and a sound track as well.
    """
    frame_ticks, time_base = (1, Fraction(1, RATE)) if path.suffix == ".avi" else (40, Fraction(1, 1000))
    with av.open(str(path), "w", options=container_options or {}) as container:
        small = container.add_stream("mpeg4", rate=RATE, width=32, height=32) if extra_streams else None
        sound = container.add_stream("aac", rate=8000, layout="mono") if extra_streams else None
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = 12
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, width=size[0], height=size[1]))
            frame.pts = times_ms[number] if times_ms else number * frame_ticks
            frame.time_base = time_base
            container.mux(stream.encode(frame))
            if small is not None:
                black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8))
                black.pts, black.time_base = number, Fraction(1, RATE)
                container.mux(small.encode(black))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
        for one in (stream, small, sound):
            if one is not None:
                container.mux(one.encode(None))
    return path
