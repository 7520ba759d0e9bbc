"""`vcr1 rollout serve`: a node's servers without a training run."""

from __future__ import annotations

import signal
import sys
import threading

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang.processes import ServerGroup, require_sglang, server_specs

POLL_S = 0.5


def serve(config: RunConfig, host: str) -> int:
    """Run the servers until SIGINT or SIGTERM (0) or until one can no longer be kept alive (1).

    Args:
        host: address that they listen on.

    Raises:
        UserError: a setting cannot work, or sglang is not installed.
    """
    require_sglang(config.sglang.python)
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    servers = ServerGroup(
        server_specs(config, host=host),
        startup_timeout_s=config.sglang.startup_timeout_s,
        max_restarts=config.sglang.max_restarts,
    )
    try:
        ready: set[str] = set()
        while not interrupted.wait(POLL_S):
            for url in servers.urls:
                if failure := servers.failure(url):
                    raise EngineError(failure)
                if url not in ready and servers.is_ready(url):
                    ready.add(url)
                    print(f"ready: {url}", flush=True)
    except EngineError as error:
        print(f"vcr1: failed: {error}", file=sys.stderr)
        return 1
    finally:
        servers.close()
    return 0
