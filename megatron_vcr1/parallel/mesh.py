"""The mesh: the process groups of a job and this rank's place in them.

`initialize` (or `world`, its context manager) starts torch.distributed and builds megatron-core's process groups. The
functions below it answer questions about them and change nothing.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel.slurm import rank_variables
from megatron_vcr1.parallel.tested_versions import warn_about_untested_versions

# Default time limit of a collective, in seconds. Ranks wait in a collective while another rank starts a server, decodes
# a video or samples responses.
COLLECTIVE_TIMEOUT_S = 3600.0

# Set by `initialize`.
_replica_group: dist.ProcessGroup | None = None
_first_stage_group: dist.ProcessGroup | None = None
_context_gradient_group: dist.ProcessGroup | None = None
_own_group: dist.ProcessGroup | None = None


def launched_world_size() -> int:
    """Return the number of processes that torchrun or srun launched; 1 for a process that was started alone.

    Reads the environment only; it may be called before `initialize`.
    """
    return int(_launch_environment().get("WORLD_SIZE", "1"))


def initialize(parallel: ParallelSection, *, seed: int = 0, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Start torch.distributed and build megatron-core's process groups. All ranks of the job must call it.

    Uses NCCL and one GPU per process where CUDA exists, gloo otherwise. If torch.distributed is running already, only
    the process groups are rebuilt. Rank and address come from torchrun's or srun's environment; without either, the
    job has one rank.

    Args:
        parallel: the layout; `config.layout.check_layout` has checked it against the model and the number of ranks.
        seed: seed of megatron-core's random states.
        timeout_s: time limit of a collective, in seconds. NCCL's default of 10 minutes is shorter than some steps.

    Raises:
        RuntimeError: there is no CUDA, and `model.cpu.install` was not called.
        UserError: the name of the first rank's node does not resolve.
    """
    _require_cuda_or_emulation()
    if not dist.is_initialized():
        _prepare_environment()
        _start_distributed(timeout_s)
    if not is_first_rank():
        logging.getLogger("megatron_vcr1").setLevel(logging.WARNING)  # only rank 0 logs what all ranks do
    else:
        warn_about_untested_versions()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    _build_groups(parallel, timedelta(seconds=timeout_s))
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _build_groups(parallel: ParallelSection, timeout: timedelta) -> None:
    """Build the process groups that megatron-core does not have: of the replica, its first stage, and this rank alone.

    megatron-core's model-parallel group has the tensor- and pipeline-parallel ranks only, which is the replica without
    context parallelism. The group of the first stage uses gloo, so that frames do not pass through GPU memory. The
    context-parallel ranks have a second group: NCCL runs the collectives of a group one after the other, and a
    reduce-scatter of gradients waits for their computation, so it would hold up the next gather. The group of this rank
    alone is for a vision tower that is whole on every tensor-parallel rank.
    """
    global _replica_group, _first_stage_group, _context_gradient_group, _own_group
    _replica_group = parallel_state.get_model_parallel_group()
    _first_stage_group = parallel_state.get_tensor_and_context_parallel_group()
    _context_gradient_group = parallel_state.get_context_parallel_group()
    # Ranks are ordered by tensor-parallel, context-parallel and data-parallel rank and then by stage.
    stage_size = parallel.tensor * parallel.context
    num_replicas = dist.get_world_size() // parallel.ranks_per_replica
    stages = [range(start, start + stage_size) for start in range(0, dist.get_world_size(), stage_size)]
    if parallel.context > 1:
        replicas = [list(chain(*stages[replica::num_replicas])) for replica in range(num_replicas)]
        _replica_group, _ = dist.new_subgroups_by_enumeration(replicas, timeout=timeout)
    if stage_size > 1 and dist.get_backend() != "gloo":
        first_stages = [list(ranks) for ranks in stages[:num_replicas]]
        _first_stage_group, _ = dist.new_subgroups_by_enumeration(first_stages, timeout=timeout, backend="gloo")
    if parallel.context > 1 and dist.get_backend() != "gloo":
        groups = [list(stage[rank :: parallel.tensor]) for stage in stages for rank in range(parallel.tensor)]
        _context_gradient_group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
    _own_group = None
    if parallel.vision == "data" and parallel.tensor > 1:
        _own_group = dist.new_group([dist.get_rank()], timeout=timeout, use_local_synchronization=True)


def shutdown() -> None:
    """Destroy all process groups. Does nothing if `initialize` was not called."""
    global _replica_group, _first_stage_group, _context_gradient_group, _own_group
    _replica_group = _first_stage_group = _context_gradient_group = _own_group = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def world(parallel: ParallelSection, *, seed: int = 0, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Iterator[None]:
    """Call `initialize`, run the with-block, and call `shutdown`. The arguments are `initialize`'s."""
    initialize(parallel, seed=seed, timeout_s=timeout_s)
    try:
        yield
    except BaseException:
        # Destroying an NCCL group waits for its peers, and they may be waiting for this rank in a collective. This
        # rank would then hang before it could print its error, so it exits with the groups in place.
        if not (dist.is_initialized() and dist.get_backend() == "nccl" and dist.get_world_size() > 1):
            shutdown()
        raise
    shutdown()


@contextmanager
def host_world(timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Iterator[None]:
    """Start torch.distributed with gloo for the with-block, for work that needs no GPU and no groups of megatron-core.

    Does nothing for a process that was started alone.

    Raises:
        UserError: the name of the first rank's node does not resolve.
    """
    if launched_world_size() == 1:
        yield
        return
    _prepare_environment()
    _join_ranks("gloo", timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        shutdown()


def _launch_environment() -> dict[str, str]:
    """Return the environment, completed with torchrun's variables if srun launched this process."""
    return {**os.environ, **rank_variables(os.environ)}


def _prepare_environment() -> None:
    """Write the variables that torch.distributed and CUDA read into os.environ."""
    os.environ.update(rank_variables(os.environ))  # torch.distributed reads torchrun's names only
    # megatron-core requires it: with one connection, kernels and collectives start in program order. CUDA reads it
    # when the device is first used.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _start_distributed(timeout_s: float) -> None:
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before NCCL picks a device
    else:
        backend = "gloo"
    if "RANK" in os.environ:
        _join_ranks(backend, timedelta(seconds=timeout_s))
    else:  # started alone: no address and port are needed
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _join_ranks(backend: str, timeout: timedelta) -> None:
    """Start torch.distributed with the rank and the address in the environment."""
    check_master_address(os.environ.get("MASTER_ADDR", ""))
    # The store that init_process_group would make; here it first compares the backends.
    store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    check_same_backend(store, rank, backend)
    dist.init_process_group(
        backend, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=num_ranks, timeout=timeout
    )


def check_same_backend(store: dist.Store, rank: int, backend: str) -> None:
    """Compare this rank's backend with rank 0's. Every rank calls it before the process groups exist.

    The GPUs of a node may be unusable, for example because its driver has failed. Without this check, its ranks would
    start gloo, all others NCCL, and all would wait for each other until the time limit.

    Raises:
        RuntimeError: they differ; it names both hosts.
    """
    host = socket.gethostname()
    if rank == 0:
        store.set("backend of rank 0", f"{backend} {host}")
        return
    expected, first_host = store.get("backend of rank 0").decode().split()
    if backend != expected:
        without, other = (host, first_host) if backend == "gloo" else (first_host, host)
        raise RuntimeError(
            f"{without} has no usable GPU, but {other} has: rank 0 uses {expected}, rank {rank} {backend}; run "
            f"nvidia-smi on {without}, and check that the job requests GPUs on every node"
        )


def check_master_address(name: str) -> None:
    """Raise UserError if the name of the first rank's node does not resolve on this node.

    Without this check, torch.distributed retries for as long as its timeout, which is an hour or more, and then names
    neither the node nor the variable.
    """
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:  # UnicodeError: it is not a host name at all
        raise UserError(
            f"MASTER_ADDR = {name!r}, the first rank's node, does not resolve on {socket.gethostname()} ({error}); "
            "set MASTER_ADDR to an address of that node that all nodes reach"
        ) from None


def _require_cuda_or_emulation() -> None:
    # This package must not import `model`, so it cannot ask model.cpu whether the emulation is installed. But the
    # emulation replaces torch's current_device, which shows in the function's module.
    if not torch.cuda.is_available() and torch.cuda.current_device.__module__.startswith("torch."):
        raise RuntimeError(
            "this machine has no CUDA device; call megatron_vcr1.model.cpu.install() once at start-up to run "
            "megatron-core on the CPU"
        )


def device() -> torch.device:
    """Return the device of this process's tensors: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """Return this process's rank; 0 if torch.distributed is not initialized."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Return the number of ranks of the job; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Return whether this process is rank 0, which writes files and reports for the job."""
    return dist.get_rank() == 0


def is_first_stage() -> bool:
    """Return whether this rank is on the first pipeline stage, which has the embeddings and the vision tower."""
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Return whether this rank is on the last pipeline stage, which has the language-model head."""
    return parallel_state.is_pipeline_last_stage()


def num_replicas() -> int:
    """Return the number of replicas of the model (the data-parallel size)."""
    return parallel_state.get_data_parallel_world_size()


def replica_group() -> dist.ProcessGroup:
    """Return the process group of this rank's replica."""
    assert _replica_group is not None, "call initialize first"
    return _replica_group


def first_stage_group() -> dist.ProcessGroup:
    """Return the process group of the first stage of this rank's replica, for tensors on the CPU.

    Only ranks of the first stage have it.
    """
    assert _first_stage_group is not None and is_first_stage()
    return _first_stage_group


def ranks_per_replica() -> int:
    """Return the number of ranks of one replica (tensor- times context- times pipeline-parallel size)."""
    return replica_group().size()


def replica_index() -> int:
    """Return the index of this rank's replica (the data-parallel rank)."""
    return parallel_state.get_data_parallel_rank()


def context_size() -> int:
    """Return the number of ranks that the tokens of a group are split across."""
    return parallel_state.get_context_parallel_world_size()


def context_rank() -> int:
    """Return this rank's index among the ranks that the tokens of a group are split across."""
    return parallel_state.get_context_parallel_rank()


def context_gradient_group() -> dist.ProcessGroup:
    """Return the process group of the context-parallel ranks for their gradients, next to megatron-core's group."""
    assert _context_gradient_group is not None, "call initialize first"
    return _context_gradient_group


def own_group() -> dist.ProcessGroup:
    """Return the process group of this rank alone; only for `parallel.vision = "data"` with tensor parallelism."""
    assert _own_group is not None
    return _own_group


def num_frame_ranks() -> int:
    """Return the number of tensor-parallel ranks that share the frames of a microbatch.

    With `parallel.vision = "data"`, each tensor-parallel rank has the whole vision tower and encodes a part of the
    frames. Otherwise this is 1: the vision tower is sharded, and the ranks encode the same frames together.
    """
    return 1 if _own_group is None else parallel_state.get_tensor_model_parallel_world_size()


def frame_rank() -> int:
    """Return this rank's index among the tensor-parallel ranks that share the frames of a microbatch."""
    return 0 if _own_group is None else parallel_state.get_tensor_model_parallel_rank()


def num_weight_holders() -> int:
    """Return the number of ranks that hold the same weights as this one (data- times context-parallel size)."""
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def weight_holder_index() -> int:
    """Return this rank's index among the ranks that hold the same weights; 0 is context rank 0 of replica 0."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def is_loss_rank() -> bool:
    """Return whether this rank reports the loss of the targets that it computes.

    It is the first tensor-parallel rank of the last stage: one rank for each context-parallel rank, and these have
    different targets.
    """
    return is_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def is_output_rank() -> bool:
    """Return whether this rank reports its replica's results: the loss rank of context-parallel rank 0."""
    return is_loss_rank() and context_rank() == 0


def is_replica_leader() -> bool:
    """Return whether this rank is its replica's first, on which `collectives.broadcast_within_replica` runs."""
    return replica_group().rank() == 0


def is_first_rank_on_host() -> bool:
    """Return whether this rank is the first one on its host."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def num_leaders_on_host() -> int:
    """Return the number of replica leaders on this host. All of them are on the first pipeline stage."""
    ranks_per_stage = ranks_per_replica() // parallel_state.get_pipeline_model_parallel_world_size()
    first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
    host = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return sum(replica * ranks_per_stage in host for replica in range(num_replicas()))
