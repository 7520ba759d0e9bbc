"""FFmpeg on the CPU through PyAV: only the packets that the chosen frames need are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_index import PacketIndex, VideoSource, open_video, read_packet_index, read_packets
from megatron_vcr1.data.video_types import Deadline, Sampling, VideoError, VideoFrames, choose_frames

NONREF_SKIPPING_CODECS = ("h264",)
"""Codecs in which no frame refers to a non-reference frame, so that decoding may leave it out. In HEVC, a higher
temporal layer may."""


@dataclass(frozen=True)
class DecodeRun:
    """Consecutive packets, from a keyframe to the last wanted frame behind it."""

    start: int
    """Position of the keyframe in decoding order."""
    stop: int
    """One past the position of the last packet to decode."""


def decode_with_pyav(file: str, sampling: Sampling, *, deadline: Deadline, num_threads: int = 0) -> VideoFrames:
    """Decode the sampled frames of a video.

    Args:
        file: local path or fsspec URL.
        sampling: which frames, and how large.
        deadline: when to give up.
        num_threads: decoder threads; 0 is one a core.

    Raises:
        VideoError: the video is missing, damaged, cut short, without time stamps, or took too long.
    """
    with open_video(file, deadline, num_threads) as source:
        index = read_packet_index(source)
        table = index.table
        choice = choose_frames(table, sampling, file)
        wanted_pts = table.pts[choice.indices]
        whole = [DecodeRun(0, len(index.pts))]
        runs = plan_runs(index, wanted_pts) if source.has_pts else whole
        try:
            frames = _decode_runs(source, index, runs, wanted_pts, sampling)
        except (VideoError, av.FFmpegError):
            if len(runs) == 1 and runs[0].start == 0:
                raise
            # Some streams mark frames as keyframes that need earlier ones (gradual refresh). Read from the start,
            # they are whole; a damaged file fails again.
            frames = _decode_runs(source, index, whole, wanted_pts, sampling)
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, "pyav")


def plan_runs(index: PacketIndex, wanted_pts: NDArray[np.int64]) -> list[DecodeRun]:
    """The packets to decode: from the last keyframe at or before each wanted frame, in decoding and display order.

    A frame that is shown before the keyframe that it follows in the file (open GOP) may refer to the GOP before, so
    it is decoded from there. Runs that touch are one.
    """
    position_of = {int(pts): position for position, pts in enumerate(index.pts)}
    spans = set()
    for pts in np.unique(wanted_pts):
        position = position_of[int(pts)]
        usable = index.keyframes[(index.keyframes <= position) & (index.pts[index.keyframes] <= pts)]
        spans.add((int(usable[-1]) if len(usable) else 0, position + 1))
    runs: list[DecodeRun] = []
    for start, stop in sorted(spans):
        if runs and start <= runs[-1].stop:
            runs[-1] = DecodeRun(runs[-1].start, max(runs[-1].stop, stop))
        else:
            runs.append(DecodeRun(start, stop))
    return runs


def _decode_runs(
    source: VideoSource,
    index: PacketIndex,
    runs: Sequence[DecodeRun],
    wanted_pts: NDArray[np.int64],
    sampling: Sampling,
) -> Tensor:
    """Decode, turn upright and resize the wanted frames: uint8 [len(wanted_pts), height, width, 3]."""
    rows_of: dict[int, list[int]] = {}
    for row, pts in enumerate(wanted_pts):
        rows_of.setdefault(int(pts), []).append(row)
    frames = None
    for run in runs:
        for pts, frame in _with_pts(source, index, _decode_run(source, index, run, rows_of)):
            if pts is None or pts not in rows_of:
                continue
            rgb = upright_rgb(frame)
            if frames is None:
                height, width = sampling.frame_size(len(wanted_pts), rgb.shape[0], rgb.shape[1], source.file)
                frames = torch.empty(len(wanted_pts), height, width, 3, dtype=torch.uint8)
            frames[rows_of.pop(pts)] = resize_frame(rgb, *frames.shape[1:3])
            if not rows_of:
                return frames
    raise VideoError(source.file, f"damaged: {len(rows_of)} of the chosen frames did not decode")


def _with_pts(
    source: VideoSource, index: PacketIndex, frames: Iterable[av.VideoFrame]
) -> Iterable[tuple[int | None, av.VideoFrame]]:
    """Frames with their time stamps; made-up ones are dealt out in the order of display."""
    if source.has_pts:
        return ((frame.pts, frame) for frame in frames)
    return zip(index.table.pts.tolist(), frames, strict=False)


def _decode_run(
    source: VideoSource, index: PacketIndex, run: DecodeRun, wanted_pts: dict[int, list[int]]
) -> Iterator[av.VideoFrame]:
    """The frames of a run's packets, in the order of display, without those that nothing needs."""
    codec = source.stream.codec_context
    leave_out = codec.name in NONREF_SKIPPING_CODECS and source.has_pts
    start_pts = index.pts[run.start]
    for packet in _packets_of_run(source, index, run):
        if run.start > 0 and packet.pts < start_pts:
            continue  # refers to the GOP before, which this run does not decode
        if leave_out:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted_pts else "NONREF"
        yield from _whole_frames(source, codec.decode(packet))
    yield from _whole_frames(source, codec.decode(None))


def _packets_of_run(source: VideoSource, index: PacketIndex, run: DecodeRun) -> Iterator[av.Packet]:
    source.container.seek(int(index.dts[run.start]), stream=source.stream)
    position = None
    for packet in read_packets(source, source.stream):
        if position is None and packet.pts == index.pts[run.start]:
            position = run.start
        if position is None:
            continue  # seeking may land on an earlier keyframe
        yield packet
        position += 1
        if position == run.stop:
            return
    raise VideoError(source.file, "damaged: seeking does not find what reading found")


def _whole_frames(source: VideoSource, frames: Sequence[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in frames:
        if frame.is_corrupt:  # every frame that is decoded counts: a later one may refer to it
            raise VideoError(source.file, f"damaged: the frame at {frame.time:.2f} s did not decode cleanly")
        yield frame


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counterclockwise quarter turns that set the frame upright."""
    return round(frame.rotation / 90) % 4


def upright_rgb(frame: av.VideoFrame) -> Tensor:
    """The frame as it is meant to be seen, uint8 [height, width, 3]."""
    rgb = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))  # one frame is too little work to share
    return torch.rot90(rgb, quarter_turns(frame), (0, 1))
