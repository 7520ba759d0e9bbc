"""The network preflight of the Slurm page, with gloo."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from tests.gloo import GlooPool
from tests.limits import HANG_S

pytestmark = pytest.mark.xdist_group("gloo")

SCRIPT = Path(__file__).parents[2] / "examples/slurm/preflight.py"


def _preflight() -> float:
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mesh.initialize(ParallelSection())
    module.measure(1)
    module.connect_with_gloo(timeout_s=HANG_S)
    return module.all_reduce_gb_per_s(2**20)


def test_all_reduce_is_correct_and_timed(gloo_pool: GlooPool) -> None:
    assert all(speed > 0 for speed in gloo_pool.run(_preflight))
