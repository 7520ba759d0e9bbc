"""Measures all-reduce among the ranks of a job: correctness, and bandwidth per rank. NCCL with GPUs, gloo without.

Then it connects all ranks with gloo, too, which training uses for frames and checkpoints.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model import cpu
from megatron_vcr1.parallel import collectives, mesh

NUM_REPEATS = 5


def all_reduce_gb_per_s(num_bytes: int) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s per rank, as nccl-tests define it. All ranks call it.

    Raises:
        RuntimeError: the sum is wrong.
    """
    ranks = dist.get_world_size()
    values = torch.ones(num_bytes // 4, device=mesh.device())
    dist.all_reduce(values)  # warms up, and creates NCCL's communicator
    if not bool((values == ranks).all()):
        raise RuntimeError(f"the sum of ones over {ranks} ranks is wrong on {platform.node()}")
    _synchronize()
    start_s = time.perf_counter()
    for _ in range(NUM_REPEATS):
        dist.all_reduce(values)
    _synchronize()
    seconds = (time.perf_counter() - start_s) / NUM_REPEATS
    return num_bytes * 2 * (ranks - 1) / ranks / seconds / 1e9


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(megabytes: int) -> None:
    """Measure and print on the first rank. All ranks call it."""
    hosts = collectives.gather_objects(platform.node())
    speed = all_reduce_gb_per_s(megabytes * 2**20)
    slowest = min(collectives.gather_objects(speed))
    if mesh.is_first_rank():
        nodes = ", ".join(dict.fromkeys(hosts))
        print(f"{len(hosts)} ranks on {nodes}: {dist.get_backend()} all-reduce {slowest:.2f} GB/s per rank", flush=True)


def connect_with_gloo(timeout_s: float) -> None:
    """Connect all ranks with gloo, as training does, and print on the first rank. All ranks call it.

    gloo connects to the address of a node's host name, which may be one that other nodes cannot reach, such as
    127.0.1.1.

    Raises:
        RuntimeError: the ranks cannot connect.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        collectives.run_on_every_rank(lambda: None, dist.new_group(backend="gloo", timeout=timeout))
    except RuntimeError as error:
        raise RuntimeError(
            f"{platform.node()}: gloo cannot connect the ranks; set GLOO_SOCKET_IFNAME to the network interface that "
            "connects the nodes (`ip address` lists them)"
        ) from error
    if mesh.is_first_rank():
        print("gloo connects all ranks", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the tensor (default: %(default)s)")
    args = parser.parse_args(argv)
    cpu.install()
    with mesh.world(ParallelSection(), timeout_s=120):
        measure(args.megabytes)
        connect_with_gloo(timeout_s=120)


if __name__ == "__main__":
    main()
