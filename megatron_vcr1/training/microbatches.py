"""Groups of a step to microbatches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcr1.data.packing import Group, pack_groups
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.parallel import mesh


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Groups that are computed at once, and their packed rows on the device."""

    groups: tuple[Group, ...]
    packed: PackedBatch


def make_microbatches(groups: Sequence[Group], model: QwenVLModel, max_tokens: int) -> list[Microbatch]:
    """Pack a step's groups. The result depends on the groups alone, so that all stages of a pipeline make the same.

    Args:
        max_tokens: of a microbatch; a group that is longer has one of its own.
    """
    longest = max((group.num_tokens for group in groups), default=0)
    device = mesh.device()
    return [
        Microbatch(one, pack(one, model.model_config, pad_to_multiple_of=model.token_multiple).to(device))
        for one in pack_groups(groups, max(max_tokens, longest))
    ]
