"""Videos as models see them: frames sampled over time, resized, with their true time stamps."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_vcr1.data.resize import MAX_FRAME_PIXELS
from megatron_vcr1.data.video_images import decode_images, images_in_folder
from megatron_vcr1.data.video_pyav import decode_with_pyav
from megatron_vcr1.data.video_types import Deadline, Sampling, VideoError, VideoFrames, VideoPath

__all__ = ["BACKENDS", "VideoError", "VideoFrames", "VideoPath", "read_frames"]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "pyav", "dali-cpu", "dali-gpu")
TIME_LIMIT_S = 120.0


def read_frames(
    path: VideoPath,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    total_pixels: int = 3584 * 28 * 28,
    min_pixels: int = 16 * 28 * 28,
    max_pixels: int = MAX_FRAME_PIXELS,
    factor: int = 28,
    start_s: float = 0.0,
    end_s: float = math.inf,
    image_fps: float = 2.0,
    backend: str = "auto",
    num_threads: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
) -> VideoFrames:
    """Decode a video's frames at `fps`, resized as Qwen2-VL and Qwen2.5-VL expect them.

    The frames are an even number, spread evenly over time from the first frame to the last; the size keeps the aspect
    ratio within the pixel budget (`max_pixels_per_frame`), its sides multiples of `factor`. A damaged video never gives
    frames: packets, time stamps and the decoder's error marks are checked first.

    Args:
        path: a file; a folder of images in the order of their names; an fsspec URL; or a list of image files, of which
            all are used, the last one twice where the count is odd.
        fps: frames sampled a second.
        min_frames, max_frames: bounds on their number; a video with fewer frames than min_frames gives what it has.
        total_pixels: budget of the video, in pixels of one temporal patch of frames.
        min_pixels, max_pixels: bounds on the area of one frame.
        factor: patch_size * merge_size of the model.
        start_s, end_s: the part of the video to look at, in seconds from its first frame; not for a list.
        image_fps: images a second, for a folder or a list.
        backend: "auto", "pyav", "dali-cpu" or "dali-gpu"; "auto" is PyAV, which reads every codec.
        num_threads: decoder threads of PyAV; 0 is one a core.
        time_limit_s: give up after this long. It is looked at between packets; `VideoReader` also ends a decoder that
            never comes back.

    Raises:
        VideoError: the video is missing, damaged, cut short or too slow; names the file and the reason.
        ValueError: an option is out of range.
    """
    if not image_fps > 0:
        raise ValueError(f"image_fps must be above 0, got {image_fps}")
    sampling = Sampling(fps, min_frames, max_frames, total_pixels, min_pixels, max_pixels, factor, start_s, end_s)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend in ("auto", "pyav"):
        decode: Callable[..., VideoFrames] = partial(decode_with_pyav, num_threads=num_threads)
    else:
        from megatron_vcr1.data.video_dali import decode_with_dali  # optional, and slow to import

        decode = partial(decode_with_dali, device=backend.removeprefix("dali-"))
    if not isinstance(path, str | os.PathLike) and (start_s, end_s) != (0.0, math.inf):
        raise ValueError("start_s and end_s choose a part of a video; leave them out for a list of images")
    try:
        if not isinstance(path, str | os.PathLike):
            files = [os.fspath(file) for file in path]
            deadline = Deadline(files, time_limit_s)
            return decode_images(files, sampling, image_fps, sample=False, deadline=deadline)
        file = os.fspath(path)
        deadline = Deadline(file, time_limit_s)
        if "://" not in file and Path(file).is_dir():
            return decode_images(images_in_folder(Path(file)), sampling, image_fps, sample=True, deadline=deadline)
        return decode(file, sampling, deadline=deadline)
    except VideoError:
        raise
    except Exception as error:  # whatever a library makes of a file costs the video, not the run
        logger.warning("%s: an error that no damage is known to cause", path, exc_info=True)
        raise VideoError(path, f"cannot be read ({type(error).__name__}: {error})") from error
