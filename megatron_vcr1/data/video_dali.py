"""Decoding with NVIDIA DALI, on the GPU (NVDEC) or on the CPU. No other file imports DALI."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from megatron_vcr1.data.media_files import open_media
from megatron_vcr1.data.resize import resize_frame
from megatron_vcr1.data.video_frames import Orientation, orientation_of
from megatron_vcr1.data.video_in_order import holds_fields
from megatron_vcr1.data.video_index import PacketIndex, read_packet_index
from megatron_vcr1.data.video_open import VideoSource, open_video
from megatron_vcr1.data.video_types import Deadline, Sampling, VideoError, VideoFrames, choose_frames

FRAMES_PER_RUN = 64
"""Number of frames that are decoded at a time in their original size. It bounds the memory: 400 MB at 1920x1080."""


def decode_with_dali(file: str, sampling: Sampling, *, device: str, deadline: Deadline) -> VideoFrames:
    """Decode the sampled frames with DALI.

    DALI reports neither time stamps nor a truncated video: it repeats frames or returns black ones. Therefore the
    packets are first read and checked as for PyAV. Damage inside a packet is detected by PyAV only.

    Args:
        file: local path or fsspec URL.
        sampling: number, time range and size of the frames.
        device: "cpu" or "gpu", where the frames are decoded and stay. "gpu" is torch's current device.
        deadline: time limit, checked before each run of the pipeline.

    Raises:
        VideoError: the video is missing, damaged, truncated, or of a kind that DALI does not decode.
    """
    with open_video(file, deadline) as source:
        index = read_packet_index(source)
        _check_countable(source, index)
        orientation = _orientation(source)
    choice = choose_frames(index.table, sampling, file)
    num_frames = len(choice.indices)
    frames = None
    for row, stored in enumerate(_decode(file, choice.indices, device, deadline)):
        upright = orientation.apply(stored)
        if frames is None:
            height, width = sampling.frame_size(num_frames, upright.shape[0], upright.shape[1], file)
            frames = torch.empty(num_frames, height, width, 3, dtype=torch.uint8, device=upright.device)
        frames[row] = resize_frame(upright, *frames.shape[1:3])
    assert frames is not None
    return VideoFrames(frames, choice.timestamps_s, choice.duration_s, f"dali-{device}")


def _check_countable(source: VideoSource, index: PacketIndex) -> None:
    """Check that every packet gives one frame, in the order of the time stamps: DALI selects frames by number."""
    is_countable = source.has_pts and index.is_timed and index.shown.all() and not index.is_spliced
    if not is_countable or holds_fields(source, index):
        raise VideoError(source.file, "DALI numbers its frames differently from its time stamps; use backend='pyav'")


def _orientation(source: VideoSource) -> Orientation:
    source.container.seek(0)
    for frame in source.container.decode(source.stream):
        return orientation_of(frame)
    raise VideoError(source.file, "damaged: no frame decodes")


def _decode(file: str, frame_indices: NDArray[np.int64], device: str, deadline: Deadline) -> Iterator[Tensor]:
    """Yield frames in their original size, uint8 [height, width, 3] on the device; each is valid until the next one."""
    with open_media(file) as stream:
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
            _pipeline.cache_clear()  # a pipeline cannot be used after an error
            raise VideoError(file, f"DALI cannot decode it ({_reason(error)})") from error
        decoded = torch.from_dlpack(output[0])
        if len(decoded) != len(part):
            raise VideoError(file, f"damaged: DALI returned {len(decoded)} of {len(part)} frames")
        yield from decoded
        if device == "gpu":
            # The next run reuses the memory of these frames on a stream of DALI's own. Wait until torch's stream, which
            # resizes them asynchronously, has read them.
            torch.cuda.current_stream().synchronize()


@lru_cache(maxsize=1)
def _pipeline(device_id: int | None) -> Any:
    """Build a pipeline of batch size 1, so that a bad file fails alone; device_id None means the CPU."""

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
    """Extract the line of DALI's report that names the reason."""
    report = str(error)
    return report.partition("encountered:")[2].strip().partition("\n")[0] or report
