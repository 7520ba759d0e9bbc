"""The broadcast channel: torch.distributed with NCCL between GPUs, with gloo otherwise.

Each server gets a process group of its own, in which the trainer is rank 0 and the server's ranks follow. So a server
that dies does not break the transfer to the others. Groups are created for every update: a server that was restarted
in between would not know an old one.

Every step has two sides that must run at the same time: an HTTP call makes the server join, receive or leave, and
torch.distributed does the same on this side. Both run in daemon threads. The caller watches them, because either may
fail and leave the other one waiting:

    the HTTP call fails     the server will not take part: raise its error without waiting for our side
    our side is done        wait for the HTTP call, which confirms that the server has loaded the tensors
    neither in time         raise ServerFault; the threads may hang for longer, but do not keep the process alive
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group, _new_process_group_helper, _world

from megatron_vcr1.rollout.sglang.channels.base import (
    LIVENESS_TIMEOUT_S,
    NamedTensors,
    close_weight_update,
    open_weight_update,
)
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, addresses, call, server_info

POLL_INTERVAL_S = 0.002


class BroadcastChannel:
    """A `Channel` that broadcasts weights with torch.distributed."""

    def __init__(self, backend: Literal["nccl", "gloo"], *, timeout_s: float) -> None:
        """
        Args:
            backend: NCCL for tensors on GPUs, gloo for tensors on the CPU.
            timeout_s: maximum time to join a group, and to send a bucket.
        """
        self._backend = backend
        self._timeout_s = timeout_s
        self._groups: dict[str, _ServerGroup] = {}

    def begin(self, url: str) -> None:
        self._groups[url] = _ServerGroup(url, self._backend, self._timeout_s)
        open_weight_update(url, self._timeout_s)

    def prepare(self, bucket: NamedTensors) -> NamedTensors:
        return [(name, tensor.contiguous()) for name, tensor in bucket]

    def send(self, url: str, prepared: NamedTensors) -> None:
        self._groups[url].broadcast(prepared)

    def finish(self, url: str) -> None:
        close_weight_update(url, self._timeout_s)
        self.abort(url)

    def abort(self, url: str) -> None:
        group = self._groups.pop(url, None)
        if group is not None:
            group.close()


class _ServerGroup:
    """The process group with one server."""

    def __init__(self, url: str, backend: Literal["nccl", "gloo"], timeout_s: float) -> None:
        """Create the group and make the server join it."""
        self.url = url
        self.timeout_s = timeout_s
        self.name = f"vcr1-{uuid.uuid4().hex}"
        num_ranks = 1 + int(server_info(url, timeout_s=timeout_s)["tp_size"])
        address, _ = addresses(url)
        # A store of our own. torch's rendezvous would use torchrun's store if torchrun started us.
        store = _open_store(address, num_ranks, timeout_s)
        body = {"master_address": address, "master_port": store.port, "rank_offset": 1, "world_size": num_ranks}
        server_joins = _in_thread(lambda: self._call("/init_weights_update_group", body | {"backend": backend}))
        we_join = _in_thread(lambda: self._join(store, num_ranks, backend))
        try:
            self.group = _wait_for_both_sides(we_join, server_joins, timeout_s, f"{url}: joining a process group")
            server_joins.result(timeout_s)
        except BaseException:
            we_join.add_done_callback(self._close_late_group)  # the thread may still succeed, after this error
            raise

    def _join(self, store: dist.TCPStore, num_ranks: int, backend: str) -> dist.ProcessGroup:
        # The server joins with SGLang's init_custom_process_group, which uses the same store prefix and the same helper
        # of torch. `dist.new_group` cannot be used: it creates groups within the default group only.
        with _nccl_errors_do_not_abort() if backend == "nccl" else nullcontext():
            group, _ = _new_process_group_helper(
                num_ranks,
                0,
                [],
                dist.Backend(backend),
                dist.PrefixStore(self.name, store),
                group_name=self.name,  # type: ignore[arg-type]
                # Longer than any wait in this file, so that torch's own timeout never comes first.
                timeout=timedelta(seconds=self.timeout_s + 2 * LIVENESS_TIMEOUT_S),
            )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(num_ranks)}  # `_abort_process_group` reads it
        return group

    def broadcast(self, bucket: NamedTensors) -> None:
        """Send a bucket. If the server refuses the request, raise at once: no rank would receive it."""
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "flush_cache": False,
        }
        server_receives = _in_thread(lambda: self._call("/update_weights_from_distributed", body))
        we_send = _in_thread(lambda: self._send([tensor for _, tensor in bucket]))
        _wait_for_both_sides(we_send, server_receives, self.timeout_s, f"{self.url}: a broadcast")
        server_receives.result(self.timeout_s)

    def _send(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors from rank 0; return when all have arrived, or raise when the group is aborted.

        Must run in a thread of its own: NCCL connects its ranks in the first broadcast of a group, and that call waits
        for the server's ranks without a timeout.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        works = [self.group.broadcast([tensor], options) for tensor in tensors]
        # With NCCL, `wait` only makes the CUDA stream wait, and returns before the tensors have arrived.
        while not all(work.is_completed() for work in works):
            time.sleep(POLL_INTERVAL_S)
        for work in works:
            work.wait()  # raises the error of a broadcast that has failed

    def close(self) -> None:
        """Leave the group on both sides, without relying on the server."""
        with suppress(ServerFault, RequestRefused):  # a server that is gone has left the group, too
            self._call("/destroy_weights_update_group", {}, timeout_s=min(self.timeout_s, LIVENESS_TIMEOUT_S))
        # Not `destroy_process_group`: with NCCL, it waits for the peers. Not the group's own `abort`: torch.distributed
        # would keep the group with its store and sockets, so every update would leak some.
        with suppress(TimeoutError):
            _in_thread(lambda: _abort_process_group(self.group)).result(LIVENESS_TIMEOUT_S)

    def _close_late_group(self, we_join: Future[dist.ProcessGroup]) -> None:
        """Close a group that was completed after the constructor had raised."""
        if we_join.exception() is None:
            self.group = we_join.result()
            self.close()

    def _call(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        return call(self.url, "POST", path, body | {"group_name": self.name}, timeout_s=timeout_s or self.timeout_s)


def _open_store(address: str, num_ranks: int, timeout_s: float) -> dist.TCPStore:
    """Open a store that listens on a free port of one address only: loopback for a server that is reached by it.

    The store does not authenticate its clients, and by itself it would listen on all interfaces.
    """
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address,
            port,
            num_ranks,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store owns the socket from here on
        )


_environment_lock = threading.Lock()


@contextmanager
def _nccl_errors_do_not_abort() -> Iterator[None]:
    """Create NCCL groups whose watchdog does not end this process when a peer is lost.

    By default it does, so the loss of a server would end training. torch reads the variable while it creates a group,
    and each server's group is created in a thread of its own: the lock keeps one thread from restoring the variable
    while another one creates its group. `_abort_process_group` also requires this setting.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    with _environment_lock:
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run a function in a daemon thread. (The threads of a ThreadPoolExecutor would keep a hanging process alive.)"""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised in the thread that waits for the future
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _wait_for_both_sides(ours: Future[Any], servers: Future[Any], timeout_s: float, action: str) -> Any:
    """Return the result of our side of an action, unless the server's side fails first.

    Raises:
        ServerFault: our side has no result within `timeout_s`.
        Exception: the error of either side.
    """
    deadline = time.monotonic() + timeout_s
    while not ours.done():
        if servers.done():
            servers.result()  # raises its error; a success says nothing about our side
        if time.monotonic() > deadline:
            raise ServerFault(f"{action} took longer than {timeout_s:.0f} s", unreachable=True)
        time.sleep(POLL_INTERVAL_S)
    return ours.result()
