"""Videos whose packets do not tell when their frames are shown: decoded from first to last, twice.

The packets of some containers and muxers have no time stamps, or those of decoding instead of display; packets of
MPEG-4 may hold no frame, or two (DivX's "packed bitstream"), and packets of H.264 one of a frame's two fields. Then
only the decoder tells which frames there are, in which order, and when. The first pass counts and times the frames, the
second one takes the chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_frames import intact_frames, upright_rgb
from megatron_vcr1.data.video_index import PacketIndex, fill_times, frame_interval, read_packets, typical_duration
from megatron_vcr1.data.video_open import VideoSource, open_video
from megatron_vcr1.data.video_types import Deadline, FrameTable, Sampling, VideoError, VideoFrames, choose_frames

CODECS_WITH_EMPTY_FRAMES = ("mpeg4",)
"""Codecs with packets that say "no new picture" (MPEG-4: VOPs that are not coded). FFmpeg returns no frame for them."""
PROGRESSIVE = 1
"""FFmpeg's number (AVFieldOrder) for streams of whole frames; it is 0 for unknown streams, and above 1 for fields."""
NUM_PROBED_PACKETS = 250
"""Packets that are decoded to find out whether they hold fields: 5 s of them. Encoders may mix frames and fields."""
MAX_EMPTY_FRAME_BYTES = 32
"""Largest size of such a packet; it holds little more than a start code and a time."""


def may_hold_empty_frames(source: VideoSource, index: PacketIndex) -> bool:
    """Return whether packets may hold no frame. A small packet may also be a frame in which nothing moves."""
    codec = source.stream.codec_context.name
    return codec in CODECS_WITH_EMPTY_FRAMES and index.smallest_packet <= MAX_EMPTY_FRAME_BYTES


def may_hold_fields(source: VideoSource) -> bool:
    """Return whether the stream may be interlaced H.264, in which two packets may hold the fields of one frame.

    PyAV 17 does not tell; there, streams count as progressive.
    """
    codec = source.stream.codec_context
    return codec.name == "h264" and getattr(codec, "field_order", PROGRESSIVE) != PROGRESSIVE


def holds_fields(source: VideoSource, index: PacketIndex) -> bool:
    """Return whether packets hold single fields: decode the first packets, and compare their number with the frames'.

    Most interlaced streams have both fields in each packet, and need not be decoded from first to last.
    """
    if not may_hold_fields(source):
        return False
    codec = source.stream.codec_context
    source.container.seek(int(index.dts[0]), stream=source.stream)
    num_packets = num_frames = 0
    try:
        for packet in islice(read_packets(source, source.stream), NUM_PROBED_PACKETS):
            num_packets += 1
            num_frames += len(codec.decode(packet))
        num_frames += len(codec.decode(None))
    except av.FFmpegError:
        return False  # the damage costs the frames that need it, and the caller finds out whether they are chosen
    return num_frames < num_packets


def decode_in_order(
    file: str, index: PacketIndex, sampling: Sampling, *, deadline: Deadline, num_threads: int
) -> VideoFrames:
    """Decode the sampled frames of a video; for the arguments and errors, see `decode_with_pyav`."""
    with open_video(file, deadline, num_threads) as source:
        table = _frame_table(source, index)
    choice = choose_frames(table, sampling, file)
    with open_video(file, deadline, num_threads) as source:
        frames = _chosen_frames(source, index, choice.indices, sampling)
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, "pyav")


def _decode_all(source: VideoSource, index: PacketIndex) -> Iterator[av.VideoFrame]:
    """Yield the frames from the first keyframe on, in display order."""
    codec = source.stream.codec_context
    for position, packet in enumerate(read_packets(source, source.stream)):
        if position < index.keyframes[0]:
            continue
        if index.is_spliced:
            packet.pts, packet.dts = int(index.pts[position]), int(index.dts[position])
        yield from intact_frames(source, codec.decode(packet))
    yield from intact_frames(source, codec.decode(None))


def _frame_table(source: VideoSource, index: PacketIndex) -> FrameTable:
    """Decode the video and return the times of its frames."""
    stamps = [(frame.pts, frame.dts) for frame in _decode_all(source, index)]
    if not stamps:
        raise VideoError(source.file, "damaged: no frame decodes")
    interval = frame_interval(source)
    pts, dts = [pts for pts, _ in stamps], [dts for _, dts in stamps]
    times = _frame_times(pts, dts, interval) if index.has_pts else _frame_times(dts, pts, interval)
    if may_hold_fields(source) and len(times) < index.shown.sum():
        # The index has counted fields as frames, at least where they have no time stamps.
        return FrameTable(times, index.time_base, typical_duration(times, source))
    # Packets without a frame may follow the last frame, which stays on screen.
    end = int(times[0]) + round(index.table.duration_s / index.time_base)
    return FrameTable(times, index.time_base, max(end - int(times[-1]), 1))


def _frame_times(preferred: Sequence[int | None], other: Sequence[int | None], interval: Fraction) -> NDArray[np.int64]:
    """Return when the frames are shown, in units of the time base.

    Frames have the time stamps of packets, which ascend in display order if they are right. So of the two kinds, the
    one that ascends more often is taken (FFmpeg chooses likewise). A frame with an earlier time than the one before it
    replaces that one at once.

    Args:
        preferred, other: the two kinds of time stamps of the frames, in display order.
        interval: distance of two frames.
    """
    times = min((preferred, other), key=_num_faults)
    return np.maximum.accumulate(fill_times(times, interval))


def _num_faults(times: Sequence[int | None]) -> int:
    """Count the times that are missing or do not ascend."""
    known = [time for time in times if time is not None]
    return len(times) - len(known) + int((np.diff(known) <= 0).sum())


def _chosen_frames(source: VideoSource, index: PacketIndex, indices: NDArray[np.int64], sampling: Sampling) -> Tensor:
    """Decode the video and return the frames of the given numbers; uint8 [len(indices), height, width, 3]."""
    frames = None
    for number, frame in enumerate(_decode_all(source, index)):
        rows = np.flatnonzero(indices == number)
        if not len(rows):
            continue
        rgb = upright_rgb(frame)
        if frames is None:
            height, width = sampling.frame_size(len(indices), rgb.shape[0], rgb.shape[1], source.file)
            frames = torch.empty(len(indices), height, width, 3, dtype=torch.uint8)
        frames[rows.tolist()] = resize_frame(rgb, *frames.shape[1:3])
        if rows[-1] == len(indices) - 1:
            return frames
    raise VideoError(source.file, "damaged: it decodes to fewer frames than before")
