"""The placement of SGLang servers: which GPUs they use, which replica uses which server, and how weights reach them.

Servers are placed in one of three ways:

    colocated, started by the run    on the GPUs of training; they release their memory while training computes
    separate, started by the run     on GPUs of the same nodes that training does not use
    named by `sglang.urls`           wherever they run; those on this host may release memory as colocated ones do

All code that depends on this reads a `Placement` instead of the settings or `torch.cuda`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.errors import UserError

WeightChannel = Literal["broadcast", "tensor", "disk"]


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement of the servers, computed once per process from its settings and its machine.

    Attributes:
        starts_servers: the run starts its own servers on every node; otherwise `sglang.urls` names running servers.
        colocated: the servers share the GPUs of training, and release their memory while training computes.
        num_servers: number of servers that a node starts.
        gpus_per_server: tensor-parallel size of a server.
        num_gpus: number of GPUs that this process sees; 0 on a machine without GPUs.
        weight_sync: the channel of the settings; `weight_channel` is the one that is used.
        needs_shared_memory: weights or frames travel through shared memory, so servers must run on the trainer's host.
    """

    starts_servers: bool
    colocated: bool
    num_servers: int
    gpus_per_server: int
    num_gpus: int
    weight_sync: WeightChannel
    needs_shared_memory: bool

    @classmethod
    def from_section(cls, section: SglangSection) -> Placement:
        """Compute the placement from the settings and from the GPUs that this process sees."""
        return cls(
            starts_servers=not section.urls,
            colocated=section.colocated,
            num_servers=section.num_servers,
            gpus_per_server=section.tensor,
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            weight_sync=section.weight_sync,
            needs_shared_memory=section.weight_sync == "tensor" or section.transport == "file",
        )

    @property
    def samples_while_training(self) -> bool:
        """Whether servers can sample while training computes (one step off): colocated servers have no memory then."""
        return not self.colocated

    @property
    def shares_gpu_memory(self) -> bool:
        """Whether training must free GPU memory before the servers resume theirs."""
        return self.colocated and self.num_gpus > 0

    @property
    def may_broadcast_weights(self) -> bool:
        """Whether weights may reach a server by a broadcast. Colocated servers of the run read memory instead."""
        return self.weight_sync == "broadcast" and not (self.colocated and self.starts_servers)

    @property
    def may_share_gpu_memory(self) -> bool:
        """Whether servers may read weights from the memory of training's GPUs (`find_device_channel` decides)."""
        return self.weight_sync == "broadcast" and self.shares_gpu_memory and self.starts_servers

    @property
    def broadcast_backend(self) -> Literal["nccl", "gloo"]:
        """The torch.distributed backend of the broadcast channel."""
        return "nccl" if self.num_gpus else "gloo"

    def weight_channel(self, releasing: Collection[str]) -> WeightChannel:
        """Choose the channel of the weight sync.

        NCCL cannot connect two processes that use the same GPU. Servers that release memory share the GPUs of training,
        so their weights travel through shared memory instead, if servers cannot read them from the GPUs.

        Args:
            releasing: URLs of the replica's servers that release their memory.
        """
        if self.weight_sync == "broadcast" and releasing and self.num_gpus:
            return "tensor"
        return self.weight_sync

    def server_gpus(self, num_training_ranks: int) -> list[int] | None:
        """Return the first GPU of each server of a node, or None on a machine without GPUs.

        Colocated servers start at GPU 0. Separate servers use the GPUs after those of the training ranks, of which each
        uses one.

        Args:
            num_training_ranks: ranks of this job on this node; 0 if no training runs (`vcr1 rollout serve`).

        Raises:
            UserError: the node has too few GPUs.
        """
        first = 0 if self.colocated else num_training_ranks
        last = first + self.num_servers * self.gpus_per_server - 1
        if self.num_gpus and last >= self.num_gpus:
            raise UserError(
                f"sglang.num_servers: {self.num_servers} servers of sglang.tensor = {self.gpus_per_server} need GPUs "
                f"{first} to {last}, and this process sees {self.num_gpus}; lower one of the two"
            )
        return [first + index * self.gpus_per_server for index in range(self.num_servers)] if self.num_gpus else None

    def replicas_of_servers(self, replicas_of_ranks: Sequence[int]) -> list[int] | None:
        """Return the replica on whose GPUs each colocated server of a node runs.

        Args:
            replicas_of_ranks: replica of each training rank of this node; local rank i uses GPU i.

        Returns:
            None if there are no GPUs, or if a server is not on the GPUs of exactly one replica.
        """
        first_gpus = self.server_gpus(len(replicas_of_ranks)) if self.colocated else None
        if first_gpus is None:
            return None
        found = [set(replicas_of_ranks[gpu : gpu + self.gpus_per_server]) for gpu in first_gpus]
        return [replicas.pop() for replicas in found] if all(len(replicas) == 1 for replicas in found) else None

    def check_sharing(self, num_replicas: int, num_servers: int) -> None:
        """Reject colocated servers that several replicas would share.

        Each replica makes its own servers release and resume their memory, so no other replica may need them meanwhile.

        Raises:
            UserError: there are more replicas than servers.
        """
        if num_replicas > num_servers:
            raise UserError(
                f"sglang.num_servers: {num_replicas} replicas share {num_servers} servers; if servers release their "
                "memory (sglang.colocated), every replica needs a server of its own: start more servers, or set "
                "sglang.colocated = false"
            )


def assign_servers(urls: Sequence[str], replicas: Sequence[int], replica: int) -> tuple[tuple[str, ...], ...]:
    """Assign servers to a replica, so that every server has exactly one owner and none is idle.

    The owner starts a server, or checks it if it is running. If there are fewer servers than replicas, the replicas
    without a server of their own send requests to one that another replica owns.

    Args:
        urls: all servers.
        replicas: indices of the replicas that share them.
        replica: index of this replica.

    Returns:
        The servers that the replica sends requests to, and those of them that it owns.

    >>> assign_servers(["a", "b", "c"], [0, 1], 0), assign_servers(["a"], [0, 1], 1)
    ((('a', 'c'), ('a', 'c')), (('a',), ()))
    """
    place = list(replicas).index(replica)
    owned = tuple(urls[place :: len(replicas)])
    return owned or (urls[place % len(urls)],), owned
