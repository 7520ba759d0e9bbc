"""Four real processes over gloo that run functions of distributed tests. They are started once per session."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.limits import HANG_S
from tests.ports import free_ports

WORLD_SIZE = 4


class RankFailure(AssertionError):
    """A function raised on one of the ranks; the message contains every failed rank's traceback."""


class GlooPool:
    """A pool of four ranks. `run` calls a module-level function on all of them at the same time."""

    def __init__(self) -> None:
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []

    def _start(self) -> None:
        # The ranks are forks of a process that has imported everything, which takes longer than most tests.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        port = free_ports()
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = HANG_S, **kwargs: Any) -> list[Any]:
        """Call `function` on every rank and return the ranks' results, in rank order.

        Raises:
            RankFailure: a rank raised, or did not return within `timeout_s` seconds; the next call starts anew.
        """
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, args, kwargs))
        results, failures = [], []
        for rank, (process, connection) in enumerate(self._workers):
            # After one rank has failed, the others may wait for it in a collective until they time out. A process that
            # was killed is known by its sentinel: its pipe stays open as long as a child of it has inherited it.
            wait([connection, process.sentinel], 1 if failures else timeout_s)
            try:
                if connection.poll():
                    ok, value = connection.recv()
                elif process.exitcode is not None:
                    ok, value = False, "the process was killed"
                else:
                    ok, value = False, "no answer (waiting in a collective?)"
            except EOFError:
                ok, value = False, "the process was killed"
            (results if ok else failures).append(value if ok else f"rank {rank}: {value}")
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return results

    def close(self) -> None:
        """Kill the processes; `run` starts new ones."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()


def _serve(rank: int, port: int, connection: Connection) -> None:
    """Run functions in a rank's process until it is killed."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    if find_spec("megatron") is not None:  # missing on a machine that runs tests/kernels only
        from megatron_vcr1.model import cpu

        cpu.install()
    while True:
        function, args, kwargs = connection.recv()
        try:
            _destroy_subgroups()
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def _destroy_subgroups() -> None:
    """Destroy the previous function's process groups except the default one, and free them.

    Each group has threads that wake up all the time, even if nothing is sent. megatron-core's globals and the reference
    cycles of models keep groups alive. All ranks have returned from the function: `GlooPool.run` waits for all of them.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    for group in list(_world.pg_map) if dist.is_initialized() else ():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
