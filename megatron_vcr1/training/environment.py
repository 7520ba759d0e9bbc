"""The environment that a run starts in: its description for starts.jsonl, and deterministic algorithms."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

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


def use_deterministic_algorithms() -> None:
    """Make torch use deterministic algorithms, and raise an error where it has none.

    flash-attn and megatron-core's embedding follow torch's switch (`vcr1_kernels.ops.flash_attn`,
    `model.transformer_config`); the Triton kernels are always deterministic. Call it before the first use of CUDA:
    cuBLAS reads its variable when it is initialized.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # torch would also fill every new tensor, to show reads of memory that was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
