"""Find ports for the servers of tests."""

import os
import random
import socket
from collections import deque

# The kernel takes the ports of outgoing connections from 32768 up. A port below cannot be lost to one of them between
# the search and the start of the server that is to listen on it.
FIRST, LAST = 20_000, 32_767
_MAX_RESERVED = 64  # a reservation only has to last until the server listens
_reserved: deque[socket.socket] = deque()


def free_ports(count: int = 1) -> int:
    """Return the first of `count` consecutive ports on which nobody listens, and reserve them.

    pytest's workers search separate ranges, so that two of them do not find the same ports. Another pytest on this
    machine does not find them either, even if the server is still starting.

    Raises:
        RuntimeError: there are none.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    size = (LAST + 1 - FIRST) // workers
    starts = range(FIRST + worker * size, FIRST + (worker + 1) * size - count + 1)
    # In random order: another pytest may be running on this machine.
    for start in random.Random().sample(starts, len(starts)):
        ports = range(start, start + count)
        if all(map(_is_free, ports)) and all(map(_reserve, ports)):
            return start
    raise RuntimeError(f"no {count} consecutive free ports between {starts.start} and {starts.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))  # fails if anybody listens on any interface: some servers listen on all of them
        except OSError:
            return False
        return True


def _reserve(port: int) -> bool:
    """Reserve a port among the test processes of this machine; return False if another one has reserved it."""
    reservation = socket.socket(socket.AF_UNIX)
    try:
        reservation.bind(f"\0port {port} of a test of megatron_vcr1")  # no file: the kernel frees it with the process
    except OSError:
        reservation.close()
        return False
    _reserved.append(reservation)
    if len(_reserved) > _MAX_RESERVED:
        _reserved.popleft().close()
    return True
