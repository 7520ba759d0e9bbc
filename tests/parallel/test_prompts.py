"""Prompts within a replica: which ranks receive the frames, and on which device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.prompts import broadcast_prompts
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")

FRAMES = torch.arange(2 * 28 * 28 * 3, dtype=torch.uint8).view(2, 28, 28, 3)


def _prompt() -> EncodedPrompt:
    return EncodedPrompt(torch.tensor([5, 6]), (VisionInput(FRAMES, (1, 2, 2), 1.0),))


def _broadcast() -> tuple[list[object], int]:
    """Return the items that this rank receives, and how often it called `produce`."""
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))
    calls: list[int] = []

    def produce() -> list[object]:
        calls.append(dist.get_rank())
        return [Group("a", _prompt(), ()), "why b has no prompt"]

    return broadcast_prompts(produce), len(calls)


def test_only_the_first_stage_receives_frames(gloo_pool: GlooPool) -> None:
    for rank, ((group, reason), num_calls) in enumerate(gloo_pool.run(_broadcast)):
        assert num_calls == (rank == 0)
        assert reason == "why b has no prompt"
        (vision,) = group.prompt.vision
        assert (vision.grid_thw, vision.frames.shape) == ((1, 2, 2), FRAMES.shape)
        assert group.prompt.token_ids.tolist() == [5, 6]
        if rank < 2:  # ranks 0 and 1 are the tensor-parallel ranks of the first stage
            assert torch.equal(vision.frames, FRAMES)
        else:
            assert vision.frames.is_meta


@dataclass(frozen=True)
class _GpuPrompt:
    """A prompt whose frames are on a GPU, as DALI leaves them; a machine without a GPU has no real one."""

    device: str = "cuda"

    def frames_on(self, device: str) -> _GpuPrompt:
        return _GpuPrompt(device)


@dataclass(frozen=True)
class _Holder:
    prompt: _GpuPrompt


def _devices() -> str:
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))
    (holder,) = broadcast_prompts(lambda: [_Holder(_GpuPrompt())])
    return holder.prompt.device


def test_frames_are_sent_from_the_cpu(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_devices) == ["cpu", "cpu", "meta", "meta"]
