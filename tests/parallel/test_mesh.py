"""Start-up of the process groups, and this rank's place in them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from tests.gloo import GlooPool
from tests.parallel.test_slurm import TASK

ROOT = Path(__file__).parents[2]
WITHOUT_INSTALL = """
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import collectives, mesh

mesh.initialize(ParallelSection())
"""


def test_a_node_name_that_does_not_resolve_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TASK, "SLURM_STEP_NODELIST": "no-such-node.invalid"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # Some networks' name servers resolve every name.
    resolve = mock.Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    monkeypatch.setattr(mesh, "socket", SimpleNamespace(getaddrinfo=resolve, gethostname=socket.gethostname))
    monkeypatch.setattr(mesh.dist, "init_process_group", lambda *_, **__: pytest.fail("it would retry for an hour"))
    monkeypatch.setattr(mesh.dist, "is_initialized", lambda: False)
    before = dict(os.environ)
    try:
        with pytest.raises(UserError, match=r"MASTER_ADDR = 'no-such-node\.invalid'.* does not resolve on "):
            mesh.initialize(ParallelSection())
        assert resolve.call_args.args[0] == "no-such-node.invalid"
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_text_that_is_no_host_name_is_named_as_well() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR = 'a\.\.b'.* does not resolve on "):
        mesh.check_master_address("a..b")


def test_a_node_without_usable_gpus_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    mesh.check_same_backend(store, 0, "nccl")
    mesh.check_same_backend(store, 3, "nccl")
    monkeypatch.setattr(mesh.socket, "gethostname", lambda: "n7")
    monkeypatch.setattr(mesh.dist, "rendezvous", lambda *_, **__: iter([(store, 5, 8)]))
    monkeypatch.setattr(mesh.dist, "init_process_group", lambda *_, **__: pytest.fail("it would wait for hours"))
    monkeypatch.setattr(mesh.dist, "is_initialized", lambda: False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"n7 has no usable GPU, but .* has: rank 0 uses nccl, rank 5 gloo"):
        mesh.initialize(ParallelSection())
    store.set("backend of rank 0", "gloo n1")
    with pytest.raises(RuntimeError, match=r"n1 has no usable GPU, but n7 has: rank 0 uses gloo, rank 5 nccl"):
        mesh.check_same_backend(store, 5, "nccl")


def test_launched_world_size_reads_the_launchers_variables_and_writes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert mesh.launched_world_size() == 1
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert mesh.launched_world_size() == 16  # srun
    assert dict(os.environ) == before
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert mesh.launched_world_size() == 4  # torchrun inside srun


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_and_without_install_the_error_names_the_call() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_INSTALL],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert program.returncode == 1
    assert "RuntimeError: this machine has no CUDA device; call megatron_vcr1.model.cpu.install()" in program.stderr


def test_a_process_that_was_started_alone_is_its_own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with mesh.world(ParallelSection()):
        assert (mesh.rank(), mesh.num_ranks(), mesh.num_replicas(), mesh.ranks_per_replica()) == (0, 1, 1, 1)
        assert mesh.is_first_rank() and mesh.is_replica_leader() and mesh.is_output_rank()
        assert mesh.is_first_stage() and mesh.is_last_stage()
        assert mesh.is_first_rank_on_host() and mesh.num_leaders_on_host() == 1
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not mesh.is_first_rank_on_host()
    assert (mesh.rank(), mesh.num_ranks()) == (0, 1)
    mesh.shutdown()  # does nothing the second time


def _num_leaders_on_host() -> int:
    """Return the number of leaders on this rank's host, if there are two hosts with two ranks each."""
    with mock.patch.dict(os.environ, LOCAL_RANK=str(mesh.rank() % 2), LOCAL_WORLD_SIZE="2"):
        return mesh.num_leaders_on_host()


def _place() -> tuple[int, int, bool, bool]:
    mesh.initialize(ParallelSection(tensor=2))
    first = (mesh.replica_index(), mesh.num_replicas(), mesh.is_replica_leader(), mesh.is_output_rank())
    assert _num_leaders_on_host() == 1
    mesh.initialize(ParallelSection(pipeline=2))
    assert _num_leaders_on_host() == (2 if mesh.rank() < 2 else 0)
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))  # a second call rebuilds the groups
    assert _num_leaders_on_host() == (1 if mesh.rank() < 2 else 0)
    assert (mesh.num_replicas(), mesh.ranks_per_replica()) == (1, 4)
    assert (mesh.is_first_stage(), mesh.is_last_stage()) == (mesh.rank() < 2, mesh.rank() >= 2)
    assert mesh.is_output_rank() == (mesh.rank() == 2)
    mesh.initialize(ParallelSection(context=2, pipeline=2))
    assert (mesh.num_replicas(), mesh.ranks_per_replica(), mesh.context_size()) == (1, 4, 2)
    assert (mesh.context_rank(), mesh.is_first_stage()) == (mesh.rank() % 2, mesh.rank() < 2)
    assert (mesh.weight_holder_index(), mesh.num_weight_holders()) == (mesh.rank() % 2, 2)
    assert (mesh.is_loss_rank(), mesh.is_output_rank()) == (mesh.rank() >= 2, mesh.rank() == 2)
    assert mesh.is_replica_leader() == (mesh.rank() == 0)
    assert collectives.broadcast_within_replica(mesh.rank) == 0
    if mesh.is_first_stage():
        assert collectives.broadcast_within_first_stage(torch.tensor(mesh.rank())) == 0
    assert collectives.run_on_context_ranks(mesh.rank) == ([0, 1] if mesh.is_first_stage() else [2, 3])
    mesh.initialize(ParallelSection(context=2))
    assert (mesh.num_replicas(), mesh.replica_index(), mesh.context_rank()) == (2, mesh.rank() // 2, mesh.rank() % 2)
    assert collectives.broadcast_within_replica(mesh.rank) == mesh.rank() // 2 * 2
    assert (mesh.weight_holder_index(), mesh.num_weight_holders()) == (mesh.rank(), 4)
    return first


@pytest.mark.xdist_group("gloo")
def test_places_of_four_ranks(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_place) == [(0, 2, True, True), (0, 2, False, False), (1, 2, True, True), (1, 2, False, False)]
