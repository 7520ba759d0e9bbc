"""Synthetic videos with exact targets: scenes of moving shapes, rendered and encoded as real mp4 files.

The same arguments and library versions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.data.scenes import (
    BAR_HEIGHT,
    COLOURS,
    PAPER_TASKS,
    SPLITS,
    Scene,
    VideoFormat,
    random_scene,
    sample_of_scene,
)

_BACKGROUND = 30  # grey level


def synthesize(
    folder: Path,
    *,
    num_videos: int,
    num_test_videos: int,
    seed: int,
    video_format: VideoFormat | None = None,
    tasks: Sequence[str] = PAPER_TASKS,
) -> Iterator[Path]:
    """Write `videos/SPLIT/*.mp4` and a manifest `SPLIT.jsonl` for every split; yield each video as it is written.

    Args:
        folder: output folder; created if it does not exist.
        num_videos: number of videos of the split train. The tasks take turns.
        num_test_videos: number of videos of each other split.
        seed: seed of all random choices.
        video_format: size and frame rate; None means the defaults of `VideoFormat`.
        tasks: names of the tasks to include.
    """
    video_format = video_format or VideoFormat()
    for split in SPLITS:
        samples = []
        for index in range(num_videos if split == "train" else num_test_videos):
            scene = random_scene(split, index, seed=seed, task=tasks[index % len(tasks)], video_format=video_format)
            path = folder / "videos" / split / f"{index:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, render_frames(scene, seed), video_format.fps)
            samples.append(sample_of_scene(scene, str(path.absolute())))
            yield path
        write_manifest(folder / f"{split}.jsonl", samples)


def render_frames(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Draw a scene. The first object is drawn on top of the others; low quality adds blocks and noise.

    Returns:
        uint8 [num_frames, side, side, 3].
    """
    side, num_frames = scene.format.side, scene.format.num_frames
    frames = np.full((num_frames, side, side, 3), _BACKGROUND, np.float32)
    pixel = (np.arange(side, dtype=np.float32) + 0.5) / side  # pixel centres as fractions of the frame
    for moving in reversed(scene.objects):
        for frame in range(moving.first_frame, moving.end_frame):
            x, y = moving.centers[frame]
            inside = _inside(moving.shape, (pixel[None, :] - x) / moving.radius, (pixel[:, None] - y) / moving.radius)
            frames[frame, inside] = COLOURS[moving.colour]
    bar_height = round(side * BAR_HEIGHT)
    elapsed = (np.arange(num_frames) + 1) / num_frames
    bar = np.clip(elapsed[:, None] * side - np.arange(side)[None, :], 0, 1)  # [num_frames, side]
    frames[:, side - bar_height :] = _BACKGROUND + 200 * bar[:, None, :, None]
    if scene.low_quality:
        noise = np.random.default_rng(list(f"{seed}/{scene.id}".encode()))
        frames = _blocky(frames) + noise.normal(0, 40, frames.shape).astype(np.float32)
    return np.clip(frames, 0, 255).astype(np.uint8)


def write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Encode frames as H.264 in mp4; the same frames always give the same bytes.

    Args:
        path: file to write.
        frames: uint8 [num_frames, height, width, 3].
        fps: frames per second.
    """
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # A single thread and a constant quantizer, which disables x264's macroblock tree: its result differs between
        # encodings of the same frames.
        options = {"qp": "16", "preset": "veryfast", "threads": "1", "g": "12"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _inside(shape: str, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return the mask [side, side] of a shape that spans -1..1, given coordinates x [1, side] and y [side, 1]."""
    square = (np.abs(x) <= 1) & (np.abs(y) <= 1)
    if shape == "square":
        return square
    if shape == "circle":
        return x * x + y * y <= 1
    return square & ((np.abs(x) <= 1 / 3) | (np.abs(y) <= 1 / 3))


def _blocky(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace each frame with 8 x 8 blocks of uniform colour."""
    num_frames, side = frames.shape[:2]
    block = side // 8
    means = frames.reshape(num_frames, 8, block, 8, block, 3).mean(axis=(2, 4))
    return means.repeat(block, axis=1).repeat(block, axis=2)
