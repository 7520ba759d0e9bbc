"""The process that `decode` starts for each backend: decode_worker.py BACKEND THREADS.

It reads the paths of clips from stdin and answers on stdout with one JSON object per line. Packages are imported only
for the backend that is measured, so that each process shows the memory of its own backend.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from megatron_vcr1.process_memory import peak_rss_bytes

OURS = ("pyav", "dali-cpu", "dali-gpu")
BACKENDS = (*OURS, "decord2", "torchcodec", "qwen-vl-utils")
TOTAL_PIXELS = 3584 * 28 * 28
MIN_PIXELS = 16 * 28 * 28

ReadClip = Callable[[str], int]
"""Decodes and resizes the frames of a clip; returns how many frames it read."""


def serve(backend: str, threads: int) -> None:
    """Answer requests until stdin is closed."""
    # Libraries print to stdout. Answers go to a duplicate of its descriptor; everything else goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        read_clip = reader(backend, threads)
    except (ImportError, OSError, RuntimeError) as error:  # not installed, or built for other libraries
        answer({"missing": str(error).strip().splitlines()[0]})
        return
    answer({"missing": None})
    idle_mb = peak_rss_bytes() / 1e6
    for line in sys.stdin:
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        num_frames = read_clip(line.rstrip("\n"))
        times = {"seconds": time.perf_counter() - start_s, "cpu_seconds": time.process_time() - cpu_start_s}
        answer(times | {"frames": num_frames, "peak_mb": peak_rss_bytes() / 1e6, "idle_mb": idle_mb})


def reader(backend: str, threads: int) -> ReadClip:
    """Return a function that reads clips with a backend.

    Raises:
        ImportError, OSError, RuntimeError: the backend is not installed or cannot be loaded.
    """
    import torch

    torch.set_num_threads(threads)
    if backend in OURS:
        return _our_reader(backend, threads)
    peers = {"decord2": _decord_reader, "torchcodec": _torchcodec_reader, "qwen-vl-utils": _qwen_reader}
    return peers[backend](threads)


def _our_reader(backend: str, threads: int) -> ReadClip:
    import torch

    from megatron_vcr1.data.video import read_frames

    if backend == "dali-gpu" and not torch.cuda.is_available():
        raise RuntimeError("no GPU")
    if backend.startswith("dali"):
        import nvidia.dali  # noqa: F401  # missing DALI is reported now, not as an error of the first clip

    return lambda clip: len(read_frames(clip, backend=backend, num_threads=threads).frames)


def _decord_reader(threads: int) -> ReadClip:
    decord = import_module("decord")

    def read(clip: str) -> int:
        video = decord.VideoReader(clip, num_threads=threads)
        indices = _indices(len(video), len(video) / video.get_avg_fps())
        return _resize(video.get_batch(indices).asnumpy())

    return read


def _torchcodec_reader(threads: int) -> ReadClip:
    decoders = import_module("torchcodec.decoders")

    def read(clip: str) -> int:
        video = decoders.VideoDecoder(clip, num_ffmpeg_threads=threads, dimension_order="NHWC")
        indices = _indices(video.metadata.num_frames, video.metadata.duration_seconds)
        return _resize(video.get_frames_at(indices).data.numpy())

    return read


def _qwen_reader(threads: int) -> ReadClip:
    fetch_video = import_module("qwen_vl_utils").fetch_video
    return lambda clip: len(fetch_video({"video": clip, "total_pixels": TOTAL_PIXELS, "min_pixels": MIN_PIXELS}))


def _indices(num_frames: int, duration_s: float) -> list[int]:
    """Return the frames that `read_frames` takes of a video with a constant frame rate."""
    import numpy as np

    from megatron_vcr1.data.video_types import frames_on_screen, num_sampled_frames

    num_sampled = num_sampled_frames(duration_s, num_frames, _sampling())
    return frames_on_screen(np.arange(num_frames), num_frames, num_sampled).tolist()


def _resize(frames: Any) -> int:
    """Resize frames [num_frames, height, width, 3] like `read_frames` does; return their number."""
    import torch

    from megatron_vcr1.data.resize import resize_frame

    size = _sampling().frame_size(len(frames), *frames.shape[1:3], "the clip")
    return len(torch.stack([resize_frame(torch.from_numpy(frame), *size) for frame in frames]))


def _sampling() -> Any:
    from megatron_vcr1.data.frame_rules import PixelOptions
    from megatron_vcr1.data.video_types import Sampling

    return Sampling(2.0, 4, 768, PixelOptions(TOTAL_PIXELS, MIN_PIXELS), 28)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
