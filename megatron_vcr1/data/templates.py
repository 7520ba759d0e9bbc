"""Prompt templates: reading their file, building messages from them, and formatting targets as they ask for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import NumberFormat, Task, find_task, lettered_options, task_names, task_of
from megatron_vcr1.text_files import read_toml
from megatron_vcr1.types import MARKS, Image, Sample, Video, interleave

DEFAULT_TEMPLATES = "default"
PRESETS = (DEFAULT_TEMPLATES, "videochat_r1")
"""Names of the templates that come with the package: the tasks' own prompts, and files of the folder `presets`."""

_DECIMALS = ("time_decimals", "coordinate_decimals")
_SWITCHES = ("trim_coordinates", "text_first", "options_as_list")
_PROMPTS = ("answer", "think")
_NORMALIZE = "normalize_query"


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """The prompt templates of all tasks.

    Attributes:
        answer: templates of prompts that ask for the answer alone, by task; a task without one has its default prompt.
        think: templates of prompts that ask for reasoning before the answer, by task, likewise.
        numbers: how prompts and target texts write numbers.
        text_first: whether the text comes before the media of a prompt.
        options_as_list: whether $options is written as a list in one line instead of one option per line.
        normalized: the tasks whose query is written in lower case and without a final period.
    """

    answer: Mapping[str, Template] = field(default_factory=dict)
    think: Mapping[str, Template] = field(default_factory=dict)
    numbers: NumberFormat = field(default_factory=NumberFormat)
    text_first: bool = False
    options_as_list: bool = False
    normalized: frozenset[str] = frozenset()

    def of_task(self, task: Task[Any], *, thinking: bool) -> Template:
        """Return the template of a task."""
        default = task.think_prompt if thinking else task.answer_prompt
        return (self.think if thinking else self.answer).get(task.name) or Template(default.strip())

    def text_of(self, sample: Sample, *, thinking: bool) -> str:
        """Return the text of a sample's prompt."""
        task = task_of(sample)
        if task.name in self.normalized:
            sample = replace(sample, query=normalized_query(sample.query))
        values = task.placeholders(sample, self.numbers)
        if self.options_as_list and sample.options:
            values["options"] = repr(lettered_options(sample.options))
        return self.of_task(task, thinking=thinking).substitute(values)

    def text_of_query(
        self, task: Task[Any], query: str, options: Sequence[str], values: Mapping[str, str], *, thinking: bool
    ) -> str:
        """Return the text of a prompt for a query without a target.

        Args:
            task: the task.
            query: the event, object, question or instruction.
            options: the options of multiple choice.
            values: values of the placeholders that state a part of the target, such as the first box of tracking.
            thinking: whether to ask for reasoning before the answer.

        Raises:
            KeyError: a placeholder has no value.
        """
        if task.name in self.normalized:
            query = normalized_query(query)
        filled = {**task.query_placeholders(query, options, self.numbers), **values}
        if self.options_as_list and options:
            filled["options"] = repr(lettered_options(options))
        return self.of_task(task, thinking=thinking).substitute(filled)

    def asked_like(self, task: Task[Any], other: Task[Any]) -> PromptTemplates:
        """Return templates that ask the samples of a task with the prompts of another task.

        Raises:
            ValueError: the other task's prompts state something that these samples do not have.
        """
        answer, think = (self.of_task(other, thinking=thinking) for thinking in (False, True))
        used = {*answer.get_identifiers(), *think.get_identifiers()}
        if missing := sorted(used - task.required_placeholders - task.optional_placeholders):
            raise ValueError(f"prompts of {other.name} state ${missing[0]}, which samples of {task.name} do not have")
        return replace(self, answer={**self.answer, task.name: answer}, think={**self.think, task.name: think})


def template_file(templates: str | Path | None) -> Path | None:
    """Return the file of templates, given by the name of a preset or by a path; None for the default.

    Raises:
        UserError: it is a plain word, but not the name of a preset.
    """
    name = DEFAULT_TEMPLATES if templates is None else str(templates)
    if name == DEFAULT_TEMPLATES:
        return None
    if name in PRESETS:
        return Path(__file__).with_name("presets") / f"{name}.toml"
    if Path(name).name == name and not Path(name).suffix and not Path(name).exists():
        raise UserError(f"{name}: neither templates of the package ({', '.join(PRESETS)}) nor a file; name one of them")
    return Path(name)


def load_templates(templates: str | Path | None = None) -> PromptTemplates:
    """Read templates: a preset by its name, or a file. What a file leaves out is inherited from the tasks' own prompts.

    Raises:
        UserError: the file is not TOML, or a task, key or placeholder is missing or unknown; names the file and key.
    """
    path = template_file(templates)
    if path is None:
        return PromptTemplates()
    content = read_toml(path)
    settings = (*_DECIMALS, *_SWITCHES)
    if unknown := [key for key in content if key not in (*task_names(), *settings)]:
        known = ", ".join((*task_names(), *settings))
        raise UserError(f"{path}: key '{unknown[0]}' is unknown; known are {known}")
    decimals = {key: content[key] for key in _DECIMALS if key in content}
    for key, value in decimals.items():
        if type(value) is not int or not 0 <= value <= 6:
            raise UserError(f"{path}: {key} must be a whole number from 0 to 6, got {value!r}")
    switches = {key: content[key] for key in _SWITCHES if key in content}
    for key, value in switches.items():
        if type(value) is not bool:
            raise UserError(f"{path}: {key} must be true or false, got {value!r}")
    tables = {name: _checked_table(content[name], name, path) for name in content if name not in settings}
    answer, think = (
        {
            name: find_task(name).checked_template(table[key], f"{path}: {name}.{key}")
            for name, table in tables.items()
            if key in table
        }
        for key in _PROMPTS
    )
    numbers = NumberFormat(**decimals, trim_coordinates=switches.pop("trim_coordinates", False))
    normalized = frozenset(name for name, table in tables.items() if table.get(_NORMALIZE))
    return PromptTemplates(answer, think, numbers, normalized=normalized, **switches)


def normalized_query(query: str) -> str:
    """Return a query in lower case and without a final period. A text like ``<IMAGE>`` must not become a mark."""
    parts = re.split(f"({'|'.join(MARKS)})", query.strip(), flags=re.IGNORECASE)
    lowered = "".join(part if index % 2 else part.lower() for index, part in enumerate(parts))
    return lowered.removesuffix(".").rstrip()


def build_messages(
    sample: Sample,
    templates: PromptTemplates,
    *,
    thinking: bool,
    video_options: Mapping[str, float] | None = None,
    limits: Sequence[Mapping[str, int]] = (),
) -> list[dict[str, Any]]:
    """Build a sample's prompt as chat messages for `encode_messages`.

    Args:
        sample: the sample.
        templates: the prompt templates.
        thinking: whether to ask for reasoning before the answer.
        video_options: options of the video parts (fps, max_frames, total_pixels ...). For tracking, the number of
            frames is always the number of boxes.
        limits: options of each medium that override `video_options`, to make it smaller; empty for none.
    """
    content: list[dict[str, Any]] = []
    remaining_limits = iter(limits)
    text = templates.text_of(sample, thinking=thinking)
    for part in interleave(text, sample.media, text_first=templates.text_first):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        limit = next(remaining_limits, {})
        if isinstance(part, Image):
            content.append({"type": "image", "image": part.path, **limit})
        else:
            options = {**(video_options or {}), **limit, **task_of(sample).video_options(sample)}
            content.append({"type": "video", **video_arguments(part, options)})
    return [{"role": "user", "content": content}]


def video_arguments(video: Video, options: Mapping[str, float]) -> dict[str, Any]:
    """Return a video and the options to read it with: the given options, overridden by its own clip and image rate."""
    path = video.path
    merged: dict[str, Any] = {"video": path if isinstance(path, str) else list(path), **options}
    if video.image_fps is not None:
        merged["image_fps"] = video.image_fps
    elif not isinstance(path, str) and video.duration_s is not None:
        merged["image_fps"] = len(path) / video.duration_s
    if video.clip is not None:
        merged |= {"start_s": video.clip.start_s, "end_s": video.clip.end_s}
    return merged


def target_text(sample: Sample, templates: PromptTemplates) -> str:
    """Format a sample's target as the prompt without thinking asks for it: the SFT target."""
    return task_of(sample).target_text(sample, templates.numbers)


def _checked_table(table: object, name: str, path: str | Path) -> dict[str, Any]:
    """Check that the table of a task holds "answer", "think" or "normalize_query", and nothing else."""
    if not isinstance(table, dict) or not table or not set(table) <= {*_PROMPTS, _NORMALIZE}:
        raise UserError(
            f"{path}: [{name}] must hold one or both of the strings 'answer' and 'think', or {_NORMALIZE}, and nothing "
            "else"
        )
    if type(table.get(_NORMALIZE, False)) is not bool:
        raise UserError(f"{path}: {name}.{_NORMALIZE} must be true or false, got {table[_NORMALIZE]!r}")
    return table
