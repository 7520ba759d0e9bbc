"""The presets have the shapes of the published models."""

from __future__ import annotations

import math

import pytest

from megatron_vcr1.model.hf_layout import hf_shapes, model_layout
from megatron_vcr1.model.presets import PRESETS, model_config

PUBLISHED_PARAMETERS = {  # from the safetensors files of the published models
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "qwen3-vl-235b-a22b": 235_670_022_896,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    shapes = hf_shapes(model_layout(model_config(name)))
    assert sum(map(math.prod, shapes.values())) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_read(name: str) -> None:
    assert model_config(name).shape.num_layers
