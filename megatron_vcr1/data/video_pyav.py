"""Decoding with FFmpeg on the CPU, through PyAV: only the packets that the chosen frames need are decoded."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_index import PacketIndex, read_packet_index, read_packets
from megatron_vcr1.data.video_open import VideoSource, open_video
from megatron_vcr1.data.video_types import Deadline, Sampling, VideoError, VideoFrames, choose_frames

NONREF_SKIPPING_CODECS = ("h264",)
"""Codecs whose non-reference frames can be skipped, because no other frame refers to them. Not HEVC: there, a frame of
a higher temporal layer may refer to one."""

CODECS_WITH_EMPTY_FRAMES = ("mpeg4",)
"""Codecs with packets that say "no new picture" (MPEG-4: VOPs that are not coded). FFmpeg returns no frame for them."""
MAX_EMPTY_FRAME_BYTES = 32
"""Largest size of such a packet; it holds little more than a start code and a time."""


@dataclass(frozen=True)
class PacketRange:
    """Consecutive packets to decode, from a keyframe to the last chosen frame after it."""

    start: int
    """Position of the keyframe in decoding order."""
    stop: int
    """Position after the last packet."""


def decode_with_pyav(file: str, sampling: Sampling, *, deadline: Deadline, num_threads: int = 0) -> VideoFrames:
    """Decode the sampled frames of a video.

    Args:
        file: local path or fsspec URL.
        sampling: number, time range and size of the frames.
        deadline: time limit, checked before each packet.
        num_threads: number of decoder threads; 0 means one per core.

    Raises:
        VideoError: the video is missing, damaged, truncated, has no time stamps, or took too long.
    """
    with open_video(file, deadline, num_threads) as source:
        index = _without_empty_frames(source, read_packet_index(source))
        table = index.table
        choice = choose_frames(table, sampling, file)
        chosen_pts = table.pts[choice.indices]
        whole = [PacketRange(0, len(index.pts))]
        ranges = plan_packet_ranges(index, chosen_pts) if source.has_pts and not index.is_spliced else whole
        try:
            frames = _decode_ranges(source, index, ranges, chosen_pts, sampling)
        except (VideoError, av.FFmpegError):
            if len(ranges) == 1 and ranges[0].start == 0:
                raise
            # Some streams mark frames as keyframes that need earlier frames (gradual intra refresh). Decoded from the
            # start, they are complete. A damaged file fails a second time.
            frames = _decode_ranges(source, index, whole, chosen_pts, sampling)
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, "pyav")


def plan_packet_ranges(index: PacketIndex, chosen_pts: NDArray[np.int64]) -> list[PacketRange]:
    """Plan which packets to decode for the chosen frames.

    A frame is decoded from the last keyframe that precedes it both in decoding order and in display order. A frame that
    follows a keyframe in the file but is displayed before it (open GOP) may refer to the previous GOP, so it is decoded
    from that GOP's keyframe. Overlapping and adjacent ranges are merged.
    """
    position_of = {int(pts): position for position, pts in enumerate(index.pts)}
    spans = set()
    for pts in np.unique(chosen_pts):
        position = position_of[int(pts)]
        usable = index.keyframes[(index.keyframes <= position) & (index.pts[index.keyframes] <= pts)]
        spans.add((int(usable[-1]) if len(usable) else 0, position + 1))
    ranges: list[PacketRange] = []
    for start, stop in sorted(spans):
        if ranges and start <= ranges[-1].stop:
            ranges[-1] = PacketRange(ranges[-1].start, max(ranges[-1].stop, stop))
        else:
            ranges.append(PacketRange(start, stop))
    return ranges


def _without_empty_frames(source: VideoSource, index: PacketIndex) -> PacketIndex:
    """Mark the packets for which the decoder returns no frame as not shown; the frame before them stays on screen.

    Only decoding tells which these are: a small packet may also be a frame in which nothing moves. So a video that has
    small packets, in a codec with such packets, is decoded once more from first to last.
    """
    codec = source.stream.codec_context.name
    if codec not in CODECS_WITH_EMPTY_FRAMES or index.smallest_packet > MAX_EMPTY_FRAME_BYTES:
        return index
    whole = PacketRange(0, len(index.pts))
    decoded_pts = [frame.pts for frame in _decode_range(source, index, whole, None)]
    shown = index.shown & np.isin(index.pts, np.array([pts for pts in decoded_pts if pts is not None], dtype=np.int64))
    if not shown.any():
        raise VideoError(source.file, "damaged: no frame decodes")
    end = int(index.pts[index.shown].max()) + index.last_duration
    return replace(index, shown=shown, last_duration=end - int(index.pts[shown].max()))


def _decode_ranges(
    source: VideoSource,
    index: PacketIndex,
    ranges: Sequence[PacketRange],
    chosen_pts: NDArray[np.int64],
    sampling: Sampling,
) -> Tensor:
    """Decode the chosen frames, turn them upright and resize them.

    Returns:
        uint8 [len(chosen_pts), height, width, 3].
    """
    rows_of: dict[int, list[int]] = {}
    for row, pts in enumerate(chosen_pts):
        rows_of.setdefault(int(pts), []).append(row)
    frames = None
    for packet_range in ranges:
        for pts, frame in _with_pts(source, index, _decode_range(source, index, packet_range, rows_of)):
            if pts is None or pts not in rows_of:
                continue
            rgb = upright_rgb(frame)
            if frames is None:
                height, width = sampling.frame_size(len(chosen_pts), rgb.shape[0], rgb.shape[1], source.file)
                frames = torch.empty(len(chosen_pts), height, width, 3, dtype=torch.uint8)
            frames[rows_of.pop(pts)] = resize_frame(rgb, *frames.shape[1:3])
            if not rows_of:
                return frames
    raise VideoError(source.file, f"damaged: {len(rows_of)} of the chosen frames did not decode")


def _with_pts(
    source: VideoSource, index: PacketIndex, frames: Iterable[av.VideoFrame]
) -> Iterable[tuple[int | None, av.VideoFrame]]:
    """Pair frames with their time stamps; in a container without time stamps, by display order."""
    if source.has_pts:
        return ((frame.pts, frame) for frame in frames)
    return zip(index.table.pts.tolist(), frames, strict=False)


def _decode_range(
    source: VideoSource, index: PacketIndex, packet_range: PacketRange, chosen_pts: dict[int, list[int]] | None
) -> Iterator[av.VideoFrame]:
    """Decode a range of packets and yield its frames in display order.

    Args:
        chosen_pts: time stamps of the frames that are needed. Frames that neither they nor other frames need are
            skipped. None decodes all frames.
    """
    codec = source.stream.codec_context
    skips_nonref = codec.name in NONREF_SKIPPING_CODECS and source.has_pts and chosen_pts is not None
    start_pts = index.pts[packet_range.start]
    for packet in _packets_of_range(source, index, packet_range):
        if packet_range.start > 0 and packet.pts < start_pts:
            continue  # refers to the previous GOP, which this range does not decode
        if skips_nonref:
            codec.skip_frame = "DEFAULT" if packet.pts in (chosen_pts or ()) else "NONREF"
        yield from _intact_frames(source, codec.decode(packet))
    yield from _intact_frames(source, codec.decode(None))


def _packets_of_range(source: VideoSource, index: PacketIndex, packet_range: PacketRange) -> Iterator[av.Packet]:
    # Seeking also flushes the decoder, which the previous range has drained.
    if index.is_spliced:  # its time stamps occur repeatedly; such a stream is always decoded from its first byte
        source.container.seek(0, unsupported_byte_offset=True)
    else:
        source.container.seek(int(index.dts[packet_range.start]), stream=source.stream)
    position = None
    for packet in read_packets(source, source.stream):
        if index.is_spliced:
            position = position or 0
            packet.pts, packet.dts = int(index.pts[position]), int(index.dts[position])
        elif position is None and packet.pts == index.pts[packet_range.start]:
            position = packet_range.start
        if position is None:
            continue  # seeking may end at an earlier keyframe
        yield packet
        position += 1
        if position == packet_range.stop:
            return
    raise VideoError(source.file, "damaged: seeking does not find the packets that reading found")


def _intact_frames(source: VideoSource, frames: Sequence[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in frames:
        # Check every decoded frame, not only the chosen ones: a chosen frame may refer to it.
        if frame.is_corrupt:
            raise VideoError(source.file, f"damaged: the frame at {frame.time:.2f} s did not decode cleanly")
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
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    # It is a buffer, although PyAV's annotations do not say so.
    a, b, _, c, d, *_ = struct.unpack("=9i", data)  # type: ignore[arg-type]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, flip_vertically=d < 0, flip_horizontally=a < 0)
    return Orientation(True, flip_vertically=b < 0, flip_horizontally=c < 0)


def upright_rgb(frame: av.VideoFrame) -> Tensor:
    """Convert a frame to RGB and turn it upright; uint8 [height, width, 3]."""
    rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))  # one frame is too little work for threads
    return orientation_of(frame).apply(rgb)
