"""Reading of the keys that describe the experts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from tests.model import tiny


def _config(**text: Any) -> ModelConfig:
    raw = tiny.hf_config("qwen3_vl_moe").to_dict()
    return ModelConfig.from_dict(raw | {"text_config": raw["text_config"] | text})


@pytest.mark.parametrize(
    "text, layers", [({}, {0, 2, 3}), ({"mlp_only_layers": None}, {0, 1, 2, 3}), ({"decoder_sparse_step": 2}, {3})]
)
def test_layers_with_experts(text: dict[str, Any], layers: set[int]) -> None:
    config = _config(**text).text
    assert {layer for layer in range(4) if config.layer_experts(layer) is not None} == layers


def test_published_files_have_another_key_than_those_of_transformers_5() -> None:
    assert _config(num_local_experts=None, num_experts=6).shape.num_experts == 6


@pytest.mark.parametrize(
    "text, message",
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False; it must be true"),
        ({"num_experts": 8}, "num_experts is 8, but num_local_experts is 4; remove one"),
        ({"num_local_experts": None}, "lacks 'num_experts'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it must be an integer from 1 to 4"),
        ({"moe_intermediate_size": 48}, "moe_intermediate_size is 48; it must not be hidden_size or half of it"),
        ({"moe_intermediate_size": 36}, "moe_intermediate_size is 36; it must be a multiple of 8"),
        ({"decoder_sparse_step": 5}, "no layer has experts: decoder_sparse_step is 5, mlp_only_layers is [1] and"),
    ],
)
def test_unsupported_values_are_errors_that_name_the_key(text: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        _config(**text)
    assert message in str(error.value)
