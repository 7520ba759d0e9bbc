#!/usr/bin/env python3
"""Write docs/manifests.md from the tasks and the keys of a row: `python docs/generate_manifests.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vcr1.data.rows import KEYS, row_from_sample
from megatron_vcr1.data.scenes import VideoFormat, random_scene, sample_of_scene
from megatron_vcr1.tasks import BUILT_IN_TASKS, Task, find_task
from megatron_vcr1.types import Sample

PAGE = Path(__file__).with_name("manifests.md")
INTRODUCTION = """# Manifests

A manifest is a text file with one JSON object per line, each of which is one sample. This page is generated from the
tasks (`python docs/generate_manifests.py`). `vcr1 data check` reports every line that does not fit, with its number,
the key and what to do. An unknown key is an error, so that a typing mistake does not go unnoticed.

A sample has these keys:

| key | value | required | meaning |
|---|---|---|---|"""
TASKS = """
The tasks differ in the keys of `target`, and in whether they need a `query` and `options`. The parts of the reward are
explained in [Rewards](rewards.md). The prompts are the defaults; a [template file](templates.md) replaces them.
[A task of your own](own_task.md) adds to this list.
"""


_MEDIA = {
    "one video": "exactly one video, and images if there are any",
    "some": "at least one video or image",
    None: "any number of videos and images, or only text",
}


def render() -> str:
    """Return the whole page as Markdown."""
    keys = [f"| `{key.name}` | {key.form} | {key.required} | {key.meaning} |" for key in KEYS]
    return "\n".join([INTRODUCTION, *keys, TASKS, *(_section(find_task(name)) for name in BUILT_IN_TASKS)])


def _section(task: Task[Any]) -> str:
    sample = sample_of_scene(
        random_scene("train", 0, seed=0, task=task.name, video_format=VideoFormat()), "videos/000000.mp4"
    )
    fields = [
        f"| `{field.key}` | `{field.form.name}` | {'yes' if field.required else 'no'} | {field.meaning} |"
        for field in task.target_fields
    ]
    return "\n".join(
        [
            f"## {task.name}",
            "",
            " ".join((type(task).__doc__ or "").split()),
            "",
            "| key of `target` | value | required | meaning |",
            "|---|---|---|---|",
            *fields,
            "",
            f"Media: {_MEDIA[task.needs_media]}. "
            f"`query`: {'required' if task.needs_query else 'may be empty'}. "
            f"`options`: {'required, 1 to 7' if task.has_options else 'none'}. "
            f"Parts of the reward: {', '.join(['format', *_parts(task, sample)])}.",
            "",
            "```json",
            json.dumps(row_from_sample(sample)),
            "```",
            "",
            "The prompt without and with thinking:",
            "",
            "```text",
            task.answer_prompt.strip(),
            "```",
            "",
            "```text",
            task.think_prompt.strip(),
            "```",
            "",
        ]
    )


def _parts(task: Task[Any], sample: Sample) -> list[str]:
    return list(task.reward_parts(sample, "", None))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
