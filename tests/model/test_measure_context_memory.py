"""The measurement that docs/evidence.md quotes still runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from tests.gloo import GlooPool
from tests.model.measure_context_memory import create_model, measure

pytestmark = pytest.mark.xdist_group("gloo")


def _measure(folder: Path) -> int:
    mesh.initialize(ParallelSection(context=4))
    return measure(4, folder, 64)


def test_the_measurement_runs_on_every_rank(tmp_path: Path, gloo_pool: GlooPool) -> None:
    create_model(tmp_path)
    assert len(gloo_pool.run(_measure, tmp_path)) == 4
