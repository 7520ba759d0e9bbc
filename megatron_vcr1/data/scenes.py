"""Scenes of synthetic videos: moving shapes that appear and disappear, with a query and a target for each task.

A scene is a function of (seed, split, index) and the task. The order of the random draws is part of the data set: an
additional draw changes all videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from megatron_vcr1.data.video_types import frames_on_screen
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import (
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    NumberMetric,
    NumberTarget,
    QualityTarget,
    TextTarget,
    TrackingTarget,
)
from megatron_vcr1.types import NUM_TRACKED_FRAMES, OPTION_LETTERS, Box, Interval, Sample, Target, Video

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
"""Names of the splits. The queries of `unseen_pairs` are about pairs of colour and shape that no query of another split
is about. The events of `longer_events` last longer."""

_NUM_OBJECTS = 2
BAR_HEIGHT = 1 / 8
"""Height of the progress bar at the bottom, as a fraction of the frame. The bar shows the time, as in video players."""
_RADIUS = (0.156, 0.231)  # smallest and largest, as fractions of the frame's side
_MAX_SPEED = 0.0875  # frame sides per second, along each axis
_EVENT_S = (1.5, 4.0)  # shortest and longest event in seconds
_LONG_EVENT_S = (4.5, 6.5)


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """Size and frame rate of the square videos. Sides are whole H.264 macroblocks, so that no decoder has to crop.

    Attributes:
        side: width and height in pixels.
        num_frames: number of frames.
        fps: frames per second.
    """

    side: int = 64
    num_frames: int = 24
    fps: int = 2

    def __post_init__(self) -> None:
        if self.side < 32 or self.side % 16:
            raise UserError(f"side {self.side}: must be a multiple of 16 pixels, at least 32")
        if self.num_frames / self.fps < 8 or self.num_frames < NUM_TRACKED_FRAMES:
            raise UserError(f"{self.num_frames} frames at {self.fps} fps: needs at least 8 seconds and 8 frames")

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps


@dataclass(frozen=True, slots=True)
class MovingObject:
    """A moving shape: its appearance, the frames in which it is visible, and its position in every frame.

    Attributes:
        colour, shape: a key of COLOURS and one of SHAPES.
        radius: half of its width and height, as a fraction of the frame's side.
        first_frame, end_frame: first visible frame, and the frame after the last visible one.
        centers: [num_frames] centre (x, y) in every frame, visible or not, as fractions of the frame.
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
        """Return the bounding box in a frame, rounded to four decimals."""
        x, y = self.centers[frame]
        edges = (x - self.radius, y - self.radius, x + self.radius, y + self.radius)
        return Box(*(round(edge, 4) for edge in edges))


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one video.

    Attributes:
        id: id of the sample.
        task: task of the sample.
        format: size and frame rate.
        objects: the moving shapes. The query is about the first one; a caption describes all.
        low_quality: whether the video is coarse and noisy.
    """

    id: str
    task: str
    format: VideoFormat
    objects: tuple[MovingObject, ...]
    low_quality: bool


Prompt = tuple[str, tuple[str, ...], Target]
"""The query, the options and the target of a sample."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the scenes of a task are made, and what is asked about them.

    Attributes:
        prompt: returns the query, options and target of a scene.
        num_queried: number of objects that the query is about.
        always_visible: whether the queried object is visible in all frames.
        in_corner: whether the queried object stays in a corner.
        may_be_coarse: whether half of the videos are coarse and noisy.
    """

    prompt: Callable[[Scene], Prompt]
    num_queried: int = 1
    always_visible: bool = False
    in_corner: bool = False
    may_be_coarse: bool = False


def random_scene(split: str, index: int, *, seed: int, task: str, video_format: VideoFormat) -> Scene:
    """Generate scene number `index` of a split.

    Raises:
        UserError: there is no recipe for the task.
    """
    if task not in RECIPES:
        raise UserError(f"task {task}: there are no synthetic videos for it, only for {', '.join(RECIPES)}")
    random, recipe = Random(f"{seed}/{split}/{index}"), RECIPES[task]
    looks = _random_looks(random, recipe.num_queried, unseen=split == "unseen_pairs")
    event_s = _LONG_EVENT_S if split == "longer_events" else _EVENT_S
    objects = []
    for number, (colour, shape) in enumerate(looks):
        is_queried = number == 0
        first_frame, end_frame = _random_event(random, event_s, video_format)
        if is_queried and recipe.always_visible:
            first_frame, end_frame = 0, video_format.num_frames
        radius = random.uniform(*_RADIUS)
        corner = random.randrange(len(CORNERS)) if is_queried and recipe.in_corner else None
        centers = _random_walk(random, radius, corner, video_format)
        objects.append(MovingObject(colour, shape, radius, first_frame, end_frame, centers))
    low_quality = recipe.may_be_coarse and random.random() < 0.5
    return Scene(f"{split}_{index:06d}", task, video_format, tuple(objects), low_quality)


def sample_of_scene(scene: Scene, video: str) -> Sample:
    """Build the manifest sample of a scene: its query, options and target."""
    query, options, target = RECIPES[scene.task].prompt(scene)
    media = (Video(video, scene.format.duration_s),)
    return Sample(id=scene.id, media=media, target=target, query=query, options=options)


def _grounding_prompt(scene: Scene) -> Prompt:
    queried = scene.objects[0]
    return f"the {queried.name} is visible", (), GroundingTarget(queried.interval(scene.format.fps))


def _tracking_prompt(scene: Scene) -> Prompt:
    queried, num_frames = scene.objects[0], scene.format.num_frames
    picked = frames_on_screen(np.arange(num_frames), num_frames, NUM_TRACKED_FRAMES)
    return queried.name, (), TrackingTarget(tuple(queried.box(int(frame)) for frame in picked))


def _corner_prompt(scene: Scene) -> Prompt:
    queried = scene.objects[0]
    corner = OPTION_LETTERS[CORNERS.index(_place(queried, queried.first_frame))]
    target = GroundedChoiceTarget(corner, (queried.interval(scene.format.fps),))
    return f"In which corner is the {queried.name}?", CORNERS, target


def _colour_prompt(scene: Scene) -> Prompt:
    queried, random = scene.objects[0], Random(scene.id)
    colours = [queried.colour, *random.sample([colour for colour in COLOURS if colour != queried.colour], 3)]
    random.shuffle(colours)
    choice = OPTION_LETTERS[colours.index(queried.colour)]
    return f"What colour is the {queried.shape}?", tuple(colours), ChoiceTarget(choice)


def _caption_prompt(scene: Scene) -> Prompt:
    events = _events(scene)
    return "", (), CaptionTarget(" ".join(events), events)


def _quality_prompt(scene: Scene) -> Prompt:
    query = f"How good is the picture of this video? Choose one of these labels: {', '.join(QUALITY_LABELS)}."
    return query, (), QualityTarget(QUALITY_LABELS[not scene.low_quality])


def _duration_prompt(scene: Scene) -> Prompt:
    queried = scene.objects[0]
    target = NumberTarget(queried.interval(scene.format.fps).duration_s, NumberMetric.MEAN_RELATIVE_ACCURACY)
    return f"For how many seconds is the {queried.name} visible?", (), target


def _name_prompt(scene: Scene) -> Prompt:
    queried = scene.objects[0]
    return f"Which colour does the {queried.shape} have?", (), TextTarget(queried.colour)


RECIPES = {
    "temporal_grounding": Recipe(_grounding_prompt),
    "tracking": Recipe(_tracking_prompt, always_visible=True),
    "grounded_qa": Recipe(_corner_prompt, in_corner=True),
    "multiple_choice_qa": Recipe(_colour_prompt),
    "captioning": Recipe(_caption_prompt, num_queried=_NUM_OBJECTS),
    "quality": Recipe(_quality_prompt, may_be_coarse=True),
    "numeric": Recipe(_duration_prompt),
    "free_form": Recipe(_name_prompt),
}
"""The recipe of each task that has synthetic videos."""

PAPER_TASKS = tuple(RECIPES)[:6]
"""The tasks of VideoChat-R1, of which synthetic data consists unless other tasks are named."""


def _events(scene: Scene) -> tuple[str, ...]:
    """Describe the events in order of time."""
    events: list[tuple[int, str]] = []
    for moving in scene.objects:
        place = _place(moving, moving.first_frame)
        verb = "is there from the start" if moving.first_frame == 0 else "appears"
        events.append((moving.first_frame, f"A {moving.name} {verb} in the {place}."))
        if direction := _direction(moving):
            events.append((moving.first_frame + 1, f"The {moving.name} moves {direction}."))
        if moving.end_frame < scene.format.num_frames:
            events.append((moving.end_frame, f"The {moving.name} disappears."))
    return tuple(text for _, text in sorted(events, key=lambda event: event[0]))


def _place(moving: MovingObject, frame: int) -> str:
    x, y = moving.centers[frame]
    return CORNERS[2 * (y >= (1 - BAR_HEIGHT) / 2) + (x >= 0.5)]


def _direction(moving: MovingObject) -> str | None:
    """Return the main direction from the first to the last visible frame; None if the shape hardly moves."""
    (x0, y0), (x1, y1) = moving.centers[moving.first_frame], moving.centers[moving.end_frame - 1]
    if max(abs(x1 - x0), abs(y1 - y0)) < 0.1:
        return None
    if abs(x1 - x0) >= abs(y1 - y0):
        return "to the right" if x1 > x0 else "to the left"
    return "down" if y1 > y0 else "up"


def _random_looks(random: Random, num_queried: int, *, unseen: bool) -> list[tuple[str, str]]:
    """Choose distinct colours and shapes for the objects; the first `num_queried` pairs belong to the split."""
    while True:
        colours, shapes = random.sample(range(len(COLOURS)), _NUM_OBJECTS), random.sample(range(3), _NUM_OBJECTS)
        # A third of the pairs, two colours of each shape, is reserved for the split unseen_pairs.
        reserved = [(colour + shape) % 3 == 0 for colour, shape in zip(colours, shapes, strict=True)]
        if all(is_reserved == unseen for is_reserved in reserved[:num_queried]):
            names = list(COLOURS)
            return [(names[colour], SHAPES[shape]) for colour, shape in zip(colours, shapes, strict=True)]


def _random_event(random: Random, event_s: tuple[float, float], video_format: VideoFormat) -> tuple[int, int]:
    """Choose the first visible frame and the frame after the last visible one."""
    shortest, longest = (round(length_s * video_format.fps) for length_s in event_s)
    length = random.randint(max(shortest, 1), longest)
    first_frame = random.randint(0, video_format.num_frames - length)
    return first_frame, first_frame + length


def _random_walk(
    random: Random, radius: float, corner: int | None, video_format: VideoFormat
) -> tuple[tuple[float, float], ...]:
    """Return the centres [num_frames] of an object that moves in a straight line and bounces off the edges.

    Args:
        corner: index into CORNERS; the object starts there and moves slowly. None starts anywhere.
    """
    upper = (1 - radius, 1 - BAR_HEIGHT - radius)
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
