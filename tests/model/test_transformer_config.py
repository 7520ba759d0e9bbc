"""FP8 in megatron-core's configuration, recomputation, and the errors for what FP8 does not support."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig, TextConfig
from megatron_vcr1.model.presets import PRESETS
from megatron_vcr1.model.transformer_config import (
    FP8_RECIPES,
    check_fp8,
    quick_gelu,
    text_transformer_config,
    vision_transformer_config,
)


def _text(preset: str) -> TextConfig:
    return ModelConfig.from_dict(PRESETS[preset]).text


@pytest.mark.parametrize("recipe, fp8_format", [("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")])
def test_fp8_is_configured_for_the_language_model(recipe: str, fp8_format: str) -> None:
    sections = (ParallelSection(), RecomputeSection())
    options = {"dtype": torch.bfloat16, "initialize_weights": False}
    config = text_transformer_config(_text("tiny"), *sections, fp8=recipe, **options)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (fp8_format, recipe, False)
    assert text_transformer_config(_text("tiny"), *sections, fp8=None, **options).fp8 is None


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if _text(preset).experts is None])
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_every_published_dense_model_supports_fp8_on_hopper_or_blackwell(preset: str, recipe: str) -> None:
    parallel = ParallelSection() if preset == "tiny" else ParallelSection(tensor=2, sequence_parallel=True)
    check_fp8(recipe, _text(preset), parallel, (10, 0) if recipe == "mxfp8" else (9, 0), "13.0")


def test_unsupported_fp8_is_an_error_with_the_reason() -> None:
    with pytest.raises(UserError, match="'tensorwise' is not supported for a model with experts; unset it"):
        check_fp8("tensorwise", _text("qwen3-vl-30b-a3b"), ParallelSection(), (9, 0), "13.0")
    with pytest.raises(UserError, match=r"'tensorwise' needs a GPU of compute capability 8\.9 or higher; .* has 8\.0"):
        check_fp8("tensorwise", _text("tiny"), ParallelSection(), (8, 0), "13.0")
    with pytest.raises(UserError, match=r"needs a torch for CUDA 12\.9 or newer, this one is for 12\.8"):
        check_fp8("blockwise", _text("tiny"), ParallelSection(), (9, 0), "12.8")
    with pytest.raises(UserError, match="needs a hidden size that is a multiple of 128, and the model's is 192"):
        narrow = dataclasses.replace(_text("tiny"), hidden_size=192)
        check_fp8("blockwise", narrow, ParallelSection(tensor=2, sequence_parallel=True), (9, 0), "13.0")
    with pytest.raises(UserError, match=r"88 FFN features per rank are not a multiple of 16; lower parallel\.tensor"):
        check_fp8("blockwise", _text("tiny"), ParallelSection(tensor=4), (9, 0), "13.0")
    with pytest.raises(UserError, match=r"176 FFN .* multiple of 32; lower parallel\.tensor"):
        check_fp8("mxfp8", _text("tiny"), ParallelSection(tensor=2), (10, 0), "13.0")


@pytest.mark.parametrize(
    "capability, advice",
    [
        ((8, 0), r"this one has 8\.0: unset it"),
        ((9, 0), r"this one has 9\.0: choose 'tensorwise' or 'blockwise', or unset it"),
        ((12, 0), r"10\.0 or higher, and lower than 12\.0; this one has 12\.0: choose 'tensorwise' or 'blockwise'"),
    ],
)
def test_mxfp8_is_refused_off_blackwell_with_the_recipes_that_work(capability: tuple[int, int], advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        check_fp8("mxfp8", _text("tiny"), ParallelSection(), capability, "13.0")


def test_layers_are_recomputed_one_by_one_in_the_vision_tower() -> None:
    config = ModelConfig.from_dict(PRESETS["tiny"])
    sections = (ParallelSection(), RecomputeSection(granularity="full", num_layers=2))
    options = {"dtype": torch.float32, "initialize_weights": False}
    text = text_transformer_config(config.text, *sections, fp8=None, **options)
    vision = vision_transformer_config(config.vision, *sections, **options)
    assert (text.recompute_granularity, text.recompute_num_layers) == ("full", 2)
    assert (vision.recompute_granularity, vision.recompute_num_layers, vision.fp8) == ("full", 1, None)


def test_quick_gelu_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x / (1 + (-1.702 * x).exp()))
