"""Prompt templates: reading their file, building messages from them, and formatting targets as they ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import parse_toml, read_toml
from megatron_vcr1.types import (
    OPTION_LETTERS,
    Box,
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    QualityTarget,
    Task,
    TrackingTarget,
    VideoSample,
)

_REQUIRED_PLACEHOLDERS = {
    Task.TEMPORAL_GROUNDING: {"query"},
    Task.TRACKING: {"query"},
    Task.GROUNDED_QA: {"query", "options"},
    Task.MULTIPLE_CHOICE_QA: {"query", "options"},
    Task.CAPTIONING: set[str](),
    Task.QUALITY: {"query"},
}
_OPTIONAL_PLACEHOLDERS = {Task.TRACKING: {"num_frames", "first_box"}, Task.CAPTIONING: {"query"}}


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """The prompt templates of all tasks.

    Attributes:
        answer: templates of prompts that ask for the answer alone.
        think: templates of prompts that ask for reasoning before the answer.
        time_decimals: number of decimals of the seconds in target texts.
        coordinate_decimals: number of decimals of box coordinates in prompts and target texts.
    """

    answer: Mapping[Task, Template]
    think: Mapping[Task, Template]
    time_decimals: int
    coordinate_decimals: int


def load_templates(path: str | Path | None = None) -> PromptTemplates:
    """Read a template file; None reads `templates.toml` of this package.

    Raises:
        UserError: the file is not TOML, or a task, key or placeholder is missing or unknown; names the file and key.
    """
    file = resources.files("megatron_vcr1.data") / "templates.toml" if path is None else Path(path)
    content = parse_toml(file.read_text(encoding="utf-8"), file) if path is None else read_toml(path)
    decimals = {"time_decimals", "coordinate_decimals"}
    if problem := _first_difference(set(content), {*Task, *decimals}):
        raise UserError(f"{file}: key {problem}")
    for key in decimals:
        if type(content[key]) is not int or not 0 <= content[key] <= 6:
            raise UserError(f"{file}: {key} must be a whole number from 0 to 6, got {content[key]!r}")
    return PromptTemplates(
        answer={task: _template(content, task, "answer", file) for task in Task},
        think={task: _template(content, task, "think", file) for task in Task},
        time_decimals=content["time_decimals"],
        coordinate_decimals=content["coordinate_decimals"],
    )


def build_messages(
    sample: VideoSample,
    templates: PromptTemplates,
    *,
    thinking: bool,
    video_options: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Build a sample's prompt as chat messages for `encode_messages`.

    Args:
        sample: the sample.
        templates: the prompt templates.
        thinking: whether to ask for reasoning before the answer.
        video_options: options of the video part (fps, max_frames, total_pixels ...). For tracking, the number of frames
            is always the number of boxes.
    """
    template = (templates.think if thinking else templates.answer)[sample.task]
    text = template.substitute(_placeholders(sample, templates))
    video = {"type": "video", **video_arguments(sample, video_options)}
    return [{"role": "user", "content": [video, {"type": "text", "text": text}]}]


def video_arguments(sample: VideoSample, options: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return a sample's video and the options to read it with: the given options, overridden by the sample's own."""
    video = sample.video if isinstance(sample.video, str) else list(sample.video)
    return {"video": video, **_video_options(sample, options or {})}


def target_text(sample: VideoSample, templates: PromptTemplates) -> str:
    """Format a sample's target as the prompt without thinking asks for it: the SFT target."""

    def seconds(value: float) -> str:
        return f"{value:.{templates.time_decimals}f}"

    match sample.target:
        case GroundingTarget(interval):
            return f"<answer>{seconds(interval.start_s)} to {seconds(interval.end_s)}</answer>"
        case TrackingTarget(boxes):
            return f"<answer>[{', '.join(_box_text(box, templates) for box in boxes)}]</answer>"
        case GroundedChoiceTarget(choice, intervals):
            spans = ", ".join(f"({seconds(span.start_s)}, {seconds(span.end_s)})" for span in intervals)
            return f"<answer>{choice}</answer><glue>[{spans}]</glue>"
        case ChoiceTarget(choice):
            return f"<answer>{choice}</answer>"
        case CaptionTarget(caption, _):
            return f"<answer>{caption}</answer>"
        case QualityTarget(label):
            return f"<answer>{label}</answer>"


def _video_options(sample: VideoSample, options: Mapping[str, float]) -> dict[str, float]:
    """Override options with those that the sample determines: number of tracked frames, image rate and clip."""
    merged = dict(options)
    if isinstance(sample.target, TrackingTarget):
        merged |= {"min_frames": len(sample.target.boxes), "max_frames": len(sample.target.boxes)}
    if isinstance(sample.video, tuple) and sample.duration_s is not None:
        merged["image_fps"] = len(sample.video) / sample.duration_s
    if sample.image_fps is not None:
        merged["image_fps"] = sample.image_fps
    if sample.clip is not None:
        merged |= {"start_s": sample.clip.start_s, "end_s": sample.clip.end_s}
    return merged


def _placeholders(sample: VideoSample, templates: PromptTemplates) -> dict[str, str]:
    """Return the value of each placeholder that a template of the sample's task may use."""
    values = {"query": sample.query}
    if sample.options:
        letters = OPTION_LETTERS[: len(sample.options)]
        options = zip(letters, sample.options, strict=True)
        values["options"] = "\n".join(f"({letter}) {text}" for letter, text in options)
    if isinstance(sample.target, TrackingTarget):
        values["num_frames"] = str(len(sample.target.boxes))
        values["first_box"] = _box_text(sample.target.boxes[0], templates)
    return values


def _box_text(box: Box, templates: PromptTemplates) -> str:
    values = (box.x0, box.y0, box.x1, box.y1)
    return f"[{', '.join(f'{value:.{templates.coordinate_decimals}f}' for value in values)}]"


def _template(content: Mapping[str, Any], task: Task, key: str, file: object) -> Template:
    """Read and check the template `key` ("answer" or "think") of a task."""
    section = content[task]
    if not isinstance(section, dict) or set(section) != {"answer", "think"}:
        raise UserError(f"{file}: [{task}] must hold two strings, 'answer' and 'think'")
    if not isinstance(section[key], str):
        raise UserError(f"{file}: {task}.{key} must be a string")
    template = Template(section[key].strip())
    if not template.is_valid():
        raise UserError(f"{file}: {task}.{key} has a stray dollar sign; write $$ for a literal one")
    used, required = set(template.get_identifiers()), _REQUIRED_PLACEHOLDERS[task]
    allowed = required | _OPTIONAL_PLACEHOLDERS.get(task, set())
    if problem := _first_difference(used | (allowed - required), allowed):
        raise UserError(f"{file}: {task}.{key}: placeholder {problem}")
    return template


def _first_difference(given: set[str], expected: set[str]) -> str | None:
    """Describe the first missing or unknown name; None if the names are as expected."""
    if missing := sorted(expected - given):
        return f"'{missing[0]}' is missing"
    if unknown := sorted(given - expected):
        return f"'{unknown[0]}' is unknown; known are {', '.join(sorted(expected))}"
    return None
