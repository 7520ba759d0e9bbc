"""Prompts and errors among the ranks of a copy of the model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.parallel.prompts import share_prompts
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")

FRAMES = torch.arange(2 * 28 * 28 * 3, dtype=torch.uint8).view(2, 28, 28, 3)


def _prompt() -> EncodedPrompt:
    return EncodedPrompt(torch.tensor([5, 6]), (VisionInput(FRAMES, (1, 2, 2), 1.0),))


def _shared() -> tuple[list[object], int]:
    """What a rank gets, and how many times the whole of it produced."""
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))
    calls: list[int] = []

    def produce() -> list[object]:
        calls.append(dist.get_rank())
        return [Group("a", _prompt(), ()), "why b has no prompt"]

    return share_prompts(produce), len(calls)


def test_frames_go_to_the_first_stage_alone(gloo_pool: GlooPool) -> None:
    for rank, ((group, reason), num_calls) in enumerate(gloo_pool.run(_shared)):
        assert num_calls == (rank == 0)
        assert reason == "why b has no prompt"
        (vision,) = group.prompt.vision
        assert (vision.grid_thw, vision.frames.shape) == ((1, 2, 2), FRAMES.shape)
        assert group.prompt.token_ids.tolist() == [5, 6]
        if rank < 2:  # tensor ranks are next to each other
            assert torch.equal(vision.frames, FRAMES)
        else:
            assert vision.frames.is_meta


@dataclass(frozen=True)
class _GpuPrompt:
    """Frames as DALI leaves them; a machine without a GPU has no others."""

    device: str = "cuda"

    def frames_on(self, device: str) -> _GpuPrompt:
        return _GpuPrompt(device)


@dataclass(frozen=True)
class _Holder:
    prompt: _GpuPrompt


def _devices() -> str:
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))
    (holder,) = share_prompts(lambda: [_Holder(_GpuPrompt())])
    return holder.prompt.device


def test_frames_leave_the_gpu_that_decoded_them(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_devices) == ["cpu", "cpu", "meta", "meta"]


class _Unpicklable(RuntimeError):
    def __init__(self, server: str, reason: str) -> None:
        super().__init__(f"{server}: {reason}")


def _error(kind: str) -> tuple[str, str]:
    mesh.initialize(ParallelSection(tensor=2))

    def fail() -> None:
        raise UserError("no videos") if kind == "user" else _Unpicklable("gpu3", "gone")

    try:
        collectives.broadcast_within_replica(fail)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("nobody told this rank")


@pytest.mark.parametrize(
    "kind, first, others",
    [
        ("user", ("UserError", "no videos"), ("UserError", "no videos")),
        ("unpicklable", ("_Unpicklable", "gpu3: gone"), ("RuntimeError", "_Unpicklable: gpu3: gone")),
    ],
)
def test_all_ranks_of_a_copy_raise_what_one_raises(
    gloo_pool: GlooPool, kind: str, first: tuple[str, str], others: tuple[str, str]
) -> None:
    assert gloo_pool.run(_error, kind) == [first, others, first, others]
