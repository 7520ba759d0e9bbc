"""Worker processes that decode ahead of the training step.

Process tree and lifetimes:

- The reader is the process that iterates, for example a training rank. It starts multiprocessing's fork server once
  (`start_fork_server`); the fork server forks the workers. Forking the reader itself would copy locks that its decoder
  and communication threads may hold at that moment, and a worker would wait for them forever.
- The job scheduler's SIGTERM and SIGUSR1 are blocked in the fork server and in all workers: the reader needs them until
  it has saved its checkpoint.
- A worker packs its results itself (`data/shared_memory.py`), so that a full /dev/shm reaches the reader as an error.
- A worker ends with its reader, even if that is killed by SIGKILL, and when the reader sends SIGTERM
  (`_end_with_the_reader`). Each worker may have a decoding subprocess of its own (`VideoReader`), which ends when its
  request pipe closes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_vcr1.data.shared_memory import PREFETCH_PER_WORKER, PackedResult, pack, unpack
from megatron_vcr1.data.signals import start_fork_server

S = TypeVar("S")
T = TypeVar("T")


def decode_ahead(
    make: Callable[[S], T], items: Iterable[S], *, num_workers: int, prefetch_per_worker: int = PREFETCH_PER_WORKER
) -> Iterator[T]:
    """Compute `make(item)` for every item, in order, in worker processes that end with this process.

    Items are sent to the workers one at a time, so that a manifest of millions of rows stays in this process.

    Args:
        make: function to run in the workers. It is pickled, as are the items and the results.
        items: items to process; may be endless.
        num_workers: number of worker processes; 0 computes in this process.
        prefetch_per_worker: number of items that each worker processes in advance.

    Raises:
        UserError: shared memory has no room for a result.
    """
    if not num_workers:
        yield from map(make, items)
        return
    start_fork_server()
    packed_results: Iterable[PackedResult] = DataLoader(
        _Results(make),
        # The sampler yields what the data set is indexed with: here the items themselves.
        sampler=items,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_per_worker,
        multiprocessing_context="forkserver",
        collate_fn=_identity,
        worker_init_fn=_end_with_the_reader,
        # Without a generator of its own, DataLoader draws from the global one, and a resumed run would diverge.
        generator=torch.Generator(),
    )
    yield from map(unpack, packed_results)


def worker_name() -> str:
    """Return the name of this worker process, or of the current thread outside of a worker."""
    worker = get_worker_info()
    return threading.current_thread().name if worker is None else f"decoding worker {worker.id}"


class _Results(Dataset[PackedResult]):
    """A data set whose element at an "index" is the packed result of a function for it."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, item: Any) -> PackedResult:
        return pack(self._make(item))


def _identity(loaded: Any) -> Any:
    return loaded


def _end_with_the_reader(worker_id: int) -> None:
    """Start two threads in a worker that end it when its reader ends or sends SIGTERM.

    DataLoader's own watchdog does not help. It watches the worker's parent, which is the fork server, and that lives as
    long as its workers do.

    A reader that fails sends SIGTERM to its workers and waits for them. SIGTERM is blocked here (`start_fork_server`),
    so a thread waits for it and ignores the scheduler's, which comes from another process.
    """
    reader = multiprocessing.parent_process()
    assert reader is not None

    def exit_after_the_reader() -> None:
        reader.join()
        os._exit(1)

    def exit_at_the_readers_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != reader.pid:
            pass
        os._exit(1)

    threading.Thread(target=exit_after_the_reader, name="exit after the reader", daemon=True).start()
    threading.Thread(target=exit_at_the_readers_sigterm, name="exit at the reader's SIGTERM", daemon=True).start()
