"""The demo's videos and labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from demo.data import TASKS, TEST_SPLITS, VIDEO, base_samples, is_tested, timeline, write_manifests
from demo.plan import QUICK_SIZES

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.scenes import random_scene
from megatron_vcr1.data.video import read_frames
from megatron_vcr1.tasks import GroundingTarget, TrackingTarget


def test_every_video_of_a_manifest_exists(data: Path) -> None:
    manifests = sorted(data.rglob("*.jsonl"))
    assert len(manifests) == 4 + 3 + 1 + 8  # base, train, small, tests
    for manifest in manifests:
        assert all(Path(str(sample.media[0].path)).is_file() for sample in read_manifest(manifest))


def test_test_videos_are_not_trained_on(data: Path) -> None:
    def videos(place: str) -> set[str]:
        return {str(sample.media[0].path) for path in (data / place).glob("*.jsonl") for sample in read_manifest(path)}

    tested = set().union(*(videos(split) for split in TEST_SPLITS))
    assert not tested & (videos("base") | videos("train") | videos("small"))
    assert not videos("base") & videos("train")
    assert videos("small") <= videos("train")


def test_every_seed_has_different_labels(tmp_path: Path) -> None:
    sizes = replace(QUICK_SIZES, train=dict.fromkeys(TASKS, 60), small=20, small_seeds=3)
    write_manifests(tmp_path, sizes)
    chosen = [{sample.id for sample in read_manifest(path)} for path in sorted((tmp_path / "small").glob("*.jsonl"))]
    assert [len(ids) for ids in chosen] == [20] * 3
    assert len(set().union(*chosen)) == 60


def test_frames_show_a_clock_that_advances(data: Path) -> None:
    sample = read_manifest(data / "test" / "temporal_grounding.jsonl")[0]
    video = read_frames(str(sample.media[0].path), total_pixels=3072, min_pixels=256, factor=16)
    assert video.frames.shape == (24, 16, 16, 3)
    bar = video.frames[:, -2:].float().mean((1, 3))  # [num_frames, 16]
    lit = (bar > 130).sum(1)
    assert lit[0] < 2
    assert lit[-1] == 16
    assert (lit.diff() >= 0).all()


def test_weak_grounding_labels_are_within_the_event(data: Path) -> None:
    samples = base_samples(data, QUICK_SIZES)["temporal_grounding"]
    num_short = 0
    for sample in samples:
        assert isinstance(sample.target, GroundingTarget)
        interval = sample.target.interval
        assert f"{interval.start_s:.1f}" in sample.thinking
        assert f"{interval.end_s - 0.5:.1f}" in sample.thinking
        num_short += interval.duration_s == 0.5
    assert 0.3 < num_short / len(samples) < 0.9


def test_weak_boxes_of_a_video_have_the_same_size(data: Path) -> None:
    for sample in base_samples(data, QUICK_SIZES)["tracking"]:
        assert isinstance(sample.target, TrackingTarget)
        widths = [round(box.x1 - box.x0, 3) for box in sample.target.boxes]
        assert max(widths) - min(widths) < 0.002


def test_a_timeline_has_one_token_per_half_second() -> None:
    moving = random_scene("train", 0, seed=0, task="temporal_grounding", video_format=VIDEO).objects[0]
    start_s, end_s = moving.first_frame / VIDEO.fps, moving.end_frame / VIDEO.fps
    line = timeline(moving)
    assert line.startswith("-" * moving.first_frame + f"{start_s:.1f}")
    assert line.endswith(f"{end_s - 0.5:.1f}" + "-" * (VIDEO.num_frames - moving.end_frame))


def test_longer_events_are_not_tracked() -> None:
    assert [task for task in TASKS if not is_tested("longer_events", task)] == ["tracking"]
