"""Samples to score; their videos do not exist."""

from __future__ import annotations

from megatron_vcr1.tasks import CaptionTarget, ChoiceTarget
from megatron_vcr1.types import Sample, Video


def choices(*ids: str, video: str = "", category: str = "") -> list[Sample]:
    """Multiple-choice samples with four options; A is correct."""
    return [
        Sample(id, (Video(video or f"{id}.mp4"),), ChoiceTarget("A"), "what?", options=tuple("wxyz"), category=category)
        for id in ids
    ]


def captions(*ids: str, events: tuple[str, ...] = ("A dog barks.", "A cat runs.")) -> list[Sample]:
    return [Sample(id, (Video(f"{id}.mp4"),), CaptionTarget("A dog barks. A cat runs.", events)) for id in ids]
