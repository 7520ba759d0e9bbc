"""The three ways of weights to servers: broadcast, shared memory of one host, disk."""

from __future__ import annotations

import base64
import errno
import io
import os
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group, _new_process_group_helper, _world

from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, addresses, call, server_info
from megatron_vcr1.rollout.sglang.weight_sync import LIVENESS_S, NamedTensors

POLL_S = 0.002
SHARED_MEMORY = Path("/dev/shm")


def open_session(url: str, timeout_s: float) -> None:
    """SGLang takes tensors between these two calls only."""
    try:
        call(url, "POST", "/begin_weight_update", {}, timeout_s=timeout_s)
    except RequestRefused:  # left open by an update that was broken off
        close_session(url, timeout_s)
        call(url, "POST", "/begin_weight_update", {}, timeout_s=timeout_s)


def close_session(url: str, timeout_s: float) -> None:
    call(url, "POST", "/end_weight_update", {}, timeout_s=timeout_s)


class BroadcastChannel:
    """torch.distributed: rank 0 of a group of two or more, in which the other ranks are a server's.

    Each server has a group of its own, so that one that dies takes no other with it. NCCL on a GPU, gloo otherwise.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._groups: dict[str, _Group] = {}

    def begin(self, url: str) -> None:
        # For every update: a server that was restarted since then would know nothing of an old group.
        self._groups[url] = _Group(url, self._timeout_s)
        open_session(url, self._timeout_s)

    def prepare(self, bucket: NamedTensors) -> NamedTensors:
        return [(name, tensor.contiguous()) for name, tensor in bucket]

    def send(self, url: str, prepared: NamedTensors) -> None:
        self._groups[url].broadcast(prepared)

    def finish(self, url: str) -> None:
        close_session(url, self._timeout_s)
        self.abandon(url)

    def abandon(self, url: str) -> None:
        group = self._groups.pop(url, None)
        if group is not None:
            group.close()


class _Group:
    """The process group with one server."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.name = f"vcr1-{uuid.uuid4().hex}"
        num_ranks = 1 + int(server_info(url, timeout_s=timeout_s)["tp_size"])
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        address, _ = addresses(url)
        # Made here, on any free port, and not by a rendezvous, which under torchrun would look for torchrun's store.
        patience = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, 0, num_ranks, is_master=True, timeout=patience, wait_for_workers=False)
        body = {"master_address": address, "master_port": store.port, "rank_offset": 1, "world_size": num_ranks}
        joined = _in_thread(lambda: self._call("/init_weights_update_group", body | {"backend": backend}))
        joining = _in_thread(lambda: self._join(store, num_ranks, backend))
        try:
            self.group = _await(joining, joined, timeout_s, f"{url}: joining a process group")
            joined.result(timeout_s)
        except BaseException:
            joining.add_done_callback(self._leave)  # which may come about yet
            raise

    def _join(self, store: dist.TCPStore, num_ranks: int, backend: str) -> dist.ProcessGroup:
        # The server's side joins by SGLang's init_custom_process_group: the same store, prefixes and helper.
        with _errors_end_nothing() if backend == "nccl" else nullcontext():
            group, _ = _new_process_group_helper(
                num_ranks,
                0,
                [],
                dist.Backend(backend),
                dist.PrefixStore(self.name, store),
                group_name=self.name,  # type: ignore[arg-type]
                timeout=timedelta(seconds=self.timeout_s + 2 * LIVENESS_S),  # this side's own clock, and `close`, first
            )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(num_ranks)}  # which leaving it looks up
        return group

    def broadcast(self, bucket: NamedTensors) -> None:
        """Send a bucket; the server's answer is watched meanwhile, since a refusal would leave the broadcast alone."""
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "flush_cache": False,
        }
        answer = _in_thread(lambda: self._call("/update_weights_from_distributed", body))
        sent = _in_thread(lambda: self._send([tensor for _, tensor in bucket]))
        _await(sent, answer, self.timeout_s, f"{self.url}: a broadcast")
        answer.result(self.timeout_s)

    def _send(self, tensors: Sequence[Tensor]) -> None:
        """Returns when all tensors have arrived, or when the group is left.

        NCCL connects its ranks in the first broadcast, and this call of it waits for the server's without an end.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        works = [self.group.broadcast([tensor], options) for tensor in tensors]
        while not all(work.is_completed() for work in works):  # NCCL's `wait` would return before they have
            time.sleep(POLL_S)
        for work in works:
            work.wait()  # raises what broke it

    def close(self) -> None:
        """Leave the group without waiting for the other side, which may be gone."""
        with suppress(ServerFault, RequestRefused):  # a server that is gone has left, too
            self._call("/destroy_weights_update_group", {}, timeout_s=min(self.timeout_s, LIVENESS_S))
        # Not destroyed: NCCL's own goodbye waits for its peers. The group's `abort` alone would leave the group, its
        # store and its sockets with torch.distributed: some more of them with every update.
        with suppress(TimeoutError):
            _in_thread(lambda: _abort_process_group(self.group)).result(LIVENESS_S)

    def _leave(self, joining: Future[dist.ProcessGroup]) -> None:
        if joining.exception() is None:
            self.group = joining.result()
            self.close()

    def _call(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        return call(self.url, "POST", path, body | {"group_name": self.name}, timeout_s=timeout_s or self.timeout_s)


_environment = threading.Lock()


@contextmanager
def _errors_end_nothing() -> Iterator[None]:
    """For a group that is made meanwhile, NCCL's watchdog does not end the process when a peer is lost.

    It does by default, and then the loss of a server would be the training's. `_abort_process_group` asks for it.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    with _environment:  # a thread makes a group for each server
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            yield
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


class SharedMemoryChannel:
    """Tensors in shared memory of one host; what travels is a description of where they lie."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def begin(self, url: str) -> None:
        open_session(url, self._timeout_s)

    def prepare(self, bucket: NamedTensors) -> tuple[str, NamedTensors]:
        stream = io.BytesIO()
        with _named_shared_memory():
            shared = _copy_to_shared_memory(bucket)
            ForkingPickler(stream).dump(shared)
        # Pickling counts one reader, `send` all of them. The memory's name goes as soon as none is left.
        shared[0][1].untyped_storage()._shared_decref()
        return base64.b64encode(stream.getvalue()).decode(), shared  # the memory lives as long as the tensors

    def send(self, url: str, prepared: tuple[str, NamedTensors]) -> None:
        description, shared = prepared
        num_ranks = int(server_info(url, timeout_s=self._timeout_s)["tp_size"])
        storage = shared[0][1].untyped_storage()
        for _ in range(num_ranks):  # each gives its count back as it opens the memory
            storage._shared_incref()
        body = {"serialized_named_tensors": [description] * num_ranks, "flush_cache": False}
        try:
            call(url, "POST", "/update_weights_from_tensor", body, timeout_s=self._timeout_s)
        except BaseException:  # a count may never be given back, and the name outlive the tensors
            name = storage._share_filename_cpu_()[1].decode()
            weakref.finalize(shared[0][1], (SHARED_MEMORY / name.removeprefix("/")).unlink, missing_ok=True)
            raise

    def finish(self, url: str) -> None:
        close_session(url, self._timeout_s)

    def abandon(self, url: str) -> None:
        """Nothing is kept for one server."""


@contextmanager
def _named_shared_memory() -> Iterator[None]:
    """Memory that is shared by name: a server is no child of this process, which alone could be passed a descriptor."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _copy_to_shared_memory(bucket: NamedTensors) -> NamedTensors:
    """The tensors on the CPU, in one piece of shared memory."""
    alignment = 16  # bytes
    sizes = [-(-tensor.nbytes // alignment) * alignment for _, tensor in bucket]
    if sum(sizes) > shutil.disk_usage(SHARED_MEMORY).free:  # to write where none is left would end the process
        raise OSError(errno.ENOSPC, "no room for sglang.weight_sync_bucket_mb of weights", str(SHARED_MEMORY))
    memory = torch.empty(sum(sizes), dtype=torch.uint8).share_memory_()
    shared = []
    for (name, tensor), piece in zip(bucket, memory.split(sizes), strict=True):
        view = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        shared.append((name, view.copy_(tensor)))
    return shared


class DiskChannel:
    """A Hugging Face directory, of which the servers read."""

    def __init__(self, model_dir: Path, folder: Path, weights: str, *, timeout_s: float) -> None:
        """
        Args:
            model_dir: gives configuration, tokenizer and processor files.
            folder: where the directory is made; earlier ones in it are removed when the new one is used.
            weights: the version, which names the directory.
        """
        self.directory = folder / weights
        self._timeout_s = timeout_s
        self._num_files = 0
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        for source in model_dir.iterdir():
            if source.suffix in (".json", ".jinja", ".txt", ".model") and not source.name.endswith(".index.json"):
                shutil.copy(source, self.directory)

    def begin(self, url: str) -> None:
        """Nothing: SGLang reads all files in one go."""

    def prepare(self, bucket: NamedTensors) -> None:
        self._num_files += 1
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket}
        save_file(tensors, self.directory / f"model-{self._num_files:05}.safetensors", {"format": "pt"})

    def send(self, url: str, prepared: None) -> None:
        """Nothing yet."""

    def finish(self, url: str) -> None:
        body = {"model_path": str(self.directory), "load_format": "auto"}
        call(url, "POST", "/update_weights_from_disk", body, timeout_s=self._timeout_s)

    def abandon(self, url: str) -> None:
        """Nothing is kept for one server."""

    def remove_others(self) -> None:
        """Remove the directories of earlier versions."""
        for other in self.directory.parent.iterdir():
            if other != self.directory:
                shutil.rmtree(other)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run in a daemon thread: one that hangs does not keep the process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _await(mine: Future[Any], theirs: Future[Any], timeout_s: float, what: str) -> Any:
    """My side's result, unless the other side fails first."""
    deadline = time.monotonic() + timeout_s
    while not mine.done():
        if theirs.done():
            theirs.result()
        if time.monotonic() > deadline:
            raise ServerFault(f"{what} took longer than {timeout_s:.0f} s", gone=True)
        time.sleep(POLL_S)
    return mine.result()
