"""Which servers a copy of the model works with: those of its node, or those that the settings name."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import groups
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call
from megatron_vcr1.rollout.sglang.processes import ServerGroup, server_specs


@dataclass(frozen=True, slots=True)
class Fleet:
    """The servers of one copy of the model, as the rank that talks to them sees them.

    Attributes:
        urls: that it asks.
        owned: that it sends weights to; where copies outnumber servers, one copy does that for all that share one.
        lenders: those of the owned that lend their memory to training.
        processes: that this process started and looks after, for all copies on its node.
        talks: whether this rank is the one.
        run: a name that all ranks of the job agree on, and no other job has.
    """

    urls: tuple[str, ...]
    owned: tuple[str, ...]
    lenders: tuple[str, ...]
    processes: ServerGroup | None
    talks: bool
    run: str


@dataclass(frozen=True, slots=True)
class _Rank:
    host: str
    copy: int
    talks: bool
    run: str


def muster(config: RunConfig) -> Fleet:
    """Start or find the servers; every rank of the job calls it.

    Raises:
        UserError: a setting cannot work.
        EngineError: a server does not start or does not answer.
    """
    talks = groups.broadcast_in_copy(dist.get_rank) == dist.get_rank()
    me = _Rank(socket.gethostname(), groups.copy_index(), talks, uuid.uuid4().hex[:8])
    ranks = groups.gather_objects(me)
    neighbours = [one for one in ranks if one.host == me.host]
    section = config.sglang
    processes, failure = None, None
    if not section.urls and ranks.index(me) == ranks.index(neighbours[0]):
        # After the training's GPUs, unless they are shared.
        first_gpu = 0 if section.colocated else len(neighbours)
        try:
            processes = ServerGroup(
                server_specs(config, first_gpu=first_gpu),
                startup_timeout_s=section.startup_timeout_s,
                max_restarts=section.max_restarts,
            )
            processes.wait_until_ready()
        except (UserError, EngineError) as error:
            failure = error
    failures = [one for one in groups.gather_objects(failure) if one is not None]
    if failures:
        if processes is not None:
            processes.close()
        raise failures[0]
    if section.urls:
        urls, sharers = [url.rstrip("/") for url in section.urls], [one.copy for one in ranks if one.talks]
    else:
        urls = [f"http://127.0.0.1:{section.port + index}" for index in range(section.num_servers)]
        sharers = [one.copy for one in neighbours if one.talks]
    if section.colocated and len(sharers) > len(urls):
        raise UserError(
            f"sglang.num_servers: {len(sharers)} copies of the model share {len(urls)} servers; servers that lend "
            "their memory to training (sglang.colocated) need a copy each"
        )
    asked, owned = divide(urls, sharers, me.copy) if talks else ((), ())
    lenders = owned if section.colocated else ()
    if section.urls:
        savers = {url for url in owned if check_server(url)}
        lenders = tuple(url for url in lenders if url in savers)
    return Fleet(asked, owned, lenders, processes, talks, ranks[0].run)


def divide(urls: Sequence[str], copies: Sequence[int], copy: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The servers that a copy asks, and those of them that it owns, so that each is owned once and none is idle.

    >>> divide(["a", "b", "c"], [0, 1], 0), divide(["a"], [0, 1], 1)
    ((('a', 'c'), ('a', 'c')), (('a',), ()))
    """
    place = list(copies).index(copy)
    owned = tuple(urls[place :: len(copies)])
    return owned or (urls[place % len(urls)],), owned


def check_server(url: str) -> bool:
    """Whether a server that the settings name can lend its memory.

    Raises:
        EngineError: it is not there.
        UserError: it would not do.
    """
    try:
        info = call(url, "GET", "/server_info", timeout_s=30)
    except (ServerFault, RequestRefused) as error:
        raise EngineError(f"sglang.urls: {error}; start it with `vcr1 rollout serve`, or correct the URL") from error
    if info.get("enable_deterministic_inference"):
        raise UserError(
            f"{url} runs with --enable-deterministic-inference, which makes all responses of a group the same; start "
            "it without"
        )
    return bool(info.get("enable_memory_saver"))
