"""Describes the environment that a run starts in (command, machine, package versions) for starts.jsonl."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_vcr1.training.metrics import device_name

# Packages whose version can change what a run computes.
PACKAGES = (
    "megatron_vcr1",
    "torch",
    "megatron-core",
    "transformers",
    "triton",
    "transformer-engine",
    "flash-attn",
    "sglang",
    "nvidia-dali-cuda130",
)


def environment(num_ranks: int) -> dict[str, Any]:
    """Return time, command, machine and package versions as JSON values. Packages that are not installed are left out.

    Args:
        num_ranks: number of processes of the job.
    """
    slurm = {"slurm_job": job} if (job := os.environ.get("SLURM_JOB_ID")) else {}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        "pid": os.getpid(),
        **slurm,
        "ranks": num_ranks,
        "device": device_name() or f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "python": platform.python_version(),
        **package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of `PACKAGES`."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
