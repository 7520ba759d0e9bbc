"""Reading a video's packets without decoding them, and checking them against the container's header."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.data.video_open import VideoSource
from megatron_vcr1.data.video_types import FrameTable, VideoError

BROADCAST_CONTAINERS = ("mpegts", "mpeg")
"""Containers that may start anywhere in a stream, before its next keyframe. Their headers store no duration, and their
clock may jump where recordings were joined."""
CONTAINERS_WITHOUT_DURATION = (*BROADCAST_CONTAINERS, "ivf")
"""Containers whose duration, as FFmpeg reports it, is not the length of an intact file. The header of IVF counts
frames, and FFmpeg takes their number for a time. For broadcast streams it is an estimate that ignores clocks that wrap
or jump."""
SPLICE_GAP_S = 10.0
"""Jump of the decoding time stamps from which FFmpeg assumes another clock (its option dts_delta_threshold)."""
SPLICE_STEP_BACK_S = 0.1
"""Time by which the decoding time stamps must step back to be taken for another clock."""
DURATION_SLACK_S = 0.1
"""Largest difference, in addition to one frame, between the end of an intact file's last packet and its header."""
MAX_DURATION_S = 1e6
"""Longest accepted video, 11 days. A longer time between time stamps means that they are damaged."""


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream in decoding order, without their data."""

    pts: NDArray[np.int64]
    """[num_packets] presentation time stamp of the packet's frame, in units of time_base."""
    dts: NDArray[np.int64]
    """[num_packets] decoding time stamp, which seeking uses."""
    is_spliced: bool
    """Whether the clock of the stream jumps. Then `pts` and `dts` are continuous, and differ from the stored ones."""
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
    has_pts: bool
    """Whether the container stores presentation time stamps."""
    is_timed: bool
    """Whether each packet has the time stamp of its own frame. If not, `pts` is a guess in places, and only decoding
    tells when the frames are shown (`video_in_order`)."""

    @property
    def table(self) -> FrameTable:
        """The displayed frames in display order."""
        # In a container without presentation time stamps, FFmpeg may give a packet the decoding time of the next one as
        # its pts, which is wrong where the distance of the frames varies. Frames are shown at the decoding times.
        times = self.pts if self.has_pts else self.dts
        return FrameTable(np.sort(times[self.shown]), self.time_base, self.last_duration)


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
        VideoError: packets are missing or damaged.
    """
    packets, end_s = _demux_all(source)
    if not packets:
        raise VideoError(source.file, "no video packets")
    splices = _find_splices(packets, source)
    # At a splice, the counters of the transport stream jump, too, so FFmpeg marks a packet before it as damaged.
    whole = {position - before for position in splices for before in range(3)}
    if any(packet.is_corrupt for position, packet in enumerate(packets) if position not in whole):
        raise VideoError(source.file, "a packet is damaged or truncated")
    index = _index_packets(packets, splices, source)
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


def _find_splices(packets: Sequence[_PacketInfo], source: VideoSource) -> dict[int, int]:
    """Find where the clock of a broadcast stream jumps: recordings that were joined, or a clock that was reset.

    FFmpeg's rule: the clock jumps if the decoding time steps back, or is more than 10 s from where it was expected. The
    first packet after a jump is taken to follow the one before it at once.

    Returns:
        Position of the first packet after each jump, and the units of time to add to the time stamps from there on, in
        addition to those of earlier jumps.
    """
    if source.container.format.name not in BROADCAST_CONTAINERS:
        return {}
    dts = _decoding_times(packets, source)
    step = max(int(np.median(np.diff(dts))), 1) if len(dts) > 1 else 1
    splices = {}
    for position in range(1, len(packets)):
        gap = int(dts[position] - dts[position - 1])
        unexpected = gap - (packets[position - 1].duration or step)
        if abs(unexpected) * source.time_base > SPLICE_GAP_S or gap * source.time_base < -SPLICE_STEP_BACK_S:
            splices[position] = -unexpected
    return splices


def _decoding_times(packets: Sequence[_PacketInfo], source: VideoSource) -> NDArray[np.int64]:
    times = [packet.pts if packet.dts is None else packet.dts for packet in packets]
    return fill_times(times, frame_interval(source))


def frame_interval(source: VideoSource) -> Fraction:
    """Return the distance of two frames at the stream's frame rate, in units of its time base; 25 fps if unknown.

    The guessed rate comes first: for a raw stream (H.264 without a container), it is the rate that the stream states,
    and the average rate is FFmpeg's default.
    """
    rate = source.stream.guessed_rate or source.stream.average_rate or Fraction(25)
    return 1 / (Fraction(rate.numerator, rate.denominator) * source.time_base)


def fill_times(times: Sequence[int | None], interval: Fraction) -> NDArray[np.int64]:
    """Fill in missing times, counting on from the last known one, or from 0, by the interval of the frames."""
    filled: list[int] = []
    known, missing = 0, -1
    for time in times:
        known, missing = (known, missing + 1) if time is None else (time, 0)
        filled.append(known + round(max(missing, 0) * interval))
    return np.array(filled, dtype=np.int64)


def _index_packets(packets: Sequence[_PacketInfo], splices: dict[int, int], source: VideoSource) -> PacketIndex:
    times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    pts = fill_times(times, frame_interval(source))
    dts = _decoding_times(packets, source)
    if splices:
        # FFmpeg gives the last frames before a splice the time stamp after it. They are shown as late as frames usually
        # are after they are decoded.
        delays = pts - dts
        is_wrong = np.abs(delays) * float(source.time_base) > SPLICE_GAP_S
        pts[is_wrong] = dts[is_wrong] + delays[~is_wrong].max(initial=0)
    for position, offset in splices.items():
        pts[position:] += offset
        dts[position:] += offset
    is_keyframe = np.array([packet.is_keyframe for packet in packets])
    shown = np.array([not (packet.is_discard or packet.is_invisible) for packet in packets])
    keyframes = np.flatnonzero(is_keyframe)
    if len(keyframes) == 0:
        keyframes = np.zeros(1, dtype=np.int64)
    shown &= pts >= pts[keyframes[0]]
    last_duration = packets[int(np.argmax(np.where(shown, pts, pts.min())))].duration
    if last_duration <= 0:
        last_duration = typical_duration(np.sort(pts[shown]), source)
    smallest_packet = min(packet.size for packet in packets)
    is_timed = all(packet.pts is not None for packet in packets) and _times_fit_order(source, pts, shown)
    return PacketIndex(
        pts,
        dts,
        bool(splices),
        keyframes,
        shown,
        source.time_base,
        last_duration,
        smallest_packet,
        source.has_pts,
        is_timed,
    )


def _times_fit_order(source: VideoSource, pts: NDArray[np.int64], shown: NDArray[np.bool_]) -> bool:
    """Return whether the packets' time stamps can be those of their own frames.

    They cannot if two frames have the same one, or if the decoder reorders the frames but the time stamps ascend in
    decoding order. Then they are decoding times under another name, as in Matroska files of the kind V_MS/VFW/FOURCC,
    in ASF and after some muxers.
    """
    if not source.has_pts:
        return True  # the frames of such a container are counted
    if len(np.unique(pts[shown])) < shown.sum():
        return False
    return not source.stream.codec_context.has_b_frames or len(pts) < 3 or bool((np.diff(pts) < 0).any())


def typical_duration(sorted_pts: NDArray[np.int64], source: VideoSource) -> int:
    """Estimate a frame's duration for packets that carry none, in units of the time base.

    It is the median distance of the frames, or follows from the stream's frame rate if there is a single frame.
    """
    if len(sorted_pts) > 1:
        return int(np.median(np.diff(sorted_pts)))
    return max(round(frame_interval(source)), 1)


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
    if container.duration is None or container.format.name in CONTAINERS_WITHOUT_DURATION:
        return
    length_s = container.duration / av.time_base
    if container.format.name == "avi":
        # FFmpeg estimates the duration of a truncated AVI file from what is left; the header counts the frames.
        length_s = max(length_s, float(stream.frames * index.time_base))
    slack_s = DURATION_SLACK_S + float(index.last_duration * index.time_base)
    if end_s < length_s - slack_s:
        raise VideoError(source.file, f"truncated: ends at {end_s:.2f} s of {length_s:.2f} s")
    # The decoding time: some muxers leave the last frame's time out of the length if it is held for long before it
    # (its packet then is decoded seconds before the frame is shown). Packets after the end of a trimmed video, which an
    # edit list hides, do not count.
    last_s = float(index.dts[index.shown].max() * index.time_base)
    last_expected_s = length_s + (container.start_time or 0) / av.time_base
    if last_s > last_expected_s + slack_s:
        raise VideoError(source.file, f"damaged time stamps: {last_s:.2f} s in a video of {last_expected_s:.2f} s")
