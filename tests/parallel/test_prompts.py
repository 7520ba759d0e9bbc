"""Prompts within a replica: which ranks receive the frames, and on which device."""

from __future__ import annotations

import copy
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

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

    items = broadcast_prompts(produce)
    return copy.deepcopy(items), len(calls)  # the frames' memory is shared without a file that the pipe could send


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


class _RecordingPrompt(EncodedPrompt):
    """A prompt that records where its frames were asked for. DALI leaves them on a GPU; here there is none."""

    devices: ClassVar[list[str]] = []

    def frames_on(self, device: str) -> EncodedPrompt:
        self.devices.append(device)
        return EncodedPrompt.frames_on(self, device)


def _devices() -> list[str]:
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))
    _RecordingPrompt.devices.clear()
    broadcast_prompts(lambda: [Group("a", _RecordingPrompt(_prompt().token_ids, _prompt().vision), ())])
    return _RecordingPrompt.devices


def test_frames_are_sent_from_the_cpu(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_devices) == [["meta", "cpu"], [], [], []]


def _frames_beside_another_backend(parallel: ParallelSection) -> tuple[list[int], bool, bool]:
    """Return the ranks of the group that frames are sent through, whether it was built for them, and what arrives."""
    with mock.patch.object(mesh.dist, "get_backend", return_value="nccl"):
        mesh.initialize(parallel)
    (group,) = broadcast_prompts(lambda: [Group("a", _prompt(), ())])
    if not mesh.is_first_stage():
        return [], False, group.prompt.vision[0].frames.is_meta
    ranks = dist.get_process_group_ranks(mesh.first_stage_group())
    is_new = mesh.first_stage_group() is not parallel_state.get_tensor_and_context_parallel_group()
    return ranks, is_new, torch.equal(group.prompt.vision[0].frames, FRAMES)


def test_frames_have_a_gloo_group_beside_another_backend(gloo_pool: GlooPool) -> None:
    stages = gloo_pool.run(_frames_beside_another_backend, ParallelSection(tensor=2, pipeline=2))
    assert stages == [([0, 1], True, True)] * 2 + [([], False, True)] * 2
    replicas = gloo_pool.run(_frames_beside_another_backend, ParallelSection(context=2))
    assert replicas == [([0, 1], True, True)] * 2 + [([2, 3], True, True)] * 2
    alone = gloo_pool.run(_frames_beside_another_backend, ParallelSection(pipeline=2))
    assert alone == [([0], False, True), ([1], False, True)] + [([], False, True)] * 2
