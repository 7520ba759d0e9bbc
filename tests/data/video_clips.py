"""Tiny videos in whose frames the frame number is drawn, and functions that read the number from a frame."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SIDE = 112
"""Side of a frame. 112 x 112 pixels are the smallest size that read_frames returns, so that it does not resize."""
NUM_BITS = 8
RATE = 25


def draw(number: int, *, width: int = SIDE, height: int = SIDE) -> NDArray[np.uint8]:
    """Draw a grey picture with the number as eight bars in its upper half, the least significant bit on the left."""
    picture = np.full((height, width, 3), 60, dtype=np.uint8)
    for bit in range(NUM_BITS):
        if number >> bit & 1:
            picture[: height // 2, bit * width // NUM_BITS : (bit + 1) * width // NUM_BITS] = 200
    return picture


def number_of(frame: Tensor) -> int:
    """Read the number of a frame [height, width, 3]."""
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
    metadata: dict[str, str] | None = None,
    gop_size: int = 12,
    rate: int = RATE,
) -> Path:
    """Write a clip at 25 fps, or with the given presentation times.

    Its bytes do not depend on the number of cores, which several encoders take for their number of threads, and have no
    random numbers, which Matroska takes for its ids: some tests edit or damage them.

    Args:
        options: options of the encoder.
        container_options: options of the muxer.
        times_ms: presentation time of each frame.
        rotation: rotation in the metadata, counterclockwise in degrees.
        size: width and height.
        extra_streams: whether to add a small second video and a sound track.
        metadata: metadata of the container.
        gop_size: distance of the keyframes in frames.
        rate: frame rate that the stream states.
    """
    frame_ticks, time_base = (1, Fraction(1, RATE)) if path.suffix == ".avi" else (40, Fraction(1, 1000))
    with av.open(str(path), "w", options={"fflags": "+bitexact"} | (container_options or {})) as container:
        container.metadata.update(metadata or {})
        small = container.add_stream("mpeg4", rate=RATE, width=32, height=32) if extra_streams else None
        sound = container.add_stream("aac", rate=8000, layout="mono") if extra_streams else None
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop_size
        for video in (stream, small):
            if video is not None:
                video.codec_context.thread_count = 1
        is_raw = path.suffix in (".mpg", ".h264", ".hevc")  # the stream itself states the rate
        stream.codec_context.time_base = Fraction(1, rate) if is_raw else time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, width=size[0], height=size[1]))
            frame.pts = times_ms[number] if times_ms else number * frame_ticks * RATE // rate
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
        for encoder in (stream, small, sound):
            if encoder is not None:
                container.mux(encoder.encode(None))
    return path


def replace_packets(source: Path, target: Path, replacements: dict[int, bytes]) -> Path:
    """Remux a video without B-frames, with other data in some of its packets.

    Args:
        source: video to read.
        target: video to write, in the container of its suffix.
        replacements: number of a packet to its new data.
    """
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            data = packet
            if number in replacements:
                data = av.Packet(replacements[number])
                data.pts, data.dts, data.duration = packet.pts, packet.dts, packet.duration
                data.time_base = packet.time_base
            data.stream = stream
            new.mux(data)
    return target
