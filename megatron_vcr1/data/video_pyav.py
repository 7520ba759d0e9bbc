"""Decoding with FFmpeg on the CPU, through PyAV: only the packets that the chosen frames need are decoded.

`video_in_order` decodes the videos whose packets do not tell when their frames are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vcr1.data import video_webp
from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_frames import intact_frames, upright_rgb
from megatron_vcr1.data.video_in_order import decode_in_order, holds_fields, may_hold_empty_frames, may_hold_fields
from megatron_vcr1.data.video_index import PacketIndex, read_packet_index, read_packets
from megatron_vcr1.data.video_open import VideoSource, open_video
from megatron_vcr1.data.video_types import Deadline, Sampling, VideoError, VideoFrames, choose_frames

NONREF_SKIPPING_CODECS = ("h264",)
"""Codecs whose non-reference frames can be skipped, because no other frame refers to them. Not HEVC: there, a frame of
a higher temporal layer may refer to one."""


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
        VideoError: the video is missing, damaged, truncated, or took too long.
    """
    with open_video(file, deadline, num_threads) as source:
        is_webp = source.container.format.name in video_webp.FFMPEG_FORMATS
        if not is_webp:
            index = read_packet_index(source)
            if index.is_timed and not may_hold_empty_frames(source, index) and not holds_fields(source, index):
                return _decode_timed(source, index, sampling)
    if is_webp:
        return video_webp.decode_webp(file, sampling, deadline=deadline)
    # Reopened, because FFmpeg may give packets other time stamps after seeking.
    return decode_in_order(file, index, sampling, deadline=deadline, num_threads=num_threads)


def _decode_timed(source: VideoSource, index: PacketIndex, sampling: Sampling) -> VideoFrames:
    """Decode the sampled frames of a video whose packets tell when their frames are shown."""
    table = index.table
    choice = choose_frames(table, sampling, source.file)
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
    source: VideoSource, index: PacketIndex, packet_range: PacketRange, chosen_pts: dict[int, list[int]]
) -> Iterator[av.VideoFrame]:
    """Decode a range of packets and yield its frames in display order.

    Args:
        chosen_pts: time stamps of the frames that are needed. Frames that neither they nor other frames need are
            skipped.
    """
    codec = source.stream.codec_context
    # Not in an interlaced stream: the packet of a chosen frame may be followed by one with its other field.
    skips_nonref = codec.name in NONREF_SKIPPING_CODECS and source.has_pts and not may_hold_fields(source)
    start_pts = index.pts[packet_range.start]
    for packet in _packets_of_range(source, index, packet_range):
        if packet_range.start > 0 and packet.pts < start_pts:
            continue  # refers to the previous GOP, which this range does not decode
        if skips_nonref:
            codec.skip_frame = "DEFAULT" if packet.pts in chosen_pts else "NONREF"
        yield from intact_frames(source, codec.decode(packet))
    yield from intact_frames(source, codec.decode(None))


def _packets_of_range(source: VideoSource, index: PacketIndex, packet_range: PacketRange) -> Iterator[av.Packet]:
    # Seeking also flushes the decoder, which the previous range has drained.
    if index.is_spliced:  # its time stamps occur repeatedly; such a stream is always decoded from its first byte
        source.container.seek(0, unsupported_byte_offset=True)
    else:
        source.container.seek(int(index.dts[packet_range.start]), stream=source.stream)
    # In a container without presentation time stamps, FFmpeg may guess others after seeking. Decoding times stay.
    stored = index.pts if source.has_pts else index.dts
    position = None
    for packet in read_packets(source, source.stream):
        if index.is_spliced:
            position = position or 0
            packet.pts, packet.dts = int(index.pts[position]), int(index.dts[position])
        elif position is None and (packet.pts if source.has_pts else packet.dts) == stored[packet_range.start]:
            position = packet_range.start
        if position is None:
            continue  # seeking may end at an earlier keyframe
        yield packet
        position += 1
        if position == packet_range.stop:
            return
    raise VideoError(source.file, "damaged: seeking does not find the packets that reading found")
