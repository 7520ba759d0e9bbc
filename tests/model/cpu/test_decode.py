"""The decode step in half precision against the modules.

tests/rollout/local/test_engine.py compares them in float32 and over whole responses.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model.cpu import decode
from megatron_vcr1.model.layer_specs import LocalBackend
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from tests.model import compare_specs, tiny


def test_rounds_where_the_modules_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare half-precision log-probs of the two decode paths.

    With other rounding, the engine's log-probs would differ more from training's than either differs from exact ones.
    """
    tiny.create("qwen2_5_vl", tmp_path / "model")
    request = GenerationRequest("0", tiny.prompt("v", seed=3), 8, 0)
    with mesh.world(ParallelSection()):
        model = compare_specs.build(tmp_path / "model", LocalBackend(), torch.bfloat16)
        engine = LocalEngine(model, SpecialTokens(frozenset(), (tiny.VIDEO_PAD,)), str, max_batch_responses=8)
        assert decode.supports(model.language_model.decoder)
        generated = engine.generate([request], SamplingParams(max_new_tokens=2))[0]
        monkeypatch.setattr(decode, "supports", lambda decoder: False)
        by_modules = engine.generate([request], SamplingParams(max_new_tokens=2))[0]
    worst = 0.0
    for ours, expected in zip(generated.rollouts, by_modules.rollouts, strict=True):
        assert ours.token_ids == expected.token_ids
        worst = max(worst, *(abs(a - b) for a, b in zip(ours.log_probs, expected.log_probs, strict=True)))
    assert worst < 1e-3
