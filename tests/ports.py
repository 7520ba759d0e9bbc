"""Find ports for the servers of tests."""

import os
import random
import socket

# The kernel takes the ports of outgoing connections from 32768 up. A port below cannot be lost to one of them between
# the search and the start of the server that is to listen on it.
FIRST, LAST = 20_000, 32_767


def free_ports(count: int = 1) -> int:
    """Return the first of `count` consecutive ports of the loopback interface on which nobody listens.

    pytest's workers search separate ranges, so that two of them do not find the same ports.

    Raises:
        RuntimeError: there are none.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    size = (LAST + 1 - FIRST) // workers
    starts = range(FIRST + worker * size, FIRST + (worker + 1) * size - count + 1)
    # In random order: another pytest may be running on this machine.
    for start in random.Random().sample(starts, len(starts)):
        if all(_is_free(port) for port in range(start, start + count)):
            return start
    raise RuntimeError(f"no {count} consecutive free ports between {starts.start} and {starts.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
