"""Runs SGLang servers on a node without training: `vcr1 rollout serve`."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang.launch import require_sglang, server_specs
from megatron_vcr1.rollout.sglang.processes import ServerGroup

POLL_INTERVAL_S = 0.5


def serve(section: SglangSection, model: ModelSection, *, run_dir: Path, seed: int, host: str) -> int:
    """Run the servers, print the URL of each when it is ready, and end all of them on SIGINT or SIGTERM.

    Args:
        section: settings of the servers.
        model: path and dtype of the model that they serve.
        run_dir: run directory, for logs.
        seed: the run's seed.
        host: address that the servers listen on.

    Returns:
        The exit code: 0 after a signal, 1 if a server has failed and has no restart left.

    Raises:
        UserError: a setting cannot work, or sglang is not installed.
    """
    require_sglang(section.python)
    interrupted = threading.Event()
    # The handlers only set an event. An exception from a handler could interrupt the code that ends the servers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    servers = ServerGroup(
        server_specs(section, model, Placement.from_section(section), run_dir=run_dir, seed=seed, host=host),
        startup_timeout_s=section.startup_timeout_s,
        max_restarts=section.max_restarts,
    )
    try:
        ready: set[str] = set()
        while not interrupted.wait(POLL_INTERVAL_S):
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
