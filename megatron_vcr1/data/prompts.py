"""What the model is asked: templates to messages, messages to an encoded prompt that fits, and the target's text."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.errors import UserError
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


class PromptTooLongError(ValueError):
    """A prompt that does not fit even with its video at the least size; the message names the sample."""


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """The wording of the prompts and the precision of the numbers in them."""

    answer: Mapping[Task, Template]
    think: Mapping[Task, Template]
    time_decimals: int
    coordinate_decimals: int


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """A sample whose prompt is ready for the rollout and for training."""

    sample: VideoSample
    prompt: EncodedPrompt
    reduction: str | None
    """What had to be lowered for the prompt to fit; None if nothing."""


def load_templates(path: str | Path | None = None) -> PromptTemplates:
    """Reads a template file; without a path the one that comes with the package.

    Raises:
        UserError: the file is not TOML, or lacks or misspells a task, key or placeholder; names file and key.
    """
    file = resources.files("megatron_vcr1.data") / "templates.toml" if path is None else Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: cannot be read as TOML: {error}") from error
    decimals = {"time_decimals", "coordinate_decimals"}
    if problem := _first_difference(set(content), {*Task, *decimals}):
        raise UserError(f"{file}: {problem}")
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
    """The conversation that asks a sample's question, in the form that `encode_messages` takes.

    Args:
        thinking: ask for reasoning before the answer.
        video_options: options of the video part (fps, max_frames, total_pixels ...). Tracking fixes the number of
            frames itself: one for each box.
    """
    wording = (templates.think if thinking else templates.answer)[sample.task]
    text = wording.substitute(_placeholders(sample, templates))
    video = {"type": "video", **video_arguments(sample, video_options)}
    return [{"role": "user", "content": [video, {"type": "text", "text": text}]}]


def video_arguments(sample: VideoSample, options: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A sample's video and the options to read it with: those that are asked for, and what the sample itself fixes."""
    video = sample.video if isinstance(sample.video, str) else list(sample.video)
    return {"video": video, **_video_options(sample, options or {})}


def target_text(sample: VideoSample, templates: PromptTemplates) -> str:
    """The right answer as the no-thinking prompt asks for it; what SFT trains on."""

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


def prepare_sample(
    sample: VideoSample,
    templates: PromptTemplates,
    processor: PromptProcessor,
    *,
    thinking: bool,
    max_tokens: int,
    video_options: Mapping[str, float] | None = None,
    read: Callable[..., VideoFrames] = read_frames,
) -> PreparedSample:
    """Encodes a sample's prompt so that it fits; a video that is too long for it is decoded again, smaller.

    Nothing is ever cut out of the token sequence: first the video's pixels are lowered, then, at the least frame size,
    its number of frames.

    Args:
        max_tokens: most tokens of the prompt, text and video together.
        read: what decodes a video, see `encode_messages`.

    Raises:
        VideoError: the video cannot be read, or has fewer frames than tracking has boxes.
        PromptTooLongError: it does not fit at any size; names the sample.
    """
    options = dict(video_options or {})

    def encode() -> EncodedPrompt:
        messages = build_messages(sample, templates, thinking=thinking, video_options=options)
        return encode_messages(messages, processor, read=read)

    prompt = encode()
    num_tokens = len(prompt.token_ids)
    reduction = None
    if num_tokens > max_tokens:
        num_text_tokens = num_tokens - sum(vision.num_tokens(processor.merge_size) for vision in prompt.vision)
        num_frames = len(prompt.vision[0].frames)
        options |= smaller_video(num_frames, max_tokens - num_text_tokens, processor, options)
        prompt = encode()
        reduction = f"{num_tokens} prompt tokens lowered to {len(prompt.token_ids)}: {_size_change(num_frames, prompt)}"
        if len(prompt.token_ids) > max_tokens:
            raise PromptTooLongError(
                f"sample {sample.id}: {num_tokens} prompt tokens, {len(prompt.token_ids)} at the least video size; "
                f"allow more than {max_tokens}, or lower the video's min_pixels or min_frames"
            )
    if isinstance(sample.target, TrackingTarget) and len(prompt.vision[0].frames) != len(sample.target.boxes):
        num_frames = len(prompt.vision[0].frames)
        raise VideoError(sample.video, f"it gives {num_frames} frames, tracking has {len(sample.target.boxes)} boxes")
    return PreparedSample(sample, prompt, reduction)


def smaller_video(
    num_frames: int, max_video_tokens: int, processor: PromptProcessor, options: Mapping[str, float]
) -> dict[str, int]:
    """Options under which a video of ``num_frames`` fills at most ``max_video_tokens``, if the least sizes admit it.

    A video within ``total_pixels`` fills at most total_pixels / factor**2 tokens, unless ``min_pixels`` (and 5 % more,
    see `max_pixels_per_frame`) holds its frames up; then frames are left out.
    """
    pixels = max(max_video_tokens, 1) * processor.factor**2
    least_frame_pixels = int(options.get("min_pixels", 16 * 28 * 28) * 1.05)
    most_frames = processor.temporal_patch_size * pixels // least_frame_pixels
    if most_frames >= num_frames:
        return {"total_pixels": pixels}
    least_frames = int(options.get("min_frames", 4))
    return {"total_pixels": pixels, "max_frames": max(most_frames - most_frames % 2, least_frames)}


def _size_change(num_frames: int, prompt: EncodedPrompt) -> str:
    frames = prompt.vision[0].frames
    return f"{num_frames} frames became {len(frames)} of {frames.shape[2]}x{frames.shape[1]} pixels"


def _video_options(sample: VideoSample, options: Mapping[str, float]) -> dict[str, float]:
    """The video part's options: what the run asks for, and what the sample itself fixes."""
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
    values = {"query": sample.query}
    if sample.options:
        letters = OPTION_LETTERS[: len(sample.options)]
        values["options"] = "\n".join(f"({a}) {text}" for a, text in zip(letters, sample.options, strict=True))
    if isinstance(sample.target, TrackingTarget):
        values["num_frames"] = str(len(sample.target.boxes))
        values["first_box"] = _box_text(sample.target.boxes[0], templates)
    return values


def _box_text(box: Box, templates: PromptTemplates) -> str:
    values = (box.x0, box.y0, box.x1, box.y1)
    return f"[{', '.join(f'{value:.{templates.coordinate_decimals}f}' for value in values)}]"


def _template(content: Mapping[str, Any], task: Task, key: str, file: object) -> Template:
    section = content[task]
    if not isinstance(section, dict) or set(section) != {"answer", "think"}:
        raise UserError(f"{file}: [{task}] must hold two texts, 'answer' and 'think'")
    if not isinstance(section[key], str):
        raise UserError(f"{file}: {task}.{key} must be a text")
    template = Template(section[key].strip())
    if not template.is_valid():
        raise UserError(f"{file}: {task}.{key} has a stray dollar sign; write $$ for a literal one")
    used, required = set(template.get_identifiers()), _REQUIRED_PLACEHOLDERS[task]
    allowed = required | _OPTIONAL_PLACEHOLDERS.get(task, set())
    if problem := _first_difference(used | (allowed - required), allowed):
        raise UserError(f"{file}: {task}.{key}: placeholder {problem}")
    return template


def _first_difference(given: set[str], expected: set[str]) -> str | None:
    """What is missing from the names or unknown among them, in words; None if they are the same."""
    if missing := sorted(expected - given):
        return f"'{missing[0]}' is missing"
    if unknown := sorted(given - expected):
        return f"'{unknown[0]}' is unknown; known are {', '.join(sorted(expected))}"
    return None
