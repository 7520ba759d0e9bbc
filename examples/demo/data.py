"""The demo's videos and manifests: what the base model has learned from, and the three tasks with their exact truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from demo.tiny_model import HIDDEN
from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.data.synthesize import (
    CORNERS,
    MovingObject,
    Scene,
    VideoFormat,
    random_scene,
    render_frames,
    sample_of_scene,
    write_video,
)
from megatron_vcr1.types import (
    OPTION_LETTERS,
    Box,
    CaptionTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    Interval,
    Target,
    Task,
    TrackingTarget,
    VideoSample,
)

TASKS = (Task.TEMPORAL_GROUNDING, Task.TRACKING, Task.GROUNDED_QA)
TEST_SPLITS = ("test", "unseen_pairs", "longer_events")
VIDEO = VideoFormat()
_BASE_SEED, _TASK_SEED = 1, 2
_POINT_SHARE = 0.4
_BOX_SHIFT = 0.15
_RIGHT_CORNERS = 0.2  # the others are drawn at random


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of videos."""

    base: dict[Task, int]
    train: dict[Task, int]
    test: int
    small: int = 200
    """Labels of the small-label comparison; each of its seeds has others."""
    small_seeds: int = 3


@dataclass(frozen=True, slots=True)
class VideoSet:
    """Videos of one task and split; everything about them follows from the numbers."""

    split: str
    task: Task
    seed: int
    num_videos: int

    def scenes(self) -> Iterator[Scene]:
        for index in range(self.num_videos):
            yield self.scene(index)

    def scene(self, index: int) -> Scene:
        # A range of its own for each task: the same index would show the same objects to all of them.
        start = 1_000_000 * list(Task).index(self.task)
        return random_scene(self.split, start + index, seed=self.seed, task=self.task, video_format=VIDEO)

    def path(self, folder: Path, scene: Scene) -> Path:
        return folder / "videos" / f"{self.split}_{self.seed}" / self.task / f"{scene.id}.mp4"

    def write(self, folder: Path, part: int, num_parts: int) -> None:
        """Writes every num_parts-th video; one that is there already is kept."""
        for index in range(part, self.num_videos, num_parts):
            scene = self.scene(index)
            path = self.path(folder, scene)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.stem}.part.mp4")
            write_video(unfinished, render_frames(scene, self.seed), VIDEO.fps)
            unfinished.replace(path)


def video_sets(sizes: Sizes) -> list[VideoSet]:
    """All videos: what the base learns from, the tasks' training videos, and the test splits."""
    base = [VideoSet("train", task, _BASE_SEED, number) for task, number in sizes.base.items()]
    train = [VideoSet("train", task, _TASK_SEED, number) for task, number in sizes.train.items()]
    test = [VideoSet(split, task, _TASK_SEED, sizes.test) for split in TEST_SPLITS for task in TASKS]
    return [*base, *train, *(one for one in test if is_tested(one.split, one.task))]


def is_tested(split: str, task: Task) -> bool:
    """A tracked object is visible throughout, so there are no longer events to track."""
    return split != "longer_events" or task != Task.TRACKING


def write_manifests(folder: Path, sizes: Sizes) -> None:
    """Writes base/*.jsonl, train/TASK.jsonl, small/temporal_grounding_N.jsonl and SPLIT/TASK.jsonl."""
    for name, samples in base_samples(folder, sizes).items():
        write_manifest(folder / "base" / f"{name}.jsonl", samples)
    for videos in video_sets(sizes):
        if videos.seed == _TASK_SEED:
            write_manifest(folder / videos.split / f"{videos.task}.jsonl", _task_samples(folder, videos))
    grounding = VideoSet("train", TASKS[0], _TASK_SEED, sizes.train[TASKS[0]])
    samples = list(_task_samples(folder, grounding))
    for seed in range(sizes.small_seeds):
        few = samples[seed * sizes.small : (seed + 1) * sizes.small]
        write_manifest(folder / "small" / f"temporal_grounding_{seed}.jsonl", few)


def _task_samples(folder: Path, videos: VideoSet) -> Iterator[VideoSample]:
    for scene in videos.scenes():
        yield sample_of_scene(scene, str(videos.path(folder.absolute(), scene)))


def base_samples(folder: Path, sizes: Sizes) -> dict[str, list[VideoSample]]:
    """What the base model learns from, by kind of question.

    It learns where things are, and for the three tasks from weak labels, as narrated web video gives them: a moment
    within the event instead of its span, boxes that are all shifted alike, a corner that is mostly random. Grounding
    has reasoning too, a true time line of what is asked about: so the model can look, and answers badly.
    """
    samples: dict[str, list[VideoSample]] = {name: [] for name in ("place", *TASKS)}

    def add(kind: str, video: Path, query: str, target: Target, **more: Any) -> None:
        name = f"{kind}_{len(samples[kind]):06d}"
        samples[kind].append(VideoSample(name, str(video), target, query, duration_s=VIDEO.duration_s, **more))

    for task, number in sizes.base.items():
        videos = VideoSet("train", task, _BASE_SEED, number)
        for scene in videos.scenes():
            video, random = videos.path(folder.absolute(), scene), Random(f"weak/{scene.id}")
            asked = scene.objects[0]
            for thing in scene.objects:
                add("place", video, *_place_question(thing, random))
                if task == Task.TEMPORAL_GROUNDING:
                    label = GroundingTarget(_point_label(thing, random))
                    add(task, video, f"the {thing.name} is visible", label, thinking=timeline(thing))
            if task == Task.TRACKING:
                add(task, video, asked.name, _shifted_boxes(sample_of_scene(scene, str(video)), random))
            if task == Task.GROUNDED_QA:
                right = sample_of_scene(scene, str(video)).target
                assert isinstance(right, GroundedChoiceTarget)
                letter = right.choice if random.random() < _RIGHT_CORNERS else random.choice(OPTION_LETTERS[:4])
                answer = GroundedChoiceTarget(letter, (_point_label(asked, random),))
                add(task, video, f"In which corner is the {asked.name}?", answer, options=CORNERS)
    return samples


def timeline(thing: MovingObject) -> str:
    """A sign for each half second: its time if the thing is visible, else a dash."""
    shown = range(thing.first_frame, thing.end_frame)
    return "".join(f"{frame / VIDEO.fps:.1f}" if frame in shown else HIDDEN for frame in range(VIDEO.num_frames))


def _place_question(thing: MovingObject, random: Random) -> tuple[str, CaptionTarget]:
    frame = random.randrange(thing.first_frame, thing.end_frame)
    box = thing.box(frame)
    edges = ", ".join(f"{edge:.1f}" for edge in (box.x0, box.y0, box.x1, box.y1))
    return f"Where is the {thing.name} at {frame / VIDEO.fps:.1f}?", CaptionTarget(f"[{edges}]")


def _point_label(thing: MovingObject, random: Random) -> Interval:
    """From a random moment of the event on; often half a second, otherwise up to a random later moment of it."""
    start = random.randrange(thing.first_frame, thing.end_frame)
    end = start + 1 if random.random() < _POINT_SHARE else random.randint(start + 1, thing.end_frame)
    return Interval(start / VIDEO.fps, end / VIDEO.fps)


def _shifted_boxes(sample: VideoSample, random: Random) -> TrackingTarget:
    assert isinstance(sample.target, TrackingTarget)
    shift = np.array([random.uniform(-_BOX_SHIFT, _BOX_SHIFT) for _ in range(2)])
    boxes = []
    for box in sample.target.boxes:
        x, y = np.clip(shift, (-box.x0, -box.y0), (1 - box.x1, 1 - box.y1))  # inside the frame
        boxes.append(Box(*(round(float(edge), 4) for edge in (box.x0 + x, box.y0 + y, box.x1 + x, box.y1 + y))))
    return TrackingTarget(tuple(boxes))
