"""A limit on the CPU time of Python code that may never end, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class CpuLimitExceeded(BaseException):
    """Raised in code that used more CPU time than it may. Not an Exception, so that the code does not catch it."""


@contextmanager
def cpu_limit(limit_s: float) -> Iterator[None]:
    """Raise CpuLimitExceeded in this thread if the with-block uses more CPU time than `limit_s`.

    CPU time, because on a busy machine harmless code may wait for its turn. The exception is raised between two
    bytecodes, so a C function is not interrupted. Works in any thread; the signals for such limits reach only the main
    thread.
    """
    thread_id = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread_id)
    end_s = time.clock_gettime(clock) + limit_s
    finished = threading.Event()
    lock = threading.Lock()

    def watch() -> None:
        while not finished.wait(limit_s):
            # Under the lock the with-block has not ended, so the exception cannot hit the code after it.
            with lock:
                if not finished.is_set() and time.clock_gettime(clock) >= end_s:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread_id), ctypes.py_object(CpuLimitExceeded)
                    )
                    return

    watcher = threading.Thread(target=watch, name="CPU limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            finished.set()
