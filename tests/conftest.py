"""Setup that all tests share: no network, one thread per process, the CPU backend, and the optional real data."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gloo import GlooPool

# These take effect only before torch and huggingface_hub are imported, by the tests or by processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("http_proxy", "https_proxy", "all_proxy"):  # the tests' own servers are on this host
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):  # printed text is compared
    os.environ.pop(name, None)
os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # set in NVIDIA's containers; the tests need full float32
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run in the interpreter; triton reads this once

if find_spec("hypothesis") is not None:  # missing on a machine that runs tests/kernels only
    from hypothesis import settings

    # The same examples in every run; and a test may be slow on a busy machine.
    settings.register_profile("patient", deadline=None, derandomize=True)
    # pytest --hypothesis-profile=thorough tests/rewards tests/evaluation/test_metrics.py
    settings.register_profile("thorough", deadline=None, derandomize=False, max_examples=10_000)
    settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Prepare torch and megatron-core, as every program does at start-up, if a collected module imports megatron-core.

    Tests of kernels, rewards or settings alone are spared the import, which takes seconds.
    """
    if "megatron.core" in sys.modules:
        from megatron_vcr1.data import signals
        from megatron_vcr1.model import cpu

        cpu.install()
        # One fork server per process serves decoding workers, ranks and commands alike.
        signals.PRELOADED = ["tests.preloaded"]


def pytest_runtest_logfinish() -> None:
    """Free the process groups of models that reference cycles keep alive, when their threads have become many."""
    if len(os.listdir("/proc/self/task")) > 100:
        gc.collect()


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Return the folder of real annotations, videos and tokenizers that VCR1_REALDATA names; skip without it."""
    folder = os.environ.get("VCR1_REALDATA")
    if not folder:
        pytest.skip("VCR1_REALDATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def torchvision_path() -> Path:
    """Return the folder where tools/venv.sh puts torchvision, for the PYTHONPATH of a subprocess.

    The subprocess runs transformers' own processors. It must declare the operators that a CPU build of torch lacks
    before it imports transformers, and this process has imported transformers without torchvision.
    """
    folder = Path(sys.prefix) / "torchvision"
    if not folder.is_dir():
        pytest.skip("torchvision is not installed beside the environment (tools/venv.sh installs it)")
    return folder


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Four processes that live as long as the session. Mark tests that use it xdist_group("gloo"): one worker, one
    pool.
    """
    pool = GlooPool()
    yield pool
    pool.close()
