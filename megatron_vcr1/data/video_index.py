"""A video's packets: opened, read without decoding, and checked against what the container promises."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import av
import fsspec
import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.data.video_types import Deadline, FrameTable, VideoError

# Formats of FFmpeg that are lists of other files.
_PLAYLISTS = frozenset({"hls", "dash", "concat", "concatf"})

CONTAINERS_WITHOUT_PTS = ("avi",)
"""Containers that store no presentation times: FFmpeg makes them up from the order of decoding, so that with B-frames
they fit no frame. Only the order in which the decoder gives the frames is right."""
BROADCAST_CONTAINERS = ("mpegts", "mpeg")
"""Containers that may begin anywhere in a stream, before its next keyframe."""
STRICT = "crccheck+bitstream+buffer+explode"
"""Decoders check what they can, and fail rather than conceal."""
DURATION_SLACK_S = 0.1
"""How far, beside one frame, the last packet of a whole file may end from where the header says."""
LONGEST_S = 1e6
"""Eleven days. Time stamps that are further apart are damaged, and sampling could not compute with them."""


@dataclass(frozen=True)
class VideoSource:
    """An open video and how long it may take."""

    file: str
    container: av.container.InputContainer
    stream: av.VideoStream
    time_base: Fraction
    """Seconds a unit of the stream's time stamps."""
    deadline: Deadline

    @property
    def has_pts(self) -> bool:
        """Whether packets carry the times of their own frames."""
        return self.container.format.name not in CONTAINERS_WITHOUT_PTS

    @property
    def has_table(self) -> bool:
        """Whether the container lists every packet, as MP4 and QuickTime do."""
        return self.container.format.name.startswith("mov")


@dataclass(frozen=True)
class PacketIndex:
    """A video stream's packets in decoding order, read without decoding them."""

    pts: NDArray[np.int64]
    """[num_packets] when the packet's frame is shown, in units of time_base."""
    dts: NDArray[np.int64]
    """[num_packets] when it is decoded, which is what seeking goes by."""
    keyframes: NDArray[np.int64]
    """Positions of the keyframes among the packets; the first is where decoding can begin."""
    shown: NDArray[np.bool_]
    """[num_packets] False where an edit list hides the frame, or it needs packets from before the first keyframe."""
    time_base: Fraction
    """Seconds a unit."""
    last_duration: int
    """How long the last shown frame stays, in units of time_base."""

    @property
    def table(self) -> FrameTable:
        """The shown frames in the order of display."""
        return FrameTable(np.sort(self.pts[self.shown]), self.time_base, self.last_duration)


@contextmanager
def open_video(file: str, deadline: Deadline, num_threads: int = 0) -> Iterator[VideoSource]:
    """Open a video's main stream; FFmpeg's and the file system's errors inside the block become VideoErrors."""
    try:
        with _open_container(file, deadline) as container:
            if _PLAYLISTS & set(container.format.name.split(",")):
                raise VideoError(file, "a playlist, which may name any other file, not a video")
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise VideoError(file, "no video stream")
            if stream.codec_context is None or stream.time_base is None:
                raise VideoError(file, "damaged, or of a codec that FFmpeg does not decode")
            stream.thread_type = "AUTO"  # not SLICE, which loses the decoder's marks on damaged frames
            stream.codec_context.thread_count = num_threads
            stream.codec_context.options = {"err_detect": STRICT}
            yield VideoSource(file, container, stream, stream.time_base, deadline)
    except FileNotFoundError as error:
        raise VideoError(file, "no such file") from error
    except OSError as error:
        raise VideoError(file, f"cannot be read ({error.strerror or error})") from error
    except av.FFmpegError as error:
        deadline.check()  # FFmpeg reports an interrupted read as an ordinary error
        raise VideoError(file, f"damaged, or not a video ({error.strerror})") from error


@contextmanager
def _open_container(file: str, deadline: Deadline) -> Iterator[av.container.InputContainer]:
    timeout_s = deadline.remaining_s
    if "://" not in file:
        if os.path.isfile(file) and os.path.getsize(file) == 0:
            raise VideoError(file, "the file is empty")
        with av.open(f"file:{file}", "r", metadata_errors="ignore", timeout=timeout_s) as container:
            yield container
    else:
        with (
            fsspec.open(file, "rb") as stream,
            av.open(stream, "r", metadata_errors="ignore", timeout=timeout_s) as container,
        ):
            yield container


def read_packets(source: VideoSource, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of some streams, or of all, that hold data, from where the container stands to its end.

    Raises:
        VideoError: it takes too long.
    """
    for packet in source.container.demux(*streams):
        source.deadline.check()
        if packet.size:
            yield packet
        elif packet.dts is None:
            return  # the end; PyAV goes on with streams that began after its start, and fails for not knowing them


def read_packet_index(source: VideoSource) -> PacketIndex:
    """Read every packet without decoding, and check it against what the container promises.

    Raises:
        VideoError: packets are missing, damaged or without time stamps.
    """
    packets, end_s = _demux_all(source)
    if not packets:
        raise VideoError(source.file, "no video packets")
    if any(packet.is_corrupt for packet in packets):
        raise VideoError(source.file, "a packet is damaged or cut short")
    if any(packet.pts is None for packet in packets):
        raise VideoError(source.file, "packets without time stamps; remux it, e.g. to MP4 or Matroska")
    index = _index_packets(packets, source)
    _check_promises(source, index, end_s)
    return index


@dataclass(frozen=True, slots=True)
class _PacketInfo:
    """What is kept of a packet; its data is not."""

    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool
    is_corrupt: bool


def _demux_all(source: VideoSource) -> tuple[list[_PacketInfo], float]:
    """The video stream's packets, and when the last packet of any stream ends, in seconds."""
    packets = []
    end_s = 0.0
    for packet in read_packets(source):
        if packet.pts is not None and packet.time_base is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == source.stream.index:
            info = _PacketInfo(
                pts=packet.pts,
                dts=packet.dts,
                duration=packet.duration or 0,
                is_keyframe=packet.is_keyframe,
                is_discard=packet.is_discard,
                is_corrupt=packet.is_corrupt,
            )
            packets.append(info)
    return packets, end_s


def _index_packets(packets: Sequence[_PacketInfo], source: VideoSource) -> PacketIndex:
    pts = np.array([packet.pts for packet in packets], dtype=np.int64)
    dts = np.array([packet.pts if packet.dts is None else packet.dts for packet in packets], dtype=np.int64)
    is_keyframe = np.array([packet.is_keyframe for packet in packets])
    shown = np.array([not packet.is_discard for packet in packets])
    keyframes = np.flatnonzero(is_keyframe)
    if len(keyframes) == 0:
        keyframes = np.zeros(1, dtype=np.int64)
    shown &= pts >= pts[keyframes[0]]
    last_duration = packets[int(np.argmax(np.where(shown, pts, pts.min())))].duration
    if last_duration <= 0:
        last_duration = _typical_duration(np.sort(pts[shown]), source)
    return PacketIndex(pts, dts, keyframes, shown, source.time_base, last_duration)


def _typical_duration(sorted_pts: NDArray[np.int64], source: VideoSource) -> int:
    """A frame's duration where the packets tell none: the median distance, or the stream's rate for a single frame."""
    if len(sorted_pts) > 1:
        return int(np.median(np.diff(sorted_pts)))
    rate = source.stream.average_rate or source.stream.guessed_rate or Fraction(25)
    return max(round(1 / (rate * source.time_base)), 1)


def _check_promises(source: VideoSource, index: PacketIndex, end_s: float) -> None:
    """Compare what was read with the container's own table and length; end_s is where its last packet ends."""
    container, stream = source.container, source.stream
    if source.has_table:
        # The table is without what an edit list cuts off, which the header's count is with.
        listed = len(stream.index_entries) if container.duration else stream.frames
        if len(index.pts) < listed:
            raise VideoError(source.file, f"cut short: {len(index.pts)} of {listed} frames")
    if index.keyframes[0] > 0 and container.format.name not in BROADCAST_CONTAINERS:
        raise VideoError(source.file, "damaged: its first frame is no keyframe")
    if not index.shown.any():
        raise VideoError(source.file, "its edit list shows no frame")
    if index.table.duration_s > LONGEST_S:
        raise VideoError(source.file, f"damaged time stamps: {index.table.duration_s:.3g} s from first to last")
    if container.duration is None:
        return
    length_s = container.duration / av.time_base
    if container.format.name == "avi":  # FFmpeg guesses the duration of a cut one; its header counts the ticks
        length_s = max(length_s, float(stream.frames * index.time_base))
    slack_s = DURATION_SLACK_S + float(index.last_duration * index.time_base)
    if end_s < length_s - slack_s:
        raise VideoError(source.file, f"cut short: ends at {end_s:.2f} s of {length_s:.2f} s")
    last_s = float(index.pts[index.shown].max() * index.time_base)
    last_promised_s = length_s + (container.start_time or 0) / av.time_base
    if last_s > last_promised_s + slack_s:
        raise VideoError(source.file, f"damaged time stamps: {last_s:.2f} s in a video of {last_promised_s:.2f} s")
