"""The demo's videos, labels and jobs."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from demo.data import TASKS, TEST_SPLITS, VIDEO, base_samples, is_tested, timeline, video_sets, write_manifests
from demo.jobs import Job, JobFailed, Record, run_jobs
from demo.plan import CONFIGS, QUICK_SIZES, Demo

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.synthesize import random_scene
from megatron_vcr1.data.video import read_frames
from megatron_vcr1.types import GroundingTarget, Task, TrackingTarget


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for videos in video_sets(QUICK_SIZES):
        for part in (0, 1):
            videos.write(path, part, 2)
    write_manifests(path, QUICK_SIZES)
    return path


def test_every_manifest_finds_its_videos(folder: Path) -> None:
    manifests = sorted(folder.rglob("*.jsonl"))
    assert len(manifests) == 4 + 3 + 1 + 8  # base, train, few labels, tests
    for manifest in manifests:
        assert all(Path(str(sample.video)).is_file() for sample in read_manifest(manifest))


def test_nothing_that_is_tested_is_trained_on(folder: Path) -> None:
    def videos(place: str) -> set[str]:
        return {str(sample.video) for path in (folder / place).glob("*.jsonl") for sample in read_manifest(path)}

    tested = set().union(*(videos(split) for split in TEST_SPLITS))
    assert not tested & (videos("base") | videos("train") | videos("small"))
    assert not videos("base") & videos("train")
    assert videos("small") <= videos("train")


def test_the_few_labels_of_the_seeds_are_different_ones(tmp_path: Path) -> None:
    sizes = replace(QUICK_SIZES, train=dict.fromkeys(TASKS, 60), small=20, small_seeds=3)
    write_manifests(tmp_path, sizes)
    chosen = [{sample.id for sample in read_manifest(path)} for path in sorted((tmp_path / "small").glob("*.jsonl"))]
    assert [len(one) for one in chosen] == [20] * 3
    assert len(set().union(*chosen)) == 60


def test_the_model_sees_colours_and_the_clock(folder: Path) -> None:
    sample = read_manifest(folder / "test" / "temporal_grounding.jsonl")[0]
    video = read_frames(str(sample.video), total_pixels=3072, min_pixels=256, factor=16)
    assert video.frames.shape == (24, 16, 16, 3)
    bar = video.frames[:, -2:].float().mean((1, 3))  # [num_frames, 16]
    lit = (bar > 130).sum(1)
    assert lit[0] < 2
    assert lit[-1] == 16
    assert (lit.diff() >= 0).all()


def test_weak_grounding_labels_lie_within_the_event(folder: Path) -> None:
    samples = base_samples(folder, QUICK_SIZES)[Task.TEMPORAL_GROUNDING]
    num_short = 0
    for sample in samples:
        assert isinstance(sample.target, GroundingTarget)
        interval = sample.target.interval
        assert f"{interval.start_s:.1f}" in sample.thinking
        assert f"{interval.end_s - 0.5:.1f}" in sample.thinking
        num_short += interval.duration_s == 0.5
    assert 0.3 < num_short / len(samples) < 0.9


def test_weak_boxes_are_shifted_alike(folder: Path) -> None:
    for sample in base_samples(folder, QUICK_SIZES)[Task.TRACKING]:
        assert isinstance(sample.target, TrackingTarget)
        widths = [round(box.x1 - box.x0, 3) for box in sample.target.boxes]
        assert max(widths) - min(widths) < 0.002


def test_a_time_line_shows_each_half_second() -> None:
    thing = random_scene("train", 0, seed=0, task=Task.TEMPORAL_GROUNDING, video_format=VIDEO).objects[0]
    start_s, end_s = thing.first_frame / VIDEO.fps, thing.end_frame / VIDEO.fps
    line = timeline(thing)
    assert line.startswith("-" * thing.first_frame + f"{start_s:.1f}")
    assert line.endswith(f"{end_s - 0.5:.1f}" + "-" * (VIDEO.num_frames - thing.end_frame))


def test_every_configuration_is_valid_and_only_names_what_is_made(tmp_path: Path, folder: Path) -> None:
    demo = Demo(tmp_path / "demo")
    demo.out.mkdir()
    (demo.out / "data").symlink_to(folder)
    assert len(list(CONFIGS.glob("*.toml"))) == 10
    for path in CONFIGS.glob("*.toml"):
        config = load_config(demo.config(path.stem))
        named = [*config.data.sources, *config.evaluate.benchmarks]
        assert named
        assert all(one.manifest.is_file() for one in named)
        assert all(one.manifest.stem.startswith("temporal_grounding") for one in named if one.thinking)


def test_jobs_run_once_in_order_of_what_they_need(tmp_path: Path) -> None:
    first = Job("first", partial(os.mkdir, tmp_path / "made"))
    second = Job("second", partial(Path.touch, tmp_path / "made" / "file"), after=("first",))
    record = Record(tmp_path / "record")
    run_jobs([second, first], record, num_workers=2)
    assert (tmp_path / "made" / "file").exists()
    assert set(record.spent([first, second])) == {"first", "second"}
    run_jobs([second, first], record, num_workers=2)  # a second mkdir would fail
    assert len(record.calls()) == 1


def test_a_failed_job_is_named_and_done_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    jobs = [Job("fine", partial(Path.touch, tmp_path / "fine")), Job("fails", partial(os.mkdir, tmp_path / "a" / "b"))]
    with pytest.raises(JobFailed, match=r"fails: .*No such file.*(?s:.)*fails\.log"):
        run_jobs(jobs, record, num_workers=1)
    (tmp_path / "a").mkdir()
    run_jobs(jobs, record, num_workers=1)
    assert all(record.is_done(job) for job in jobs)
    assert len(record.calls()) == 2
    assert min(record.calls()) > 0


def test_a_process_that_dies_is_a_failed_job(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="died with code 3"):
        run_jobs([Job("dies", partial(os._exit, 3))], Record(tmp_path), num_workers=1)


def test_longer_events_are_not_tracked() -> None:
    assert [task for task in TASKS if not is_tested("longer_events", task)] == [Task.TRACKING]
