"""Samples of every task, for the tests of templates and prompts."""

from __future__ import annotations

from typing import Any

from megatron_vcr1.types import Task, VideoSample
from tests.rewards.samples import TARGETS

ANSWERS = {
    Task.TEMPORAL_GROUNDING: "<answer>12.50 to 17.00</answer>",
    Task.GROUNDED_QA: "<answer>B</answer><glue>[(1.00, 2.25), (4.00, 5.00)]</glue>",
    Task.MULTIPLE_CHOICE_QA: "<answer>A</answer>",
    Task.CAPTIONING: "<answer>A dog barks.</answer>",
    Task.QUALITY: "<answer>low quality</answer>",
}


def sample(task: Task, **changes: Any) -> VideoSample:
    fields: dict[str, Any] = {"id": "a", "video": "a.mp4", "target": TARGETS[task], "query": "$5 for {this}?"}
    if task in (Task.GROUNDED_QA, Task.MULTIPLE_CHOICE_QA):
        fields["options"] = ("a $dog", "a cat")
    return VideoSample(**{**fields, **changes})


def text_of(messages: list[dict[str, Any]]) -> str:
    (message,) = messages
    video, text = message["content"]
    assert (message["role"], video["type"], text["type"]) == ("user", "video", "text")
    return text["text"]
