"""The parts of the frames that ranks encode: every rank of a token receives its feature."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_vcr1.data.encoding import VisionInput
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.frame_shares import deal_steps, divide_frames
from megatron_vcr1.parallel.feature_exchange import FeatureExchange
from tests.model import tiny

CONFIG = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
# Frames, and patches down and across, of each image or video.
INPUTS = {
    "video": [(14, 4, 6)],
    "videos-and-image": [(4, 2, 4), (1, 8, 6), (6, 4, 4)],
    "image": [(1, 4, 4)],
    "none": [],
}


def _inputs(name: str) -> list[VisionInput]:
    generator = torch.Generator().manual_seed(0)
    return [tiny.vision_input(generator, *shape, seconds=1.0) for shape in INPUTS[name]]


def _needed(num_features: int, context_size: int) -> list[Tensor]:
    """Return features of the tokens of each context-parallel rank: parts of all, and the last feature once more."""
    bounds = [num_features * rank // context_size for rank in range(context_size + 1)]
    parts = [torch.arange(start, end) for start, end in pairwise(bounds)]
    parts[0] = torch.cat((parts[0], torch.arange(num_features)[-1:]))
    return parts


def _deliver(plans: list[FeatureExchange], encoded: list[Tensor], num_tensor_ranks: int) -> list[Tensor]:
    """Do what the ranks do together: return what each rank receives, in the order of its tokens."""
    num_context_ranks = len(plans) // num_tensor_ranks
    sent = [features[plan.sent_rows].split(plan.sent) for features, plan in zip(encoded, plans, strict=True)]
    received = []
    for rank, plan in enumerate(plans):
        tensor_rank, context_rank = rank % num_tensor_ranks, rank // num_tensor_ranks
        parts = [sent[other * num_tensor_ranks + tensor_rank][context_rank] for other in range(num_context_ranks)]
        assert tuple(map(len, parts)) == plan.received
        received.append(torch.cat(parts))
    delivered = []
    for rank, plan in enumerate(plans):
        rows = received[rank]
        if plan.slots is not None:
            first = rank - rank % num_tensor_ranks
            group = received[first : first + num_tensor_ranks]
            rows = torch.cat([torch.nn.functional.pad(part, (0, plan.slots - len(part)), value=-1) for part in group])
        delivered.append(rows[plan.order])
    return delivered


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("num_context_ranks", "num_tensor_ranks"), [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2), (3, 2)])
def test_every_frame_is_encoded_once_and_features_reach_all_ranks_of_their_tokens(
    name: str, num_context_ranks: int, num_tensor_ranks: int
) -> None:
    inputs = _inputs(name)
    needed = _needed(sum(item.num_tokens(2) for item in inputs), num_context_ranks)
    shares = [
        divide_frames(
            inputs,
            CONFIG.vision,
            needed,
            context_rank=rank // num_tensor_ranks,
            tensor_rank=rank % num_tensor_ranks,
            num_tensor_ranks=num_tensor_ranks,
        )
        for rank in range(num_context_ranks * num_tensor_ranks)
    ]
    whole = [frame for item in inputs for frame in item.frames]
    parts = [frame for own, _ in shares for item in own for frame in item.frames]
    assert len(whole) == len(parts) and all(map(torch.equal, whole, parts))
    sizes = [sum(item.num_tokens(2) for item in own) for own, _ in shares]
    encoded = list(torch.arange(sum(sizes)).split(sizes))  # features are numbered
    received = _deliver([share.exchange for _, share in shares], encoded, num_tensor_ranks)
    for rank, features in enumerate(received):
        assert torch.equal(features, needed[rank // num_tensor_ranks])
    for _, share in shares:
        assert share.grids == tuple(item.grid_thw for item in inputs)
        assert share.exchange.num_features == sum(sizes)
        assert (share.exchange.slots is None) == (num_tensor_ranks == 1)


def test_steps_are_dealt_in_runs_of_about_equal_work() -> None:
    assert deal_steps([4] * 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert deal_steps([40, 4, 4, 4, 4, 4], 2) == [0, 1, 1, 1, 1, 1]
    assert deal_steps([8], 4) == [2]
    assert deal_steps([], 4) == []
    patches = [random.Random(0).randint(1, 30) for _ in range(100)]
    ranks = deal_steps(patches, 4)
    assert ranks == sorted(ranks)
    loads = [sum(size for size, rank in zip(patches, ranks, strict=True) if rank == other) for other in range(4)]
    assert max(loads) - min(loads) <= 60
