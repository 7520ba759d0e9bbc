from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.checkpoint import fingerprint
from megatron_vcr1.checkpoint.fingerprint import weights_fingerprint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh
from tests.gloo import GlooPool
from tests.model import tiny

LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"tensor": 4, "vision": "data"},
    {"context": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 2},
)


def _load(model_dir: Path, parallel: dict[str, Any]) -> VideoLanguageModel:
    run = RunConfig.model_validate({"model": {"path": model_dir, "dtype": "float32"}, "parallel": parallel})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(model_dir), run.model, run.parallel, run.recompute)
    load_model_weights(model, model_dir)
    return model


def _fingerprints(model_dir: Path) -> list[str]:
    return [weights_fingerprint(_load(model_dir, parallel)) for parallel in LAYOUTS]


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_fingerprint_does_not_depend_on_layout_or_format(tmp_path: Path, gloo_pool: GlooPool, family: str) -> None:
    tiny.create(family, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "imported")
    found = {
        digits
        for source in ("hf", "imported")
        for rank in gloo_pool.run(_fingerprints, tmp_path / source)
        for digits in rank
    }
    assert len(found) == 1 and len(found.pop()) == 16


@pytest.mark.usefixtures("single_process")
def test_every_changed_or_moved_value_changes_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.create("qwen2_5_vl", tmp_path)
    model = _load(tmp_path, {})
    original = weights_fingerprint(model)
    seen = {original}
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            before = flat[-1].clone()
            flat[-1] = torch.nextafter(before, before + 1)  # the smallest possible change
            seen.add(weights_fingerprint(model))
            flat[-1] = before
        assert weights_fingerprint(model) == original
        rows = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
        rows[[0, 1]] = rows[[1, 0]]  # the same values in another order
        seen.add(weights_fingerprint(model))
        rows[[0, 1]] = rows[[1, 0]]
    assert len(seen) == 2 + len(list(model.parameters()))
    monkeypatch.setattr(fingerprint, "_BLOCK_VALUES", 100)
    assert weights_fingerprint(model) == original
