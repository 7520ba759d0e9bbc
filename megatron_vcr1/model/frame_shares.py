"""The division of a microbatch's frames among the ranks that encode them, by temporal step.

No layer of a vision tower attends across temporal steps, so the ranks together compute exactly the features of one. The
ranks are the context-parallel ones, and with `parallel.vision = "data"` also the tensor-parallel ones: rank number
context_rank * num_tensor_ranks + tensor_rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from megatron_vcr1.data.encoding import VisionInput
from megatron_vcr1.model.config import VisionConfig
from megatron_vcr1.model.packed_batch import FrameShare, PackedBatch
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.feature_exchange import FeatureExchange


def share_frames(batch: PackedBatch, vision: VisionConfig) -> PackedBatch:
    """Return a microbatch with only the frames that this rank encodes, if its tensor-parallel ranks share them.

    They must call it with the same microbatch, whose tokens they have in common. No rank communicates with another.
    """
    if mesh.num_frame_ranks() == 1:
        return batch
    tokens = torch.arange(len(batch.vision_token_indices))
    inputs, share = divide_frames(
        batch.vision, vision, [tokens], tensor_rank=mesh.frame_rank(), num_tensor_ranks=mesh.num_frame_ranks()
    )
    return replace(batch, vision=inputs, frames=share)


def deal_steps(patches: Sequence[int], num_ranks: int) -> list[int]:
    """Assign temporal steps to ranks: consecutive runs with about equal numbers of patches.

    Consecutive steps keep a rank's frames together, and most of its features belong to few other ranks.

    Args:
        patches: number of patches of each temporal step of a microbatch.

    Returns:
        The rank of each step.
    """
    total = max(sum(patches), 1)
    ends = accumulate(patches)
    # The middle of a step decides, so that a long step goes where most of it belongs.
    return [int((2 * end - size) * num_ranks // (2 * total)) for end, size in zip(ends, patches, strict=True)]


def divide_frames(
    inputs: Sequence[VisionInput],
    vision: VisionConfig,
    needed: Sequence[Tensor],
    *,
    context_rank: int = 0,
    tensor_rank: int = 0,
    num_tensor_ranks: int = 1,
) -> tuple[tuple[VisionInput, ...], FrameShare]:
    """Return the frames that a rank encodes, and the plan by which the ranks exchange the features.

    Args:
        inputs: all images and videos of the microbatch.
        vision: the vision tower, for the number of features of a temporal step.
        needed: for each context-parallel rank, the features of its tokens: int64 indices among those of all inputs.
        context_rank: index of the rank among the context-parallel ranks.
        tensor_rank: its index among the tensor-parallel ranks that share the frames.
        num_tensor_ranks: number of these ranks; 1 if the vision tower is sharded across them instead.
    """
    num_ranks = len(needed) * num_tensor_ranks
    rank = context_rank * num_tensor_ranks + tensor_rank
    patches = [item.grid_thw[1] * item.grid_thw[2] for item in inputs for _ in range(item.grid_thw[0])]
    step_ranks = deal_steps(patches, num_ranks)
    sizes = torch.tensor(patches, dtype=torch.long) // vision.patches_per_token
    encoders = torch.tensor(step_ranks, dtype=torch.long).repeat_interleave(sizes)  # the rank that encodes each feature
    # Steps are dealt in order, so a rank's features are consecutive.
    first = int(torch.searchsorted(encoders, rank))
    sent = [features[encoders[features] == rank] - first for features in needed]
    mine = encoders[needed[context_rank]]
    # Gathered features are ordered by tensor-parallel and then by context-parallel rank.
    blocks = mine % num_tensor_ranks * len(needed) + mine // num_tensor_ranks
    order = blocks.argsort(stable=True).argsort()  # the inverse permutation: from the order of blocks to the tokens'
    received = blocks.bincount(minlength=num_ranks).view(num_tensor_ranks, -1)
    slots = None
    if num_tensor_ranks > 1:  # every rank contributes as many rows, so its first row is not where its features start
        contributions = received.sum(1)
        slots = int(contributions.max())
        padding = torch.arange(num_tensor_ranks) * slots - (contributions.cumsum(0) - contributions)
        order += padding[mine % num_tensor_ranks]
    exchange = FeatureExchange(
        sent_rows=torch.cat(sent),
        sent=tuple(map(len, sent)),
        received=tuple(received[tensor_rank].tolist()),
        slots=slots,
        order=order,
        num_features=len(encoders),
    )
    share = FrameShare(exchange, tuple(item.grid_thw for item in inputs))
    return _slice_inputs(inputs, step_ranks, rank, vision.temporal_patch_size), share


def _slice_inputs(
    inputs: Sequence[VisionInput], step_ranks: Sequence[int], rank: int, temporal_patch_size: int
) -> tuple[VisionInput, ...]:
    """Return the temporal steps of images and videos that a rank encodes, as views of their frames."""
    slices = []
    start = 0  # index of the input's first step among all steps
    for item in inputs:
        num_steps, height, width = item.grid_thw
        own = [step for step in range(num_steps) if step_ranks[start + step] == rank]
        start += num_steps
        if own:
            frames = item.frames[own[0] * temporal_patch_size : (own[-1] + 1) * temporal_patch_size]
            slices.append(replace(item, frames=frames, grid_thw=(len(own), height, width)))
    return tuple(slices)
