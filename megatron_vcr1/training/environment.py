"""What a run was started on: for its record, and for whoever reads it later."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_vcr1.training.metrics import device_name

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
    """Time, command, machine and versions, as JSON values; what is not installed is left out."""
    slurm = {"slurm_job": job} if (job := os.environ.get("SLURM_JOB_ID")) else {}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        **slurm,
        "ranks": num_ranks,
        "device": device_name() or f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
