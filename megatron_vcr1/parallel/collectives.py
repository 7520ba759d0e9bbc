"""Collectives on Python objects and numbers, among all ranks or among the ranks of one replica.

All ranks of the group must call each function, in the same order. If one rank raised an exception instead, the others
would wait for it forever. So the functions that run a callable send its exception to every rank of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcr1.errors import portable
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.host_memory import share_within_host

T = TypeVar("T")


def broadcast_within_replica(produce: Callable[[], T]) -> T:
    """Call `produce` on the leader of each replica and return its result on all ranks of that replica.

    Raises:
        Exception: whatever `produce` raises, on all ranks of the replica.
    """
    group = mesh.replica_group()
    if group.size() == 1:
        return produce()  # the object itself: nothing is pickled
    source = dist.get_global_rank(group, 0)
    if dist.get_rank() != source:
        box: list[Any] = [None, None]
        dist.broadcast_object_list(box, src=source, group=group)
        value, error = box
        if error is not None:
            error.add_note(f"raised on rank {source} and sent to all ranks of its group")
            raise error
        return cast(T, value)
    try:
        value = produce()
    except Exception as error:  # the other ranks wait for the broadcast, whatever fails
        dist.broadcast_object_list([None, portable(error)], src=source, group=group)
        raise
    dist.broadcast_object_list([value, None], src=source, group=group)
    return value


def broadcast_within_first_stage(tensor: Tensor) -> Tensor:
    """Send a tensor in host memory from the replica leader to all ranks of the replica's first stage.

    Only the ranks of the first stage call it. Ranks of one node share the memory, where the system allows it.

    Args:
        tensor: the contents, on the replica leader; on the other ranks, a tensor of the same shape and dtype on any
            device, "meta" included.

    Returns:
        The contents, on the CPU, which no rank may change.
    """
    group = mesh.first_stage_group()
    if group.size() == 1:
        return tensor
    shared = share_within_host(tensor, group)
    if shared is not None:
        return shared
    contents = tensor.contiguous() if mesh.is_replica_leader() else torch.empty(tensor.shape, dtype=tensor.dtype)
    dist.broadcast(contents, src=dist.get_global_rank(group, 0), group=group)
    return contents


def barrier_within_replica() -> None:
    """Wait until all ranks of this replica have arrived."""
    dist.barrier(group=mesh.replica_group())


def gather_objects(value: T) -> list[T]:
    """Return every rank's `value`, in rank order, on every rank. The values are pickled, so keep them small."""
    gathered: list[Any] = [value] * dist.get_world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def run_on_context_ranks(work: Callable[[], T]) -> list[T]:
    """Call `work` on every context-parallel rank, and return the results in their order on all of them.

    If `work` raises on any of them, it raises on all of them.
    """
    if mesh.context_size() == 1:
        return [work()]  # the object itself: nothing is pickled
    return run_on_every_rank(work, parallel_state.get_context_parallel_group())


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the sum of each number over all ranks, in float64, on every rank."""
    total = torch.tensor(values, dtype=torch.float64, device=mesh.device())
    dist.all_reduce(total)
    return total.tolist()


def run_on_every_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Call `work` on every rank and return all results, in rank order, on every rank.

    If `work` raises on any rank, it raises on all of them: no rank waits for one that has failed. Also works in a
    process that has not initialized torch.distributed.

    Args:
        work: the callable.
        group: process group of the ranks that call it, instead of all ranks. A background thread passes a group of its
            own, so that its collectives do not interleave with the main thread's.

    Raises:
        Exception: the error of the lowest rank that failed.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # raised below, on all ranks: they wait for each other's outcomes
        failure = error
    ranks = list(range(mesh.num_ranks())) if group is None else dist.get_process_group_ranks(group)
    outcomes = [(result, failure)] * len(ranks)
    if dist.is_initialized():
        dist.all_gather_object(outcomes, (result, failure and portable(failure)), group=group)
        outcomes[ranks.index(mesh.rank())] = (result, failure)  # the local exception keeps its traceback
    for rank, (_, failure) in zip(ranks, outcomes, strict=True):
        if failure is not None:
            if rank != mesh.rank():
                failure.add_note(f"raised on rank {rank} and sent to all ranks")
            raise failure
    return [result for result, _ in outcomes]  # type: ignore[misc]


def run_on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `work` on rank 0 and return its result, or raise its error, on every rank."""
    return run_on_every_rank(lambda: work() if mesh.rank() == 0 else None, group)[0]  # type: ignore[return-value]
