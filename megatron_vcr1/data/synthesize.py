"""Synthetic videos with exact truth: moving shapes that come and go, as real mp4 files, for all six tasks.

Everything follows from (seed, split, index): the same arguments and library versions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.data.video_types import frames_on_screen
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import (
    NUM_TRACKED_FRAMES,
    OPTION_LETTERS,
    Box,
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    Interval,
    QualityTarget,
    Target,
    Task,
    TrackingTarget,
    VideoSample,
)

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}
SHAPES = ("square", "circle", "cross")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
QUALITY_LABELS = ("low quality", "high quality")

SPLITS = ("train", "test", "unseen_pairs", "longer_events")
"""unseen_pairs asks about colour-shape pairs that the other splits never ask about; longer_events lasts longer."""

_NUM_OBJECTS = 2
_BACKGROUND = 30
_BAR_HEIGHT = 1 / 8  # of the frame: a progress bar that tells the time, as video players show it
_RADIUS = (0.156, 0.231)  # of the frame's side
_MAX_SPEED = 0.0875  # frame sides a second, along each axis
_EVENT_S = (1.5, 4.0)
_LONG_EVENT_S = (4.5, 6.5)


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """Size and rate of the square videos; whole H.264 macroblocks, so that no decoder has to crop."""

    side: int = 64
    num_frames: int = 24
    fps: int = 2

    def __post_init__(self) -> None:
        if self.side < 32 or self.side % 16:
            raise UserError(f"side {self.side}: needs a multiple of 16 pixels from 32")
        if self.num_frames / self.fps < 8 or self.num_frames < NUM_TRACKED_FRAMES:
            raise UserError(f"{self.num_frames} frames at {self.fps} a second: needs 8 seconds and 8 frames at least")

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps


@dataclass(frozen=True, slots=True)
class MovingObject:
    """One shape: what it looks like, when it is visible and where it is in every frame.

    Attributes:
        radius: half its width and height, as a fraction of the frame's side.
        first_frame, end_frame: visible from the first one to before the end one.
        centers: [num_frames] (x, y) as fractions of the frame, in all frames, visible or not.
    """

    colour: str
    shape: str
    radius: float
    first_frame: int
    end_frame: int
    centers: tuple[tuple[float, float], ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def interval(self, fps: int) -> Interval:
        return Interval(self.first_frame / fps, self.end_frame / fps)

    def box(self, frame: int) -> Box:
        """The box around it, to the fourth decimal."""
        x, y = self.centers[frame]
        edges = (x - self.radius, y - self.radius, x + self.radius, y + self.radius)
        return Box(*(round(edge, 4) for edge in edges))


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything about one video; the question of ``task`` is about the first object (captioning: about all)."""

    id: str
    task: Task
    format: VideoFormat
    objects: tuple[MovingObject, ...]
    low_quality: bool


def synthesize(
    folder: Path,
    *,
    num_videos: int,
    num_test_videos: int,
    seed: int,
    video_format: VideoFormat | None = None,
    tasks: Sequence[Task] = tuple(Task),
) -> Iterator[Path]:
    """Writes ``videos/SPLIT/*.mp4`` and a manifest ``SPLIT.jsonl`` for every split; yields each video as it is written.

    Args:
        folder: created if it is not there.
        num_videos: of the split train; the tasks take turns.
        num_test_videos: of each other split.
        seed: of everything random.
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


def random_scene(split: str, index: int, *, seed: int, task: Task, video_format: VideoFormat) -> Scene:
    """The scene number ``index`` of a split."""
    random = Random(f"{seed}/{split}/{index}")
    num_asked = _NUM_OBJECTS if task == Task.CAPTIONING else 1
    looks = _random_looks(random, num_asked, unseen=split == "unseen_pairs")
    event_s = _LONG_EVENT_S if split == "longer_events" else _EVENT_S
    objects = []
    for number, (colour, shape) in enumerate(looks):
        asked = number == 0
        first_frame, end_frame = _random_event(random, event_s, video_format)
        if asked and task == Task.TRACKING:
            first_frame, end_frame = 0, video_format.num_frames
        radius = random.uniform(*_RADIUS)
        corner = random.randrange(len(CORNERS)) if asked and task == Task.GROUNDED_QA else None
        centers = _random_walk(random, radius, corner, video_format)
        objects.append(MovingObject(colour, shape, radius, first_frame, end_frame, centers))
    low_quality = task == Task.QUALITY and random.random() < 0.5
    return Scene(f"{split}_{index:06d}", task, video_format, tuple(objects), low_quality)


def render_frames(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Draws a scene: [num_frames, side, side, 3]; the first object lies on top. Low quality is coarse and noisy."""
    side, num_frames = scene.format.side, scene.format.num_frames
    frames = np.full((num_frames, side, side, 3), _BACKGROUND, np.float32)
    pixel = (np.arange(side, dtype=np.float32) + 0.5) / side  # centres of the pixels, as fractions of the frame
    for moving in reversed(scene.objects):
        for frame in range(moving.first_frame, moving.end_frame):
            x, y = moving.centers[frame]
            inside = _inside(moving.shape, (pixel[None, :] - x) / moving.radius, (pixel[:, None] - y) / moving.radius)
            frames[frame, inside] = COLOURS[moving.colour]
    bar_height = round(side * _BAR_HEIGHT)
    elapsed = (np.arange(num_frames) + 1) / num_frames
    bar = np.clip(elapsed[:, None] * side - np.arange(side)[None, :], 0, 1)  # [num_frames, side]
    frames[:, side - bar_height :] = _BACKGROUND + 200 * bar[:, None, :, None]
    if scene.low_quality:
        noise = np.random.default_rng(list(f"{seed}/{scene.id}".encode()))
        frames = _blocky(frames) + noise.normal(0, 40, frames.shape).astype(np.float32)
    return np.clip(frames, 0, 255).astype(np.uint8)


def sample_of_scene(scene: Scene, video: str) -> VideoSample:
    """The scene's question and its truth."""
    query, options, target = _question(scene)
    return VideoSample(
        id=scene.id, video=video, target=target, query=query, options=options, duration_s=scene.format.duration_s
    )


def write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Encodes frames [num_frames, height, width, 3] as H.264 in mp4, the same bytes each time."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # One thread, and a constant quantiser: that leaves out x264's macroblock tree, whose result changes from one
        # encoding of the same frames to the next.
        options = {"qp": "16", "preset": "veryfast", "threads": "1", "g": "12"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _question(scene: Scene) -> tuple[str, tuple[str, ...], Target]:
    """Query, options and target of the scene's task."""
    asked, fps = scene.objects[0], scene.format.fps
    match scene.task:
        case Task.TEMPORAL_GROUNDING:
            return f"the {asked.name} is visible", (), GroundingTarget(asked.interval(fps))
        case Task.TRACKING:
            num_frames = scene.format.num_frames
            picked = frames_on_screen(np.arange(num_frames), num_frames, NUM_TRACKED_FRAMES)
            return asked.name, (), TrackingTarget(tuple(asked.box(int(frame)) for frame in picked))
        case Task.GROUNDED_QA:
            corner = OPTION_LETTERS[CORNERS.index(_place(asked, asked.first_frame))]
            target = GroundedChoiceTarget(corner, (asked.interval(fps),))
            return f"In which corner is the {asked.name}?", CORNERS, target
        case Task.MULTIPLE_CHOICE_QA:
            random = Random(scene.id)
            colours = [asked.colour, *random.sample([colour for colour in COLOURS if colour != asked.colour], 3)]
            random.shuffle(colours)
            choice = OPTION_LETTERS[colours.index(asked.colour)]
            return f"What colour is the {asked.shape}?", tuple(colours), ChoiceTarget(choice)
        case Task.CAPTIONING:
            events = _events(scene)
            return "", (), CaptionTarget(" ".join(events), events)
        case Task.QUALITY:
            query = f"How good is the picture of this video? Choose one of these labels: {', '.join(QUALITY_LABELS)}."
            return query, (), QualityTarget(QUALITY_LABELS[not scene.low_quality])


def _events(scene: Scene) -> tuple[str, ...]:
    """What happens, in order of time."""
    events: list[tuple[int, str]] = []
    for moving in scene.objects:
        place = _place(moving, moving.first_frame)
        seen_from_start = moving.first_frame == 0
        verb = "is there from the start" if seen_from_start else "appears"
        events.append((moving.first_frame, f"A {moving.name} {verb} in the {place}."))
        if direction := _direction(moving):
            events.append((moving.first_frame + 1, f"The {moving.name} moves {direction}."))
        if moving.end_frame < scene.format.num_frames:
            events.append((moving.end_frame, f"The {moving.name} disappears."))
    return tuple(text for _, text in sorted(events, key=lambda event: event[0]))


def _place(moving: MovingObject, frame: int) -> str:
    x, y = moving.centers[frame]
    return CORNERS[2 * (y >= (1 - _BAR_HEIGHT) / 2) + (x >= 0.5)]


def _direction(moving: MovingObject) -> str | None:
    """The main direction between its first and its last visible frame; None if it ends near where it began."""
    (x0, y0), (x1, y1) = moving.centers[moving.first_frame], moving.centers[moving.end_frame - 1]
    if max(abs(x1 - x0), abs(y1 - y0)) < 0.1:
        return None
    if abs(x1 - x0) >= abs(y1 - y0):
        return "to the right" if x1 > x0 else "to the left"
    return "down" if y1 > y0 else "up"


def _random_looks(random: Random, num_asked: int, *, unseen: bool) -> list[tuple[str, str]]:
    """Colour and shape of each object, colours and shapes distinct; the first ``num_asked`` from the split's pairs."""
    while True:
        colours, shapes = random.sample(range(len(COLOURS)), _NUM_OBJECTS), random.sample(range(3), _NUM_OBJECTS)
        # a third of the pairs, two colours of each shape, is kept for the split unseen_pairs
        kept_back = [(colour + shape) % 3 == 0 for colour, shape in zip(colours, shapes, strict=True)]
        if all(kept == unseen for kept in kept_back[:num_asked]):
            names = list(COLOURS)
            return [(names[colour], SHAPES[shape]) for colour, shape in zip(colours, shapes, strict=True)]


def _random_event(random: Random, event_s: tuple[float, float], video_format: VideoFormat) -> tuple[int, int]:
    """First frame and the frame after the last of a span of visibility."""
    shortest, longest = (round(length_s * video_format.fps) for length_s in event_s)
    length = random.randint(max(shortest, 1), longest)
    first_frame = random.randint(0, video_format.num_frames - length)
    return first_frame, first_frame + length


def _random_walk(
    random: Random, radius: float, corner: int | None, video_format: VideoFormat
) -> tuple[tuple[float, float], ...]:
    """Centres [num_frames] of an object that moves straight and bounces off the edges; in a corner it stays there."""
    upper = (1 - radius, 1 - _BAR_HEIGHT - radius)
    position = [random.uniform(radius, limit) for limit in upper]
    step = [random.uniform(-_MAX_SPEED, _MAX_SPEED) / video_format.fps for _ in range(2)]
    if corner is not None:
        position = [limit if side else radius for side, limit in zip((corner % 2, corner // 2), upper, strict=True)]
        step = [0.1 * value for value in step]
    centers = []
    for _ in range(video_format.num_frames):
        centers.append((position[0], position[1]))
        for axis, limit in enumerate(upper):
            position[axis] += step[axis]
            if not radius <= position[axis] <= limit:
                step[axis] = -step[axis]
                position[axis] = min(max(position[axis], radius), limit)
    return tuple(centers)


def _inside(shape: str, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Pixels of a shape that spans -1..1; x is [1, side], y is [side, 1]."""
    square = (np.abs(x) <= 1) & (np.abs(y) <= 1)
    if shape == "square":
        return square
    if shape == "circle":
        return x * x + y * y <= 1
    return square & ((np.abs(x) <= 1 / 3) | (np.abs(y) <= 1 / 3))


def _blocky(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """The picture in 8 x 8 flat blocks."""
    num_frames, side = frames.shape[:2]
    block = side // 8
    means = frames.reshape(num_frames, 8, block, 8, block, 3).mean(axis=(2, 4))
    return means.repeat(block, axis=1).repeat(block, axis=2)
