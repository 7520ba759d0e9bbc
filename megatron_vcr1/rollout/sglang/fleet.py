"""Which servers a copy of the model works with: those of its node, or those that the settings name."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, is_here, server_info
from megatron_vcr1.rollout.sglang.loan import take_back
from megatron_vcr1.rollout.sglang.processes import ServerGroup, require_sglang, server_specs, server_url


@dataclass(frozen=True, slots=True)
class Fleet:
    """The servers of one copy of the model, as the rank that talks to them sees them.

    Attributes:
        urls: that it asks, and brings weights to.
        shared: other copies may do the same.
        lenders: those that lend their memory to training.
        processes: that this rank started and looks after, for the copies that share them, too.
        talks: whether this rank is the one.
        run: a name that all ranks of the job agree on, and no other job has.
    """

    urls: tuple[str, ...]
    shared: bool
    lenders: tuple[str, ...]
    processes: ServerGroup | None
    talks: bool
    run: str


@dataclass(frozen=True, slots=True)
class _Rank:
    rank: int
    host: str
    copy: int
    talks: bool
    run: str


def find_or_start_servers(config: RunConfig) -> Fleet:
    """Start or find the servers; every rank of the job calls it, and all of them get the first one's error.

    Raises:
        UserError: a setting cannot work.
        EngineError: a server does not start or does not answer.
    """
    talks = collectives.broadcast_within_replica(dist.get_rank) == dist.get_rank()
    me = _Rank(dist.get_rank(), socket.gethostname(), mesh.replica_index(), talks, uuid.uuid4().hex[:8])
    ranks = collectives.gather_objects(me)
    fleet, failure = None, None
    try:
        fleet = _name_servers(config, ranks) if config.sglang.urls else _start_servers(config, ranks)
    except (UserError, EngineError) as error:
        failure = error
    failures = [one for one in collectives.gather_objects(failure) if one is not None]
    if failures:
        if fleet is not None and fleet.processes is not None:
            fleet.processes.close()
        raise failures[0]
    assert fleet is not None
    return fleet


def _name_servers(config: RunConfig, ranks: Sequence[_Rank]) -> Fleet:
    """The servers of the settings, divided among all copies."""
    urls = list(dict.fromkeys(url.rstrip("/") for url in config.sglang.urls))  # each once: two copies would own it
    me, talkers = ranks[dist.get_rank()], [one.copy for one in ranks if one.talks]
    asked, owned = divide(urls, talkers, me.copy) if me.talks else ((), ())
    can_lend = {url for url in owned if check_server(url)}
    needs_memory = config.sglang.weight_sync == "tensor" or config.sglang.transport == "file"
    for url in asked:
        if needs_memory and not is_here(url):
            raise UserError(
                f"sglang.urls: {url} is not on {me.host}, whose shared memory it would have to read; set "
                "sglang.weight_sync = 'broadcast' or 'disk', and sglang.transport = 'inline'"
            )
    lenders = tuple(url for url in owned if config.sglang.colocated and url in can_lend and is_here(url))
    shared = len(talkers) > len(urls)
    if lenders and shared:
        raise _too_few(talkers, urls)
    return Fleet(asked, shared, lenders, None, me.talks, ranks[0].run)


def _start_servers(config: RunConfig, ranks: Sequence[_Rank]) -> Fleet:
    """A node's servers, divided among the copies that are talked for on the node; each of these starts its own."""
    section, me = config.sglang, ranks[dist.get_rank()]
    neighbours = [one for one in ranks if one.host == me.host]
    talkers = [one.copy for one in neighbours if one.talks]
    urls = [server_url(section.port + index) for index in range(section.num_servers)]
    shared = len(talkers) > len(urls)
    if section.colocated and shared:
        raise _too_few(talkers, urls)
    asked, owned = divide(urls, talkers, me.copy) if me.talks else ((), ())
    processes = None
    if owned:
        require_sglang(section.python)
        # On the GPUs after the training's, unless they are shared.
        specs = server_specs(config, first_gpu=0 if section.colocated else len(neighbours))
        processes = ServerGroup(
            [spec for spec in specs if spec.url in owned],
            startup_timeout_s=section.startup_timeout_s,
            max_restarts=section.max_restarts,
        )
        try:
            processes.wait_until_ready()
        except BaseException:
            processes.close()
            raise
    return Fleet(asked, shared, owned if section.colocated else (), processes, me.talks, ranks[0].run)


def _too_few(copies: Sequence[int], urls: Sequence[str]) -> UserError:
    return UserError(
        f"sglang.num_servers: {len(copies)} copies of the model share {len(urls)} servers; servers that lend their "
        "memory to training (sglang.colocated) need a copy each"
    )


def divide(urls: Sequence[str], copies: Sequence[int], copy: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The servers that a copy asks, and those of them that it owns, so that each is owned once and none is idle.

    The owner starts a server, or finds it fit.

    >>> divide(["a", "b", "c"], [0, 1], 0), divide(["a"], [0, 1], 1)
    ((('a', 'c'), ('a', 'c')), (('a',), ()))
    """
    place = list(copies).index(copy)
    owned = tuple(urls[place :: len(copies)])
    return owned or (urls[place % len(urls)],), owned


def check_server(url: str) -> bool:
    """Whether a server that the settings name can lend its memory, and keeps its weights meanwhile.

    Raises:
        EngineError: it is not there.
        UserError: it would not do.
    """
    try:
        info = server_info(url, timeout_s=30)
        # A run that was killed has left it lent, or, within an update, paused.
        take_back(url, timeout_s=30)
        call(url, "POST", "/continue_generation", {}, timeout_s=30)
    except (ServerFault, RequestRefused) as error:
        raise EngineError(f"sglang.urls: {error}; start it with `vcr1 rollout serve`, or correct the URL") from error
    if info.get("enable_deterministic_inference"):
        raise UserError(
            f"{url} runs with --enable-deterministic-inference, which makes all responses of a group the same; start "
            "it without"
        )
    if info.get("dp_size", 1) > 1 or info.get("pp_size", 1) > 1:
        raise UserError(
            f"{url} runs with --dp-size or --pp-size; new weights do not reach replicas and stages: start it without"
        )
    return bool(info.get("enable_memory_saver") and info.get("enable_weights_cpu_backup"))
