from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.scenes import COLOURS, PAPER_TASKS, SHAPES, Scene, VideoFormat, random_scene, sample_of_scene
from megatron_vcr1.data.synthesize import SPLITS, render_frames, synthesize
from megatron_vcr1.data.video import read_frames
from megatron_vcr1.tasks import QualityTarget, TrackingTarget
from megatron_vcr1.types import Sample

FORMAT = VideoFormat()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic")
    for _ in synthesize(path, num_videos=24, num_test_videos=6, seed=3):
        pass
    return path


def scenes(task: str, split: str = "train", number: int = 60) -> list[Scene]:
    return [random_scene(split, index, seed=0, task=task, video_format=FORMAT) for index in range(number)]


def colour_mask(frames: np.ndarray, colour: str) -> np.ndarray:
    """Return a mask [..., side, side] of the pixels that are closer to the colour than to any other in the frames."""
    others = [*COLOURS.values(), (30, 30, 30), (230, 230, 230), (130, 130, 130)]
    distances = np.stack([np.abs(frames.astype(int) - other).sum(-1) for other in others])
    return distances.argmin(0) == list(COLOURS).index(colour)


def test_manifests_contain_all_tasks_and_name_existing_videos(folder: Path) -> None:
    for split in SPLITS:
        samples = read_manifest(folder / f"{split}.jsonl")
        assert len(samples) == (24 if split == "train" else 6)
        assert {sample.task for sample in samples} == set(PAPER_TASKS)
        for sample in samples:
            assert sample.duration_s == 12.0
            assert isinstance(sample.media[0].path, str) and Path(sample.media[0].path).is_file()


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_videos(folder: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        for _ in synthesize(tmp_path / str(seed), num_videos=6, num_test_videos=1, seed=seed):
            pass

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    for index in range(6):
        name = f"videos/train/{index:06d}.mp4"
        assert digest(tmp_path / "3" / name) == digest(folder / name)
        assert digest(tmp_path / "4" / name) != digest(folder / name)
    lines = (tmp_path / "3/train.jsonl").read_text().splitlines()
    assert lines == (folder / "train.jsonl").read_text().splitlines()[:6]


ENCODE_AND_HASH = """
import hashlib, pathlib, sys
from megatron_vcr1.data.scenes import PAPER_TASKS, VideoFormat, random_scene
from megatron_vcr1.data.synthesize import render_frames, write_video
path = pathlib.Path(sys.argv[1])
for index in range(18):
    scene = random_scene("train", index, seed=3, task=PAPER_TASKS[index % 6], video_format=VideoFormat())
    frames = render_frames(scene, 3)
    for _ in range(4):
        write_video(path, frames, 2)
        print(index, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_the_encoder_does_not_depend_on_uninitialized_memory(tmp_path: Path) -> None:
    """malloc fills the memory of two processes with different bytes (MALLOC_PERTURB_); the videos must be the same."""
    outputs: set[str] = set()
    for filler in ("85", "200"):
        environment = os.environ | {"MALLOC_PERTURB_": filler, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", ENCODE_AND_HASH, str(tmp_path / f"{filler}.mp4")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        outputs |= set(result.stdout.splitlines())
    assert len(outputs) == 18


def test_decoded_frames_equal_the_rendered_frames(folder: Path) -> None:
    for index in range(24):
        scene = random_scene("train", index, seed=3, task=PAPER_TASKS[index % 6], video_format=FORMAT)
        drawn = render_frames(scene, seed=3)
        video = read_frames(folder / f"videos/train/{index:06d}.mp4", factor=16, min_pixels=64 * 64)
        assert video.frames.shape == (24, 64, 64, 3) and video.duration_s == 12.0
        assert video.timestamps_s == tuple(frame / 2 for frame in range(24))
        error = np.abs(video.frames.numpy().astype(int) - drawn).mean()
        assert error < (25 if scene.low_quality else 3)


def small_frames(folder: Path, sample: Sample) -> np.ndarray:
    """Read a video as the demo's tiny model sees it: 24 frames of 16 x 16 pixels."""
    assert isinstance(sample.media[0].path, str)
    video = read_frames(sample.media[0].path, factor=16, min_pixels=240, total_pixels=256 * 12)
    assert video.frames.shape == (24, 16, 16, 3)
    return video.frames.numpy()


def test_targets_can_be_read_from_small_decoded_frames(folder: Path) -> None:
    """Colours survive 4:2:0 chroma and the reduction to 16 x 16; spans are exact to the frame."""
    checked = set()
    for sample in read_manifest(folder / "train.jsonl"):
        match = re.search(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", sample.query)
        if match is None:
            continue
        visible = colour_mask(small_frames(folder, sample), match[1])[:, :14].sum((1, 2)) >= 3
        frames = np.flatnonzero(visible)
        if sample.task == "tracking":
            assert visible.all()
        else:
            (interval,) = sample.intervals
            assert (frames[0] / 2, (frames[-1] + 1) / 2) == (interval.start_s, interval.end_s)
        checked.add(sample.task)
    assert checked == {"temporal_grounding", "tracking", "grounded_qa"}


def test_tracking_boxes_enclose_the_object_in_the_frames_that_training_sees(folder: Path) -> None:
    for sample in read_manifest(folder / "train.jsonl"):
        if not isinstance(sample.target, TrackingTarget):
            continue
        video = read_frames(sample.media[0].path, factor=16, min_pixels=64 * 64, min_frames=8, max_frames=8)
        assert len(video.frames) == len(sample.target.boxes) == 8
        for frame, box in zip(video.frames.numpy(), sample.target.boxes, strict=True):
            rows, columns = np.nonzero(colour_mask(frame, sample.query.split()[0]))
            drawn = (columns.min() / 64, rows.min() / 64, (columns.max() + 1) / 64, (rows.max() + 1) / 64)
            assert drawn == pytest.approx((box.x0, box.y0, box.x1, box.y1), abs=1.6 / 64)


def test_low_quality_is_coarse_and_noisy() -> None:
    labels = []
    for scene in scenes("quality", number=40):
        target = sample_of_scene(scene, "v").target
        assert isinstance(target, QualityTarget)
        frames = render_frames(scene, seed=0).astype(float)
        is_noisy = bool(np.abs(np.diff(frames[:, :8, :, 0], axis=2)).mean() > 10)
        assert (target.label == "low quality") == is_noisy
        labels.append(target.label)
    assert 10 < labels.count("low quality") < 30
