"""Prompt templates: reading their file, building messages from them, and formatting targets as they ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import NumberFormat, Task, find_task, task_names, task_of
from megatron_vcr1.text_files import read_toml
from megatron_vcr1.types import VideoSample

_DECIMALS = ("time_decimals", "coordinate_decimals")
_PROMPTS = ("answer", "think")


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """The prompt templates of all tasks.

    Attributes:
        answer: templates of prompts that ask for the answer alone, by task; a task without one has its default prompt.
        think: templates of prompts that ask for reasoning before the answer, by task, likewise.
        numbers: how prompts and target texts write numbers.
    """

    answer: Mapping[str, Template] = field(default_factory=dict)
    think: Mapping[str, Template] = field(default_factory=dict)
    numbers: NumberFormat = field(default_factory=NumberFormat)

    def of_task(self, task: Task[Any], *, thinking: bool) -> Template:
        """Return the template of a task."""
        default = task.think_prompt if thinking else task.answer_prompt
        return (self.think if thinking else self.answer).get(task.name) or Template(default.strip())


def load_templates(path: str | Path | None = None) -> PromptTemplates:
    """Read a template file. What it leaves out is inherited from the tasks' own prompts; None inherits everything.

    Raises:
        UserError: the file is not TOML, or a task, key or placeholder is missing or unknown; names the file and key.
    """
    if path is None:
        return PromptTemplates()
    content = read_toml(path)
    if unknown := [key for key in content if key not in (*task_names(), *_DECIMALS)]:
        known = ", ".join((*task_names(), *_DECIMALS))
        raise UserError(f"{path}: key '{unknown[0]}' is unknown; known are {known}")
    decimals = {key: content[key] for key in _DECIMALS if key in content}
    for key, value in decimals.items():
        if type(value) is not int or not 0 <= value <= 6:
            raise UserError(f"{path}: {key} must be a whole number from 0 to 6, got {value!r}")
    tables = {name: _checked_table(content[name], name, path) for name in content if name not in decimals}
    answer, think = (
        {name: _template(table[key], find_task(name), key, path) for name, table in tables.items() if key in table}
        for key in _PROMPTS
    )
    return PromptTemplates(answer, think, NumberFormat(**decimals))


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
    task = task_of(sample)
    text = templates.of_task(task, thinking=thinking).substitute(task.placeholders(sample, templates.numbers))
    video = {"type": "video", **video_arguments(sample, video_options)}
    return [{"role": "user", "content": [video, {"type": "text", "text": text}]}]


def video_arguments(sample: VideoSample, options: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return a sample's video and the options to read it with: the given options, overridden by the sample's own."""
    video = sample.video if isinstance(sample.video, str) else list(sample.video)
    return {"video": video, **_video_options(sample, options or {})}


def target_text(sample: VideoSample, templates: PromptTemplates) -> str:
    """Format a sample's target as the prompt without thinking asks for it: the SFT target."""
    return task_of(sample).target_text(sample, templates.numbers)


def _video_options(sample: VideoSample, options: Mapping[str, float]) -> dict[str, float]:
    """Override options with those that the sample determines: the target's, image rate and clip."""
    merged = {**options, **task_of(sample).video_options(sample)}
    if isinstance(sample.video, tuple) and sample.duration_s is not None:
        merged["image_fps"] = len(sample.video) / sample.duration_s
    if sample.image_fps is not None:
        merged["image_fps"] = sample.image_fps
    if sample.clip is not None:
        merged |= {"start_s": sample.clip.start_s, "end_s": sample.clip.end_s}
    return merged


def _checked_table(table: object, name: str, path: str | Path) -> dict[str, str]:
    """Check that the table of a task holds "answer", "think" or both, and nothing else."""
    if not isinstance(table, dict) or not table or not set(table) <= set(_PROMPTS):
        raise UserError(f"{path}: [{name}] must hold one or both of the strings 'answer' and 'think', and nothing else")
    return table


def _template(text: object, task: Task[Any], key: str, path: str | Path) -> Template:
    """Check the text of a template; `key` is "answer" or "think"."""
    where = f"{path}: {task.name}.{key}"
    if not isinstance(text, str):
        raise UserError(f"{where} must be a string")
    template = Template(text.strip())
    if not template.is_valid():
        raise UserError(f"{where} has a stray dollar sign; write $$ for a literal one")
    used, required = set(template.get_identifiers()), task.required_placeholders
    if missing := sorted(required - used):
        raise UserError(f"{where}: placeholder '{missing[0]}' is missing")
    allowed = required | task.optional_placeholders
    if unknown := sorted(used - allowed):
        raise UserError(f"{where}: placeholder '{unknown[0]}' is unknown; known are {', '.join(sorted(allowed))}")
    return template
