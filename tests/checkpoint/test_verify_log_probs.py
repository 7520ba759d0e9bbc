from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.verify_log_probs import log_prob_differences
from tests.model import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_imported_model_has_the_log_probs_of_transformers(tmp_path: Path, family: str) -> None:
    tiny.create(family, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "imported")
    differences = log_prob_differences(tmp_path / "hf", tmp_path / "imported")
    assert differences.shape == (32,)
    assert differences.abs().max() < 2e-5

    weights = load_file(tmp_path / "hf/model.safetensors")
    name = next(name for name in weights if "layers.3.mlp" in name and "up_proj" in name)
    save_file({**weights, name: weights[name] * 1.01}, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    assert log_prob_differences(tmp_path / "hf", tmp_path / "imported").abs().max() > 1e-4
    assert torch.isfinite(differences).all()
