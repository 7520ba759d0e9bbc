from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze": "vision_tower,merger,language_model"}, "nothing would be trained; leave one out"),
        ({"fp8": "tensorwise", "layer_spec": "local"}, "fp8 needs TransformerEngine, but layer_spec is 'local'"),
        ({"fp8": "blockwise", "dtype": "float32"}, "fp8 needs dtype = 'bfloat16', not 'float32'; unset fp8"),
    ],
)
def test_contradictory_model_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ModelSection.model_validate({"path": "model", **settings})


def test_fp8_runs_with_the_default_dtype_and_layers():
    assert ModelSection(path="model", fp8="blockwise").dtype == "bfloat16"


def test_sequence_parallelism_needs_tensor_parallelism():
    with pytest.raises(ValidationError, match="sequence_parallel needs tensor > 1; raise tensor"):
        ParallelSection(sequence_parallel=True)
    assert ParallelSection(sequence_parallel=True, tensor=2).sequence_parallel


def test_selective_recompute_needs_a_module():
    with pytest.raises(ValidationError):
        RecomputeSection.model_validate({"granularity": "selective", "modules": ""})
