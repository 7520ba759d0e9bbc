"""Products of few rows against float64, and a step in half precision against the modules' step. In float32, and over
whole responses: tests/rollout/test_local.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model import token_step
from megatron_vcr1.model.layer_specs import LocalBackend
from megatron_vcr1.model.token_step import skinny_linear
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from tests.model import compare_specs, tiny


@pytest.mark.parametrize("num_rows", [1, 3, 8, 12, 13])
@pytest.mark.parametrize("num_features", [64, 40])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_products(num_rows: int, num_features: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((num_rows, 24), (num_features, 24)))
    product = skinny_linear(rows, weight)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), rows.double() @ weight.double().T, atol=tolerance, rtol=0)


def test_a_step_rounds_where_the_modules_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the engine's log-probs in half precision were further from training's than both are from exact ones."""
    tiny.create("qwen2_5_vl", tmp_path / "model")
    request = GenerationRequest("0", tiny.prompt("v", seed=3), 8, 0)
    with mesh.world(ParallelSection()):
        model = compare_specs.build(tmp_path / "model", LocalBackend(), torch.bfloat16)
        engine = LocalEngine(model, SpecialTokens(frozenset(), (tiny.VIDEO_PAD,)), str, max_batch_responses=8)
        assert token_step.supports(model.language_model.decoder)
        generated = engine.generate([request], SamplingParams(max_new_tokens=2))[0]
        monkeypatch.setattr(token_step, "supports", lambda decoder: False)
        by_modules = engine.generate([request], SamplingParams(max_new_tokens=2))[0]
    worst = 0.0
    for one, other in zip(generated.rollouts, by_modules.rollouts, strict=True):
        assert one.token_ids == other.token_ids
        worst = max(worst, *(abs(a - b) for a, b in zip(one.log_probs, other.log_probs, strict=True)))
    assert worst < 1e-3
