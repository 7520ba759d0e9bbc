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
        return [_with_frames_on("meta", item) for item in with_frames]

    # Two broadcasts, and every rank of the replica takes part in the first: first everything but the frames, to all
    # stages; then the frames, within the first stage.
    items = collectives.broadcast_within_replica(produce_without_frames)
    if mesh.is_first_stage():
        items = collectives.broadcast_within_stage(lambda: [_with_frames_on("cpu", item) for item in with_frames])
    return items


def _with_frames_on(device: str, item: Any) -> Any:
    return replace(item, prompt=item.prompt.frames_on(device)) if hasattr(item, "prompt") else item
