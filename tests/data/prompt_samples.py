"""Samples of every task, for the tests of templates and prompts."""

from __future__ import annotations

from typing import Any

from megatron_vcr1.types import Sample, Video
from tests.rewards.samples import TARGETS

ANSWERS = {
    "temporal_grounding": "<answer>12.50 to 17.00</answer>",
    "grounded_qa": "<answer>B</answer><glue>[(1.00, 2.25), (4.00, 5.00)]</glue>",
    "multiple_choice_qa": "<answer>A</answer>",
    "captioning": "<answer>A dog barks.</answer>",
    "quality": "<answer>low quality</answer>",
    "numeric": "<answer>12.5</answer>",
    "free_form": "<answer>A dog barks.</answer>",
}


def sample(task: str, **changes: Any) -> Sample:
    """Return a sample; the changes may be of its fields, or of its only video's."""
    video = {key: changes.pop(key) for key in ("duration_s", "clip", "image_fps") if key in changes}
    media = (Video(changes.pop("video", "a.mp4"), **video),)
    fields: dict[str, Any] = {"id": "a", "media": media, "target": TARGETS[task], "query": "$5 for {this}?"}
    if task in ("grounded_qa", "multiple_choice_qa"):
        fields["options"] = ("a $dog", "a cat")
    return Sample(**{**fields, **changes})


def text_of(messages: list[dict[str, Any]]) -> str:
    (message,) = messages
    video, text = message["content"]
    assert (message["role"], video["type"], text["type"]) == ("user", "video", "text")
    return text["text"]
