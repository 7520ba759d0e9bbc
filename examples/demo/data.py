"""The demo's videos and manifests: weak labels for the base model, and three tasks with exact targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from demo.tiny_model import HIDDEN
from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.data.scenes import CORNERS, MovingObject, Scene, VideoFormat, random_scene, sample_of_scene
from megatron_vcr1.data.synthesize import render_frames, write_video
from megatron_vcr1.tasks import CaptionTarget, GroundedChoiceTarget, GroundingTarget, TrackingTarget
from megatron_vcr1.types import OPTION_LETTERS, Box, Interval, Sample, Target, Video

TASKS = ("temporal_grounding", "tracking", "grounded_qa")
TEST_SPLITS = ("test", "unseen_pairs", "longer_events")
VIDEO = VideoFormat()
_BASE_SEED, _TASK_SEED = 1, 2
_POINT_LABEL_RATE = 0.4  # fraction of weak grounding labels that cover a single half second
_MAX_BOX_SHIFT = 0.15  # of the frame's width and height
_CORRECT_CORNER_RATE = 0.2  # the other weak corner labels are drawn at random


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of videos.

    Attributes:
        base: videos per task that the base model trains on.
        train: videos per task for SFT and GRPO.
        test: videos per task and test split.
        small: labels per seed in the comparison with few labels; each seed uses different ones.
        small_seeds: seeds of that comparison.
    """

    base: dict[str, int]
    train: dict[str, int]
    test: int
    small: int = 200
    small_seeds: int = 3


@dataclass(frozen=True, slots=True)
class VideoSet:
    """The videos of one task and split. Their contents are a function of the fields alone."""

    split: str
    task: str
    seed: int
    num_videos: int

    def scenes(self) -> Iterator[Scene]:
        for index in range(self.num_videos):
            yield self.scene(index)

    def scene(self, index: int) -> Scene:
        # Each task has its own index range: with the same index, all tasks would show the same objects.
        start = 1_000_000 * TASKS.index(self.task)
        return random_scene(self.split, start + index, seed=self.seed, task=self.task, video_format=VIDEO)

    def path(self, folder: Path, scene: Scene) -> Path:
        return folder / "videos" / f"{self.split}_{self.seed}" / self.task / f"{scene.id}.mp4"

    def write(self, folder: Path, part: int, num_parts: int) -> None:
        """Write the videos with index `part`, `part + num_parts`, ...; existing files are kept."""
        for index in range(part, self.num_videos, num_parts):
            scene = self.scene(index)
            path = self.path(folder, scene)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.stem}.part.mp4")
            write_video(unfinished, render_frames(scene, self.seed), VIDEO.fps)
            unfinished.replace(path)  # atomic: an interrupted job never leaves half a video under the final name


def video_sets(sizes: Sizes) -> list[VideoSet]:
    """List all videos: those of the base model, the training videos of the tasks, and the test splits."""
    base = [VideoSet("train", task, _BASE_SEED, number) for task, number in sizes.base.items()]
    train = [VideoSet("train", task, _TASK_SEED, number) for task, number in sizes.train.items()]
    test = [VideoSet(split, task, _TASK_SEED, sizes.test) for split in TEST_SPLITS for task in TASKS]
    return [*base, *train, *(videos for videos in test if is_tested(videos.split, videos.task))]


def is_tested(split: str, task: str) -> bool:
    """Return whether the split exists for the task. Tracked objects are always visible, so there are no long events."""
    return split != "longer_events" or task != "tracking"


def write_manifests(folder: Path, sizes: Sizes) -> None:
    """Write base/*.jsonl, train/TASK.jsonl, small/temporal_grounding_SEED.jsonl and SPLIT/TASK.jsonl."""
    for name, samples in base_samples(folder, sizes).items():
        write_manifest(folder / "base" / f"{name}.jsonl", samples)
    for videos in video_sets(sizes):
        if videos.seed == _TASK_SEED:
            write_manifest(folder / videos.split / f"{videos.task}.jsonl", _task_samples(folder, videos))
    grounding = VideoSet("train", TASKS[0], _TASK_SEED, sizes.train[TASKS[0]])
    all_samples = list(_task_samples(folder, grounding))
    for seed in range(sizes.small_seeds):
        chosen = all_samples[seed * sizes.small : (seed + 1) * sizes.small]
        write_manifest(folder / "small" / f"temporal_grounding_{seed}.jsonl", chosen)


def _task_samples(folder: Path, videos: VideoSet) -> Iterator[Sample]:
    for scene in videos.scenes():
        yield sample_of_scene(scene, str(videos.path(folder.absolute(), scene)))


def base_samples(folder: Path, sizes: Sizes) -> dict[str, list[Sample]]:
    """Create the training samples of the base model, by task; "place" asks where an object is at a given time.

    The labels of the three tasks are weak, like those of narrated web videos: a moment within the event instead of its
    full span, boxes that are all shifted by the same offset, and corners that are mostly random. Grounding samples also
    have reasoning, which is a correct timeline of the object. As a result the base model can look at the video, but
    answers badly.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in ("place", *TASKS)}

    def add(kind: str, video: Path, query: str, target: Target, **more: Any) -> None:
        name = f"{kind}_{len(samples[kind]):06d}"
        samples[kind].append(Sample(name, (Video(str(video), VIDEO.duration_s),), target, query, **more))

    for task, number in sizes.base.items():
        videos = VideoSet("train", task, _BASE_SEED, number)
        for scene in videos.scenes():
            # The samples depend on the order in which `random` is used: keep the order of the calls below.
            video, random = videos.path(folder.absolute(), scene), Random(f"weak/{scene.id}")
            queried = scene.objects[0]
            for thing in scene.objects:
                add("place", video, *_place_prompt(thing, random))
                if task == "temporal_grounding":
                    label = GroundingTarget(_weak_interval(thing, random))
                    add(task, video, f"the {thing.name} is visible", label, thinking=timeline(thing))
            if task == "tracking":
                add(task, video, queried.name, _shifted_boxes(sample_of_scene(scene, str(video)), random))
            if task == "grounded_qa":
                correct = sample_of_scene(scene, str(video)).target
                assert isinstance(correct, GroundedChoiceTarget)
                is_correct = random.random() < _CORRECT_CORNER_RATE
                letter = correct.choice if is_correct else random.choice(OPTION_LETTERS[:4])
                target = GroundedChoiceTarget(letter, (_weak_interval(queried, random),))
                add(task, video, f"In which corner is the {queried.name}?", target, options=CORNERS)
    return samples


def timeline(thing: MovingObject) -> str:
    """Describe each half second by one token: its time if the object is visible, otherwise a dash."""
    visible = range(thing.first_frame, thing.end_frame)
    return "".join(f"{frame / VIDEO.fps:.1f}" if frame in visible else HIDDEN for frame in range(VIDEO.num_frames))


def _place_prompt(thing: MovingObject, random: Random) -> tuple[str, CaptionTarget]:
    frame = random.randrange(thing.first_frame, thing.end_frame)
    box = thing.box(frame)
    edges = ", ".join(f"{edge:.1f}" for edge in (box.x0, box.y0, box.x1, box.y1))
    return f"Where is the {thing.name} at {frame / VIDEO.fps:.1f}?", CaptionTarget(f"[{edges}]")


def _weak_interval(thing: MovingObject, random: Random) -> Interval:
    """Draw an interval within the event: a single half second or a longer one."""
    start = random.randrange(thing.first_frame, thing.end_frame)
    end = start + 1 if random.random() < _POINT_LABEL_RATE else random.randint(start + 1, thing.end_frame)
    return Interval(start / VIDEO.fps, end / VIDEO.fps)


def _shifted_boxes(sample: Sample, random: Random) -> TrackingTarget:
    """Shift all boxes by the same random offset, clipped so that each box stays inside the frame."""
    assert isinstance(sample.target, TrackingTarget)
    shift = np.array([random.uniform(-_MAX_BOX_SHIFT, _MAX_BOX_SHIFT) for _ in range(2)])
    boxes = []
    for box in sample.target.boxes:
        x, y = np.clip(shift, (-box.x0, -box.y0), (1 - box.x1, 1 - box.y1))
        boxes.append(Box(*(round(float(edge), 4) for edge in (box.x0 + x, box.y0 + y, box.x1 + x, box.y1 + y))))
    return TrackingTarget(tuple(boxes))
