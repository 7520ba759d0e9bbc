"""Video reading: frames are sampled over time and resized for the model; each has its time stamp.

`read_frames` dispatches to a backend: `video_pyav` (with `video_in_order` and `video_webp` for the files that need
them), `video_dali` or `video_images`. All share the choice of frames in `video_types`; the decoders share the checks of
a file's packets in `video_index`. `video_process` runs `read_frames` in a subprocess.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_vcr1.data.frame_rules import PER_FRAME_RULES, FrameRules, PixelOptions
from megatron_vcr1.data.video_images import decode_images, images_in_folder
from megatron_vcr1.data.video_pyav import decode_with_pyav
from megatron_vcr1.data.video_types import (
    OUT_OF_MEMORY,
    PROGRAMMING_ERRORS,
    Deadline,
    OptionError,
    Sampling,
    VideoError,
    VideoFrames,
    VideoPath,
)

__all__ = ["BACKENDS", "VideoError", "VideoFrames", "VideoPath", "read_frames"]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "pyav", "dali-cpu", "dali-gpu")
TIME_LIMIT_S = 120.0
"""Default time limit for one video, in seconds."""


def read_frames(
    path: VideoPath,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    total_pixels: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    factor: int = 28,
    rules: FrameRules = PER_FRAME_RULES,
    start_s: float = 0.0,
    end_s: float = math.inf,
    image_fps: float = 2.0,
    backend: str = "auto",
    num_threads: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
) -> VideoFrames:
    """Decode a video's frames at `fps` and resize them as a model expects, by default Qwen2-VL and Qwen2.5-VL.

    The frames are spread evenly over the video, from its first frame to its last; their number is even unless the rules
    say otherwise. Resizing keeps the aspect ratio within the pixel budget and makes both sides multiples of `factor`.
    Packets, time stamps and the decoder's error flags are checked before any frame is returned, so that a damaged video
    raises an error instead of giving wrong frames.

    Args:
        path: a video file, a folder of images (read in the order of their names), an fsspec URL, or a list of image
            files. All images of a list are used; if their number is odd and must be even, the last one is used twice.
        fps: frames sampled per second of video.
        min_frames, max_frames: bounds on the number of frames. A video that has fewer than min_frames gives all of
            its frames.
        total_pixels: pixel budget of the video, counted over one frame of each temporal patch. None: the rules' budget,
            which is 3584 * 28 * 28 by default.
        min_pixels, max_pixels: bounds on the number of pixels of one frame. None: the rules' bounds, which are
            16 * 28 * 28 and 768 * 28 * 28 by default.
        factor: patch_size * merge_size of the model.
        rules: the model's rules for the number and the size of the frames (`PromptProcessor.frame_rules`).
        start_s, end_s: the clip to read, in seconds from the video's first frame. Not allowed for a list of images.
        image_fps: images per second, for a folder or a list of images.
        backend: "auto", "pyav", "dali-cpu" or "dali-gpu"; "auto" is PyAV, which reads every codec.
        num_threads: number of decoder threads of PyAV; 0 uses one per core.
        time_limit_s: time limit for this video. It is checked between packets; `VideoReader` also ends a decoder that
            never returns.

    Raises:
        VideoError: the video is missing, damaged, truncated or too slow to decode; names the file and the reason.
        OptionError: an option is out of range.
    """
    if not image_fps > 0:
        raise OptionError(f"image_fps must be above 0, got {image_fps}")
    pixels = PixelOptions(total_pixels, min_pixels, max_pixels)
    sampling = Sampling(fps, min_frames, max_frames, pixels, factor, start_s, end_s, rules)
    if backend not in BACKENDS:
        raise OptionError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend in ("auto", "pyav"):
        decode: Callable[..., VideoFrames] = partial(decode_with_pyav, num_threads=num_threads)
    else:
        from megatron_vcr1.data.video_dali import decode_with_dali  # DALI is optional and slow to import

        decode = partial(decode_with_dali, device=backend.removeprefix("dali-"))
    if not isinstance(path, str | os.PathLike) and (start_s, end_s) != (0.0, math.inf):
        raise OptionError("start_s and end_s select a clip of a video; leave them out for a list of images")
    try:
        return _decode(path, sampling, decode, image_fps=image_fps, time_limit_s=time_limit_s)
    except MemoryError as error:
        raise VideoError(path, OUT_OF_MEMORY) from error
    except (VideoError, *PROGRAMMING_ERRORS):
        raise
    except Exception as error:  # an unforeseen error of a decoder costs one video, not the run
        logger.warning("%s: unexpected error of the decoder", path, exc_info=True)
        raise VideoError(path, f"cannot be read ({type(error).__name__}: {error})") from error


def _decode(
    path: VideoPath,
    sampling: Sampling,
    decode: Callable[..., VideoFrames],
    *,
    image_fps: float,
    time_limit_s: float,
) -> VideoFrames:
    """Decode a list of images, a folder of images, or a video file with `decode`."""
    if not isinstance(path, str | os.PathLike):
        files = [os.fspath(file) for file in path]
        deadline = Deadline(files, time_limit_s)
        return decode_images(files, sampling, image_fps, sample=False, deadline=deadline)
    file = os.fspath(path)
    deadline = Deadline(file, time_limit_s)
    if "://" not in file and Path(file).is_dir():
        return decode_images(images_in_folder(Path(file)), sampling, image_fps, sample=True, deadline=deadline)
    return decode(file, sampling, deadline=deadline)
