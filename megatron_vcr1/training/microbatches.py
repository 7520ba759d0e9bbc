"""Microbatches: groups packed into sequences that the model computes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcr1.data.packing import AnyGroup, pack_groups
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A packed sequence on its way through the pipeline schedule to the loss function.

    The model is called with `packed`; the loss function gets the microbatch itself. A stage of training whose loss
    needs more than the target tokens adds fields in a subclass (`grpo.batch.PolicyBatch`).
    """

    packed: PackedBatch


def pack_microbatches(
    groups: Sequence[AnyGroup], model: VideoLanguageModel, max_tokens: int
) -> list[tuple[tuple[AnyGroup, ...], PackedBatch]]:
    """Pack groups into as few sequences as best-fit decreasing finds, and move them to this rank's device.

    The result depends only on the groups. All ranks of a replica have the same groups, so all stages of a pipeline
    build the same microbatches without communication.

    Args:
        max_tokens: token budget of a microbatch. A group that is longer gets a microbatch of its own.

    Returns:
        The groups of each microbatch, in the order in which they are packed, and their packed sequence; under context
        parallelism, this rank's part of it.
    """
    device = mesh.device()
    return [
        (members, pack_for_rank(members, model.model_config, pad_to_multiple_of=model.token_multiple).to(device))
        for members in pack_groups(groups, max_tokens)
    ]
