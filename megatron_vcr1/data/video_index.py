"""Opening a video, reading its packets without decoding them, and checking them against the container's header."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import fsspec
import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.data.video_types import Deadline, FrameTable, VideoError

PLAYLIST_FORMATS = frozenset({"hls", "dash", "concat", "concatf"})
"""FFmpeg formats that are lists of other files. They are refused: a data set must not make us open other files."""
CONTAINERS_WITHOUT_PTS = ("avi",)
"""Containers that store no presentation time stamps. FFmpeg derives them from the decoding order, which is wrong if the
stream has B-frames. Only the order in which the decoder returns the frames is right."""
BROADCAST_CONTAINERS = ("mpegts", "mpeg")
"""Containers that may start anywhere in a stream, before its next keyframe."""
STRICT_ERROR_DETECTION = "crccheck+bitstream+buffer+explode"
"""FFmpeg's err_detect flags: decoders check all that they can, and fail instead of concealing errors."""
DURATION_SLACK_S = 0.1
"""Largest difference, in addition to one frame, between the end of an intact file's last packet and its header."""
MAX_DURATION_S = 1e6
"""Longest accepted video, 11 days. A longer time between time stamps means that they are damaged."""

# PyAV before 19 decodes metadata strictly by default, so that a title in another encoding than UTF-8 would make a video
# unreadable. PyAV 19 removed the argument: it never fails on metadata.
_METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True)
class VideoSource:
    """An open video."""

    file: str
    container: av.container.InputContainer
    stream: av.VideoStream
    time_base: Fraction
    """Seconds per unit of the stream's time stamps."""
    deadline: Deadline

    @property
    def has_pts(self) -> bool:
        """Whether packets carry the presentation time stamps of their own frames."""
        return self.container.format.name not in CONTAINERS_WITHOUT_PTS

    @property
    def has_packet_table(self) -> bool:
        """Whether the container's header lists every packet, as MP4 and QuickTime do."""
        return self.container.format.name.startswith("mov")


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream in decoding order, without their data."""

    pts: NDArray[np.int64]
    """[num_packets] presentation time stamp of the packet's frame, in units of time_base."""
    dts: NDArray[np.int64]
    """[num_packets] decoding time stamp, which seeking uses."""
    keyframes: NDArray[np.int64]
    """Positions of the keyframes among the packets; decoding can start at the first of them."""
    shown: NDArray[np.bool_]
    """[num_packets] whether the packet's frame is displayed. It is not if an edit list hides it, if it needs packets
    from before the first keyframe, or if the packet only updates the decoder's state."""
    time_base: Fraction
    """Seconds per unit."""
    last_duration: int
    """Time for which the last displayed frame is shown, in units of time_base."""
    smallest_packet: int
    """Size of the smallest packet in bytes."""

    @property
    def table(self) -> FrameTable:
        """The displayed frames in display order."""
        return FrameTable(np.sort(self.pts[self.shown]), self.time_base, self.last_duration)


@contextmanager
def open_video(file: str, deadline: Deadline, num_threads: int = 0) -> Iterator[VideoSource]:
    """Open a video's main stream; errors of FFmpeg and of the file system inside the with-block become VideoErrors."""
    try:
        with _open_container(file, deadline) as container:
            if PLAYLIST_FORMATS & set(container.format.name.split(",")):
                raise VideoError(file, "this is a playlist, which may name any other file; give the video itself")
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise VideoError(file, "no video stream")
            # An unknown time base is None before PyAV 19, and a false value of its own rational type since then.
            if stream.codec_context is None or not stream.time_base:
                raise VideoError(file, "damaged, or encoded with a codec that FFmpeg does not decode")
            # FRAME threads, where the codec has them. SLICE threads lose the decoder's flags on damaged frames.
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = num_threads
            stream.codec_context.options = {"err_detect": STRICT_ERROR_DETECTION}
            time_base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
            yield VideoSource(file, container, stream, time_base, deadline)
    except FileNotFoundError as error:
        raise VideoError(file, "no such file") from error
    except OSError as error:
        raise VideoError(file, f"cannot be read ({error.strerror or error})") from error
    except av.FFmpegError as error:
        deadline.check()  # FFmpeg reports a read that ran out of time as an ordinary error
        raise VideoError(file, f"damaged, or not a video ({error.strerror})") from error


@contextmanager
def _open_container(file: str, deadline: Deadline) -> Iterator[av.container.InputContainer]:
    timeout_s = deadline.remaining_s
    if "://" not in file:
        if os.path.isfile(file) and os.path.getsize(file) == 0:
            raise VideoError(file, "the file is empty")
        # The prefix keeps FFmpeg from reading a protocol into a file name with a colon.
        with av.open(f"file:{file}", "r", timeout=timeout_s, **_METADATA_OPTIONS) as container:
            yield container
    else:
        with (
            fsspec.open(file, "rb") as stream,
            av.open(stream, "r", timeout=timeout_s, **_METADATA_OPTIONS) as container,
        ):
            yield container


def read_packets(source: VideoSource, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the packets that hold data, from the container's current position to its end.

    Args:
        source: an open video.
        streams: streams to read; none means all.

    Raises:
        VideoError: the time limit is exceeded.
    """
    for packet in source.container.demux(*streams):
        source.deadline.check()
        if packet.size:
            yield packet
        elif packet.dts is None:
            # An empty packet without a time stamp marks the end. Stop here: PyAV would go on with flush packets of
            # streams that began after the file was opened, and fail because it does not know them.
            return


def read_packet_index(source: VideoSource) -> PacketIndex:
    """Read every packet without decoding it, and check the packets against the container's header.

    Raises:
        VideoError: packets are missing, damaged or without time stamps.
    """
    packets, end_s = _demux_all(source)
    if not packets:
        raise VideoError(source.file, "no video packets")
    if any(packet.is_corrupt for packet in packets):
        raise VideoError(source.file, "a packet is damaged or truncated")
    if any(packet.pts is None for packet in packets):
        raise VideoError(source.file, "packets without time stamps; remux the video, e.g. to MP4 or Matroska")
    index = _index_packets(packets, source)
    _check_against_header(source, index, end_s)
    return index


@dataclass(frozen=True, slots=True)
class _PacketInfo:
    """The properties of a packet that are kept; its data is freed."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_keyframe: bool
    is_discard: bool
    is_corrupt: bool
    is_invisible: bool


def _demux_all(source: VideoSource) -> tuple[list[_PacketInfo], float]:
    """Return the video stream's packets, and the end of the last packet of any stream in seconds."""
    codec = source.stream.codec_context.name
    packets = []
    end_s = 0.0
    for packet in read_packets(source):
        if packet.pts is not None and packet.time_base:
            time_base = Fraction(packet.time_base.numerator, packet.time_base.denominator)
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * time_base))
        if packet.stream_index == source.stream.index:
            info = _PacketInfo(
                pts=packet.pts,
                dts=packet.dts,
                duration=packet.duration or 0,
                size=packet.size or 0,
                is_keyframe=packet.is_keyframe,
                is_discard=packet.is_discard,
                is_corrupt=packet.is_corrupt,
                is_invisible=codec == "vp8" and _is_invisible_vp8(packet),
            )
            packets.append(info)
    return packets, end_s


def _is_invisible_vp8(packet: av.Packet) -> bool:
    """Return whether a VP8 packet holds an alternate reference frame, which is decoded but never displayed.

    Bit 4 of the frame tag is show_frame (RFC 6386, section 9.1).
    """
    return not memoryview(packet)[0] & 0x10


def _index_packets(packets: Sequence[_PacketInfo], source: VideoSource) -> PacketIndex:
    pts = np.array([packet.pts for packet in packets], dtype=np.int64)
    dts = np.array([packet.pts if packet.dts is None else packet.dts for packet in packets], dtype=np.int64)
    is_keyframe = np.array([packet.is_keyframe for packet in packets])
    shown = np.array([not (packet.is_discard or packet.is_invisible) for packet in packets])
    keyframes = np.flatnonzero(is_keyframe)
    if len(keyframes) == 0:
        keyframes = np.zeros(1, dtype=np.int64)
    shown &= pts >= pts[keyframes[0]]
    last_duration = packets[int(np.argmax(np.where(shown, pts, pts.min())))].duration
    if last_duration <= 0:
        last_duration = _typical_duration(np.sort(pts[shown]), source)
    smallest_packet = min(packet.size for packet in packets)
    return PacketIndex(pts, dts, keyframes, shown, source.time_base, last_duration, smallest_packet)


def _typical_duration(sorted_pts: NDArray[np.int64], source: VideoSource) -> int:
    """Estimate a frame's duration for packets that carry none, in units of the time base.

    It is the median distance of the frames, or follows from the stream's frame rate if there is a single frame.
    """
    if len(sorted_pts) > 1:
        return int(np.median(np.diff(sorted_pts)))
    rate = source.stream.average_rate or source.stream.guessed_rate or Fraction(25)
    return max(round(1 / (Fraction(rate.numerator, rate.denominator) * source.time_base)), 1)


def _check_against_header(source: VideoSource, index: PacketIndex, end_s: float) -> None:
    """Compare the packets with the container's own packet table and duration; end_s is the end of its last packet."""
    container, stream = source.container, source.stream
    if source.has_packet_table:
        # index_entries excludes what an edit list cuts off; the header's frame count includes it.
        listed = len(stream.index_entries) if container.duration else stream.frames
        if len(index.pts) < listed:
            raise VideoError(source.file, f"truncated: {len(index.pts)} of {listed} frames")
    if index.keyframes[0] > 0 and container.format.name not in BROADCAST_CONTAINERS:
        raise VideoError(source.file, "damaged: its first frame is not a keyframe")
    if not index.shown.any():
        raise VideoError(source.file, "no frame is displayed; its edit list may hide them all")
    if index.table.duration_s > MAX_DURATION_S:
        raise VideoError(source.file, f"damaged time stamps: {index.table.duration_s:.3g} s from first to last")
    if container.duration is None:
        return
    length_s = container.duration / av.time_base
    if container.format.name == "avi":
        # FFmpeg estimates the duration of a truncated AVI file from what is left; the header counts the frames.
        length_s = max(length_s, float(stream.frames * index.time_base))
    slack_s = DURATION_SLACK_S + float(index.last_duration * index.time_base)
    if end_s < length_s - slack_s:
        raise VideoError(source.file, f"truncated: ends at {end_s:.2f} s of {length_s:.2f} s")
    last_s = float(index.pts[index.shown].max() * index.time_base)
    last_expected_s = length_s + (container.start_time or 0) / av.time_base
    if last_s > last_expected_s + slack_s:
        raise VideoError(source.file, f"damaged time stamps: {last_s:.2f} s in a video of {last_expected_s:.2f} s")
