from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.verify import compare_weights
from megatron_vcr1.errors import UserError
from tests.checkpoint.hf_dirs import random_weights, small_config, write_hf_dir

HF_NAME = "model.layers.0.mlp.down_proj.weight"


def test_an_imported_model_is_identical(hf_dir: Path, imported_dir: Path) -> None:
    comparison = compare_weights(hf_dir, imported_dir)
    assert comparison.num_identical == comparison.num_tensors == len(random_weights(small_config()))
    assert set(comparison.max_abs_differences.values()) == {0.0}


def test_differing_tensors_are_named_and_equal_nan_are_not(tmp_path: Path) -> None:
    config = small_config()
    weights = random_weights(config)
    weights["model.norm.weight"][3] = torch.nan
    import_checkpoint(write_hf_dir(tmp_path / "a", config, weights), tmp_path / "imported")
    weights[HF_NAME][95, 127] += 4
    weights["visual.merger.ln_q.weight"][0] = torch.inf
    write_hf_dir(tmp_path / "b", config, weights)
    comparison = compare_weights(tmp_path / "b", tmp_path / "imported")
    differing = {name: value for name, value in comparison.max_abs_differences.items() if value}
    assert differing == {HF_NAME: pytest.approx(4, abs=0.02), "visual.merger.ln_q.weight": float("inf")}
    assert comparison.num_identical == comparison.num_tensors - 2


def test_models_of_different_families_or_shapes_are_refused(imported_dir: Path, tmp_path: Path) -> None:
    other = small_config("qwen2_vl")
    write_hf_dir(tmp_path / "family", other, random_weights(other))
    with pytest.raises(UserError, match=r"family is a Qwen2-VL model, but .*imported is a Qwen2\.5-VL model"):
        compare_weights(tmp_path / "family", imported_dir)
    smaller = small_config()
    smaller["num_hidden_layers"] = 1
    write_hf_dir(tmp_path / "size", smaller, random_weights(smaller))
    with pytest.raises(UserError, match=r"different shapes: ModelShape\(num_layers=1, .*ModelShape\(num_layers=2"):
        compare_weights(tmp_path / "size", imported_dir)
