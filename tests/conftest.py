"""What every test shares: no network, one thread a process, and the optional real data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gloo import GlooPool

# Before torch and huggingface_hub are imported, by the tests or by processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # NVIDIA's containers set it; tests ask for float32
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our kernels are tested in the interpreter; triton reads it once

if find_spec("hypothesis") is not None:  # a machine that only runs tests/kernels may lack it
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)  # a busy machine is no failure
    # pytest --hypothesis-profile=thorough tests/rewards tests/evaluation/test_metrics.py
    settings.register_profile("thorough", deadline=None, max_examples=10_000)
    settings.load_profile("patient")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real annotations, videos and tokenizers that VCR1_REALDATA names; without it, a skip."""
    folder = os.environ.get("VCR1_REALDATA")
    if not folder:
        pytest.skip("VCR1_REALDATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def torchvision_path() -> Path:
    """Where tools/venv.sh puts torchvision: for the PYTHONPATH of a process that runs transformers' own processors.

    That process declares the operators that a CPU build of torch lacks before it imports transformers. It must be one
    of its own: elsewhere transformers was imported without torchvision.
    """
    folder = Path(sys.prefix) / "torchvision"
    if not folder.is_dir():
        pytest.skip("torchvision is not installed beside the environment (tools/venv.sh does it)")
    return folder


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Four processes that stay for the session. Tests that use it are marked xdist_group("gloo"), to share one pool."""
    pool = GlooPool()
    yield pool
    pool.close()
