"""NVIDIA DALI: decoding on the GPU (NVDEC), or on the CPU. The only file that imports it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_index import PacketIndex, VideoSource, open_video, read_packet_index
from megatron_vcr1.data.video_pyav import quarter_turns
from megatron_vcr1.data.video_types import Deadline, Sampling, VideoError, VideoFrames, choose_frames

FRAMES_PER_RUN = 64
"""Frames decoded at a time in their original size, which bounds the memory: 400 MB at 1920x1080."""


def decode_with_dali(file: str, sampling: Sampling, *, device: str, deadline: Deadline) -> VideoFrames:
    """Decode the sampled frames with DALI.

    DALI gives no time stamps, and no error for a video that is cut short: it repeats frames or makes them black. So the
    packets are read and checked as for PyAV first; damage inside a packet only PyAV can tell.

    Args:
        file: local path or fsspec URL.
        sampling: which frames, and how large.
        device: "cpu" or "gpu"; frames stay there. On the GPU that is torch's current device.
        deadline: when to give up, looked at before decoding.

    Raises:
        VideoError: the video is missing, damaged, cut short, or of a kind that DALI does not decode.
    """
    with open_video(file, deadline) as source:
        index = read_packet_index(source)
        _check_countable(source, index)
        turns = _quarter_turns(source)
    choice = choose_frames(index.table, sampling, file)
    num_frames = len(choice.indices)
    frames = None
    for row, stored in enumerate(_decode(file, choice.indices, device, deadline)):
        upright = torch.rot90(stored, turns, (0, 1))
        if frames is None:
            height, width = sampling.frame_size(num_frames, upright.shape[0], upright.shape[1], file)
            frames = torch.empty(num_frames, height, width, 3, dtype=torch.uint8, device=upright.device)
        frames[row] = resize_frame(upright, *frames.shape[1:3])
    assert frames is not None
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, f"dali-{device}")


def _check_countable(source: VideoSource, index: PacketIndex) -> None:
    """DALI picks frames by number, so each packet must give exactly one frame, in the order of its time stamp."""
    if not source.has_pts or not index.shown.all():
        raise VideoError(source.file, "DALI counts its frames differently than its time stamps; use backend='pyav'")


def _quarter_turns(source: VideoSource) -> int:
    source.container.seek(0)
    for frame in source.container.decode(source.stream):
        return quarter_turns(frame)
    raise VideoError(source.file, "damaged: no frame decodes")


def _decode(file: str, frame_indices: NDArray[np.int64], device: str, deadline: Deadline) -> Iterator[Tensor]:
    """The frames in their original size, each uint8 [height, width, 3] on the device, valid until the next one."""
    with fsspec.open(file, "rb") as stream:
        encoded = np.frombuffer(stream.read(), dtype=np.uint8)
    pipeline = _pipeline(torch.cuda.current_device() if device == "gpu" else None)
    for start in range(0, len(frame_indices), FRAMES_PER_RUN):
        deadline.check()
        pipeline.feed_input("encoded", [encoded])
        part = frame_indices[start : start + FRAMES_PER_RUN].astype(np.int32)
        pipeline.feed_input("frame_indices", [part])
        try:
            (output,) = pipeline.run()
        except RuntimeError as error:
            _pipeline.cache_clear()  # a pipeline does not run on after an error
            raise VideoError(file, f"DALI cannot decode it ({_reason(error)})") from error
        decoded = torch.from_dlpack(output[0])
        if len(decoded) != len(part):
            raise VideoError(file, f"damaged: DALI gave {len(decoded)} of {len(part)} frames")
        yield from decoded
        if device == "gpu":
            torch.cuda.current_stream().synchronize()  # the next run takes the memory that it may still read


@lru_cache(maxsize=1)
def _pipeline(device_id: int | None) -> Any:
    """A pipeline of batch size 1, so that a bad file fails alone; device_id None is the CPU."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id, exec_async=False, exec_pipelined=False)
    def decode() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        frame_indices = fn.external_source(name="frame_indices", dtype=types.INT32, ndim=1)
        device = "cpu" if device_id is None else "mixed"
        return fn.decoders.video(encoded, frames=frame_indices, device=device, pad_mode="none")

    pipeline = decode()
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what went wrong."""
    report = str(error)
    return report.partition("encountered:")[2].strip().partition("\n")[0] or report
