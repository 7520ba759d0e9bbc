"""Prompts among the ranks of a copy of the model: one of them decodes, and those that look at the frames get them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from megatron_vcr1.parallel import collectives, mesh

T = TypeVar("T")


def share_prompts(produce: Callable[[], list[T]]) -> list[T]:
    """Broadcast dataclasses that hold an EncodedPrompt as `prompt` within a replica; others are sent as they are.

    The ranks of the first pipeline stage, which has the vision tower, get the frames, on the CPU: a pickled CUDA tensor
    would come back on the GPU that decoded it. Those of later stages get frames without content (device "meta").
    """
    if mesh.ranks_per_replica() == 1:
        return produce()
    whole: list[T] = []

    def outlines() -> list[T]:
        whole.extend(produce())
        return [_on_device(one, "meta") for one in whole]

    shared = collectives.broadcast_within_replica(outlines)
    if mesh.is_first_stage():
        shared = collectives.broadcast_within_stage(lambda: [_on_device(one, "cpu") for one in whole])
    return shared


def _on_device(one: Any, device: str) -> Any:
    return replace(one, prompt=one.prompt.frames_on(device)) if hasattr(one, "prompt") else one
