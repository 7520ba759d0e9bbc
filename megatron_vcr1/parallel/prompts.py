"""Prompts within a replica: one rank decodes their videos, and the ranks that need the frames receive them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from megatron_vcr1.parallel import collectives, mesh

T = TypeVar("T")


def broadcast_prompts(produce: Callable[[], list[T]]) -> list[T]:
    """Call `produce` on the leader of each replica and return its items on all ranks of that replica.

    Frames are large, and only the vision tower reads them, which is on the first pipeline stage. The ranks of that
    stage receive them on the CPU: a pickled CUDA tensor would be restored on the GPU that decoded it. The ranks of
    later stages receive frames without content (device "meta"), which keep their shape.

    Args:
        produce: returns dataclasses that hold an EncodedPrompt in a field named `prompt`; items of other types are
            sent unchanged.

    Returns:
        The items, in order.
    """
    if mesh.ranks_per_replica() == 1:
        return produce()
    with_frames: list[T] = []  # filled on the replica leader only, which is also its stage's first rank

    def produce_without_frames() -> list[T]:
        with_frames.extend(produce())
        return [_without_frames(item) for item in with_frames]

    # Every rank of the replica takes part in the first broadcast, of everything but the frames. Frames follow within
    # the first stage, one image or video at a time and from host memory to host memory: those of a long video take
    # hundreds of megabytes, and colocated servers hold the GPU's memory.
    items = collectives.broadcast_within_replica(produce_without_frames)
    return [_broadcast_frames(item) for item in with_frames or items] if mesh.is_first_stage() else items


def _without_frames(item: Any) -> Any:
    return replace(item, prompt=item.prompt.frames_on("meta")) if hasattr(item, "prompt") else item


def _broadcast_frames(item: Any) -> Any:
    if not hasattr(item, "prompt"):
        return item
    prompt = item.prompt.frames_on("cpu") if mesh.is_replica_leader() else item.prompt
    vision = [replace(each, frames=collectives.broadcast_within_first_stage(each.frames)) for each in prompt.vision]
    return replace(item, prompt=replace(prompt, vision=tuple(vision)))
