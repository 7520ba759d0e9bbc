"""Start and end of the distributed world: torch.distributed and megatron-core's process groups on it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel.slurm import rank_variables

COLLECTIVE_TIMEOUT_S = 3600.0
"""How long a rank waits for the others in a collective: servers start meanwhile, videos are decoded, answers come."""


def launched_world_size() -> int:
    """Processes of this job, from torchrun's or srun's environment; 1 when it was started alone."""
    os.environ.update(rank_variables(os.environ))
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(parallel: ParallelSection, *, seed: int = 0, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Join the world (torchrun's or srun's environment, or a world of one) and build megatron-core's process groups.

    NCCL with one GPU a process where CUDA exists, gloo otherwise. The layout is checked by config.check_layout before
    this is called.

    Args:
        timeout_s: longest wait in a collective. NCCL's own, 10 minutes, is shorter than some steps.
    """
    if not dist.is_initialized():
        os.environ.update(rank_variables(os.environ))
        # Asked for by megatron-core: kernels and collectives then start in the order of the program.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not is_first_rank():
        logging.getLogger("megatron_vcr1").setLevel(logging.WARNING)  # one voice a job
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the world; safe to call when it was never joined."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def world(parallel: ParallelSection, *, seed: int = 0, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Iterator[None]:
    """`initialize` for the length of a with-block."""
    initialize(parallel, seed=seed, timeout_s=timeout_s)
    try:
        yield
    except BaseException:
        # NCCL's goodbye waits for its peers, and they may wait for this rank in a collective: it would never tell what
        # has happened, nor end.
        if not (dist.is_initialized() and dist.get_backend() == "nccl" and dist.get_world_size() > 1):
            shutdown()
        raise
    shutdown()


def is_first_stage() -> bool:
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    return parallel_state.is_pipeline_last_stage()


def device() -> torch.device:
    """Where this process's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """This process's rank; 0 if torch.distributed is not initialized."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Number of ranks of the job; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process writes files and reports for the job."""
    return dist.get_rank() == 0


def num_replicas() -> int:
    """Copies of the model (the data-parallel size)."""
    return parallel_state.get_data_parallel_world_size()


def ranks_per_replica() -> int:
    """Ranks that one copy of the model is divided among."""
    return parallel_state.get_model_parallel_group().size()


def replica_index() -> int:
    """Which copy of the model this process belongs to (the data-parallel rank)."""
    return parallel_state.get_data_parallel_rank()


def is_output_rank() -> bool:
    """Whether this process reports the results of its copy of the model: the first rank of the last stage."""
    return is_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def is_replica_leader() -> bool:
    """Whether this process produces what `broadcast_within_replica` hands to its copy of the model."""
    return dist.get_rank() == parallel_state.get_model_parallel_src_rank()
