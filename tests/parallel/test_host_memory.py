"""Tensors in memory that several processes share, and what happens where they cannot."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import host_memory, mesh
from megatron_vcr1.parallel.collectives import broadcast_within_first_stage
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")

CONTENTS = torch.arange(24, dtype=torch.int32).view(2, 3, 4)


def _share() -> tuple[torch.Tensor, int, int]:
    """Share a tensor, let the last rank change it, and return it with the numbers of open files before and after."""
    mesh.initialize(ParallelSection(tensor=4))
    before = _num_open_files()
    tensor = CONTENTS.clone() if mesh.rank() == 0 else torch.empty_like(CONTENTS, device="meta")
    shared = host_memory.share_within_host(tensor, mesh.first_stage_group())
    assert shared is not None and torch.equal(shared, CONTENTS)
    dist.barrier()
    if mesh.rank() == 3:
        shared[0, 0, 0] = 7
    dist.barrier()
    return shared.clone(), before, _num_open_files()


def _num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_processes_of_one_node_have_one_copy(gloo_pool: GlooPool) -> None:
    for shared, before, after in gloo_pool.run(_share):
        assert shared[0, 0, 0] == 7 and torch.equal(shared.flatten()[1:], CONTENTS.flatten()[1:])
        assert after == before


def _broadcast(failure: str) -> tuple[bool, bool]:
    """Broadcast a tensor while a rank cannot share; return whether a rank did, and whether the contents are right."""
    mesh.initialize(ParallelSection(tensor=4))
    tensor = CONTENTS if mesh.rank() == 0 else torch.empty_like(CONTENTS, device="meta")
    other = os.memfd_create("another file")
    os.write(other, bytes(CONTENTS.nbytes + 16))  # as long as the right one
    patches = {
        "no memory": mock.patch.object(host_memory.os, "posix_fallocate", side_effect=OSError),
        "hidden": mock.patch.object(host_memory.os, "open", side_effect=PermissionError),
        "another node's file": mock.patch.object(host_memory.os, "open", lambda *_: os.dup(other)),
        "no memfd": mock.patch.object(host_memory.os, "memfd_create", side_effect=OSError),
    }
    with patches[failure] if mesh.rank() in (0, 2) else mock.patch.dict({}):
        shared = host_memory.share_within_host(tensor, mesh.first_stage_group())
        contents = broadcast_within_first_stage(tensor)
    os.close(other)
    return shared is not None, torch.equal(contents, CONTENTS)


@pytest.mark.parametrize("failure", ["no memory", "hidden", "another node's file", "no memfd"])
def test_ranks_that_cannot_share_receive_a_copy(gloo_pool: GlooPool, failure: str) -> None:
    assert gloo_pool.run(_broadcast, failure) == [(False, True)] * 4
