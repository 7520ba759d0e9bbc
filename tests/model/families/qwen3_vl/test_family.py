"""Qwen3-VL's positions and frequencies against transformers, and the errors for models that are not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLTextRotaryEmbedding

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.families.qwen3_vl.family import interleaved_axes
from megatron_vcr1.model.mrope import prompt_positions, rotary_angles
from tests.model import tiny


def _raw(**text: Any) -> dict[str, Any]:
    raw = tiny.hf_config("qwen3_vl").to_dict()
    raw["text_config"] |= text
    return raw


@pytest.mark.parametrize("kinds", ["", "i", "vv", "ivi"])
def test_positions_equal_transformers(kinds: str) -> None:
    config = ModelConfig.from_dict(_raw())
    prompt = tiny.prompt(kinds, seed=1, timestamps=True)
    inputs = tiny.transformers_inputs(prompt)
    types = (prompt.token_ids == tiny.IMAGE_PAD) + 2 * (prompt.token_ids == tiny.VIDEO_PAD)
    stand_in = type("Model", (), {})()  # get_rope_index uses only the model's configuration
    stand_in.config = tiny.hf_config("qwen3_vl")
    stand_in.get_vision_position_ids = Qwen3VLModel.get_vision_position_ids.__get__(stand_in)
    expected, _ = Qwen3VLModel.get_rope_index(
        stand_in,
        inputs["input_ids"],
        mm_token_type_ids=types.int()[None],
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
    )
    assert torch.equal(prompt_positions(config, prompt), expected[:, 0])


def test_a_video_without_text_between_its_frames_is_an_error() -> None:
    config = ModelConfig.from_dict(_raw())
    prompt = tiny.prompt("v", seed=1, timestamps=True)
    short = prompt.token_ids[prompt.token_ids != tiny.VIDEO_PAD]
    with pytest.raises(ValueError, match="needs 10 pad tokens in a row"):
        prompt_positions(config, type(prompt)(short, prompt.vision))


@pytest.mark.parametrize("section", [[24, 20, 20], [2, 2, 1], [11, 11, 10]])
def test_interleaved_angles_equal_transformers(section: list[int]) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section, "mrope_interleaved": True}
    text = transformers.Qwen3VLTextConfig(head_dim=2 * sum(section), rope_parameters=rope)
    positions = torch.randint(0, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    cos, sin = Qwen3VLTextRotaryEmbedding(text)(torch.zeros(1), positions[:, None])
    angles = rotary_angles(positions, interleaved_axes(tuple(section)), 5e6)
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(angles.sin(), sin[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_config": {"attention_bias": True}}, "attention_bias is True; it must be false"),
        ({"text_config": {"head_dim": 12}}, "mrope_section [2, 2, 1] must sum to half the head dimension, 6"),
        ({"text_config": {"rope_parameters": {"mrope_section": [2, 2, 1]}}}, "lacks 'rope_theta'"),
        (
            {"text_config": {"rope_parameters": {"mrope_section": [1, 3, 1], "rope_theta": 1e4}}},
            "mrope_section [1, 3, 1] gives over a third of the frequencies to height or width",
        ),
        (
            {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 1], "mrope_interleaved": False}}},
            "mrope_interleaved is False; it must be true",
        ),
        ({"text_config": {"rope_theta": 5e6}}, "rope_parameters: rope_theta is 10000, but "),
        ({"vision_config": {"num_position_embeddings": 24}}, "num_position_embeddings is 24; it must be a square"),
        ({"vision_config": {"deepstack_visual_indexes": [2, 0]}}, "must be an ascending list of layers below depth"),
        ({"vision_config": {"deepstack_visual_indexes": [0, 5]}}, "below depth, which is 5"),
        ({"vision_config": {"deepstack_visual_indexes": [0, 1, 2, 3]}}, "has 4; it must have more"),
        ({"vision_config": {"hidden_act": "silu"}}, "hidden_act is 'silu'; it must be 'gelu_pytorch_tanh'"),
    ],
)
def test_unsupported_models_are_errors_that_name_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = _raw()
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert message in str(error.value)


def test_contradicting_patch_sizes_are_refused_with_both_files(tmp_path: Path) -> None:
    raw = _raw()
    raw["vision_config"]["patch_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
    with pytest.raises(UserError) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert f"{tmp_path / 'preprocessor_config.json'}: patch_size is 14" in str(error.value)
    assert f"{tmp_path / 'config.json'}: vision_config: patch_size is 16" in str(error.value)
