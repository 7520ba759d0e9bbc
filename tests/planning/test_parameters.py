"""The planner's parameter counts equal those of the models that megatron-core builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.presets import PRESETS, model_config
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.planning.job import Layout
from megatron_vcr1.planning.parameters import num_parameters, stage_parameters
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

NUM_PARAMETERS_7B = 8_292_166_656  # published
PADDING_7B = 32 * 164 * (3 * 1280 + 2)  # zero parameters in the vision tower's MLPs


def _layouts() -> list[Layout]:
    return [
        Layout(tensor=2, replicas=2, sequence_parallel=True),
        Layout(pipeline=4),
        Layout(tensor=2, pipeline=2, first_stage_layers=1, sequence_parallel=True),
        Layout(tensor=4, vision="data"),
    ]


def _built_parameters(folder: Path, layout: Layout) -> tuple[int, int]:
    """Return the pipeline stage and the number of parameters of this rank's model."""
    run = RunConfig.model_validate({"model": {"path": folder, "dtype": "float32"}, "parallel": layout.parallel})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(folder), run.model, run.parallel, run.recompute)
    from megatron.core import parallel_state

    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return parallel_state.get_pipeline_model_parallel_rank(), num_parameters


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layout", _layouts(), ids=str)
def test_parameters_of_each_rank_equal_megatrons(
    family: str, layout: Layout, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    tiny.hf_config(family).save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    expected = stage_parameters(config, layout)
    for stage, built in gloo_pool.run(_built_parameters, tmp_path, layout):
        assert expected[stage].total == built


def test_parameters_of_the_7b_model_equal_megatrons(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["qwen2.5-vl-7b"]))
    run = RunConfig.model_validate({"model": {"path": tmp_path}})
    with mesh.world(run.parallel), torch.device("meta"):
        model = build_model(ModelConfig.from_pretrained(tmp_path), run.model, run.parallel, run.recompute)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS_7B + PADDING_7B
    config = model_config("qwen2.5-vl-7b")
    assert num_parameters(config) == NUM_PARAMETERS_7B
    assert stage_parameters(config, Layout())[0].total == NUM_PARAMETERS_7B + PADDING_7B
