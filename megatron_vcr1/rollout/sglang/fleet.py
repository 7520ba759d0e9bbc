"""The servers of a replica: checks the running servers that the settings name, or starts the run's own servers."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.placement import Placement, assign_servers
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, is_on_this_host, server_info
from megatron_vcr1.rollout.sglang.launch import require_sglang, server_specs, server_url
from megatron_vcr1.rollout.sglang.memory import resume_memory
from megatron_vcr1.rollout.sglang.processes import ServerGroup


@dataclass(frozen=True, slots=True)
class Fleet:
    """The servers of one replica, as its leader sees them. On the other ranks, `urls` is empty.

    Attributes:
        urls: servers that the replica sends requests and weights to.
        shared: whether other replicas may use the same servers.
        releasing: servers that release their memory while training computes.
        processes: the servers that this rank has started and supervises; None if there are none.
        is_leader: whether this rank talks to the servers.
        job_id: random id of the job; the same on all its ranks.
        placement: how servers and training share the machines.
    """

    urls: tuple[str, ...]
    shared: bool
    releasing: tuple[str, ...]
    processes: ServerGroup | None
    is_leader: bool
    job_id: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class _Rank:
    """The properties of a rank by which servers are assigned; every rank has the records of all ranks."""

    rank: int
    host: str
    replica: int
    is_leader: bool
    job_id: str


def find_or_start_servers(section: SglangSection, model: ModelSection, *, run_dir: Path, seed: int) -> Fleet:
    """Check the servers of `sglang.urls`, or start the run's own if there are none.

    Every rank of the job must call it: it runs two collectives of all ranks. The second one exchanges errors: an error
    on any rank is raised on all of them, after the servers that have been started are closed again.

    Args:
        section: settings of the servers.
        model: path and dtype of the model, for servers that are started.
        run_dir: run directory, for logs.
        seed: the run's seed.

    Raises:
        UserError: a setting cannot work.
        EngineError: a server does not start or does not respond.
    """
    placement = Placement.from_section(section)
    is_leader = collectives.broadcast_within_replica(dist.get_rank) == dist.get_rank()
    me = _Rank(dist.get_rank(), socket.gethostname(), mesh.replica_index(), is_leader, uuid.uuid4().hex[:8])
    ranks = collectives.gather_objects(me)
    fleet, failure = None, None
    try:
        if placement.starts_servers:
            fleet = _start_servers(section, model, placement, ranks, run_dir=run_dir, seed=seed)
        else:
            fleet = _use_running_servers(section, placement, ranks)
    except (UserError, EngineError) as error:
        failure = error
    failures = [error for error in collectives.gather_objects(failure) if error is not None]
    if failures:
        if fleet is not None and fleet.processes is not None:
            fleet.processes.close()
        raise failures[0]
    assert fleet is not None
    return fleet


def _use_running_servers(section: SglangSection, placement: Placement, ranks: Sequence[_Rank]) -> Fleet:
    """Assign the servers of `sglang.urls` to all replicas, and check those that this rank owns."""
    # Remove duplicates: a server that is listed twice would have two owners.
    urls = list(dict.fromkeys(url.rstrip("/") for url in section.urls))
    me, replicas = ranks[dist.get_rank()], [rank.replica for rank in ranks if rank.is_leader]
    used, owned = assign_servers(urls, replicas, me.replica) if me.is_leader else ((), ())
    # Only the owner checks a server: the check changes its state, which two replicas must not do at the same time.
    can_release = {url for url in owned if check_server(url)}
    for url in used:
        # The server's process would end when it opens shared memory that does not exist on its host.
        if placement.needs_shared_memory and not is_on_this_host(url):
            raise UserError(
                f"sglang.urls: {url} is not on {me.host}, whose shared memory it would have to read; set "
                "sglang.weight_sync = 'broadcast' or 'disk', and sglang.transport = 'inline'"
            )
    # Training on this host cannot use memory of another host.
    releasing = tuple(url for url in owned if placement.colocated and url in can_release and is_on_this_host(url))
    if releasing:
        placement.check_sharing(len(replicas), len(urls))
    return Fleet(used, len(replicas) > len(urls), releasing, None, me.is_leader, ranks[0].job_id, placement)


def _start_servers(
    section: SglangSection,
    model: ModelSection,
    placement: Placement,
    ranks: Sequence[_Rank],
    *,
    run_dir: Path,
    seed: int,
) -> Fleet:
    """Assign the servers of this node to the replicas whose leaders are on it, and start those that this rank owns."""
    me = ranks[dist.get_rank()]
    ranks_here = [rank for rank in ranks if rank.host == me.host]
    replicas = [rank.replica for rank in ranks_here if rank.is_leader]
    urls = [server_url(section.port + index) for index in range(placement.num_servers)]
    if placement.colocated:
        placement.check_sharing(len(replicas), len(urls))
    found = placement.replicas_of_servers([rank.replica for rank in ranks_here])
    if found is not None and {*found} == {*replicas}:
        # Every replica gets the servers on its own GPUs, so that they can read the weights there.
        own = [url for url, replica in zip(urls, found, strict=True) if replica == me.replica]
        used = owned = tuple(own) if me.is_leader else ()
    else:
        used, owned = assign_servers(urls, replicas, me.replica) if me.is_leader else ((), ())
    processes = None
    if owned:
        require_sglang(section.python)
        specs = server_specs(section, model, placement, run_dir=run_dir, seed=seed, num_training_ranks=len(ranks_here))
        processes = ServerGroup(
            [spec for spec in specs if spec.url in owned],
            startup_timeout_s=section.startup_timeout_s,
            max_restarts=section.max_restarts,
        )
        # All servers of the node start at the same time; each owner waits for its own.
        try:
            processes.wait_until_ready()
        except BaseException:
            processes.close()
            raise
    releasing = owned if placement.colocated else ()
    return Fleet(used, len(replicas) > len(urls), releasing, processes, me.is_leader, ranks[0].job_id, placement)


def check_server(url: str) -> bool:
    """Check a running server that the settings name, and undo what a killed run has left in it.

    Returns:
        Whether the server can release its memory and keeps a copy of its weights meanwhile.

    Raises:
        EngineError: the server does not respond.
        UserError: the server runs with settings that cannot work.
    """
    try:
        info = server_info(url, timeout_s=30)
        # A run that was killed may have left the memory released or, during a weight sync, generation paused.
        resume_memory(url, timeout_s=30)
        call(url, "POST", "/continue_generation", {}, timeout_s=30)
    except (ServerFault, RequestRefused) as error:
        raise EngineError(f"sglang.urls: {error}; start it with `vcr1 rollout serve`, or correct the URL") from error
    if info.get("enable_deterministic_inference"):
        raise UserError(
            f"{url} runs with --enable-deterministic-inference, which makes all responses of a group equal; start it "
            "without this option"
        )
    if info.get("dp_size", 1) > 1 or info.get("pp_size", 1) > 1:
        raise UserError(
            f"{url} runs with --dp-size or --pp-size; weight sync does not reach a server's replicas and stages: start "
            "it without them"
        )
    return bool(info.get("enable_memory_saver") and info.get("enable_weights_cpu_backup"))
