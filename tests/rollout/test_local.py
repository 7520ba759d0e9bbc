"""The in-process engine against transformers, against scoring, and against itself at other layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.qwen_vl import QwenVLModel, build_model
from megatron_vcr1.parallel import groups
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import FinishReason, RolloutGroup
from tests.data.tiny_processor import tiny_processor
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

PADS = (tiny.IMAGE_PAD, tiny.VIDEO_PAD, tiny.VISION_START, tiny.VISION_END)
TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "tp4-more-ranks-than-kv-heads": {"tensor": 4, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp4": {"pipeline": 4},
    "tp2-pp2-sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
}


def _requests() -> list[GenerationRequest]:
    kinds = ("", "i", "v", "ivv")
    return [GenerationRequest(kind, tiny.prompt(kind, seed=3 + i), 1 + i, seed=i) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.create(request.param, folder)
    return folder


def _engine(
    model_dir: Path, parallel: dict[str, Any] | None = None, *, end: tuple[int, ...] = (), batch_responses: int = 256
) -> tuple[LocalEngine, QwenVLModel]:
    run = RunConfig.model_validate({"model": {"path": model_dir, "dtype": "float32"}, "parallel": parallel or {}})
    groups.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(model_dir), run)
    load_model_weights(model, model_dir)
    tokens = SpecialTokens(frozenset(end), PADS)
    return LocalEngine(
        model, tokens, partial(tiny_processor().decode, skip_special_tokens=False), batch_responses=batch_responses
    ), model


def _greedy_by_transformers(family: str, folder: Path, request: GenerationRequest, num_tokens: int) -> list[int]:
    """The most probable token that is no vision token, one by one, each from a pass over everything before it."""
    model = tiny.create(family, folder)
    config = ModelConfig.from_pretrained(folder)
    token_ids: list[int] = []
    for _ in range(num_tokens):
        response = torch.tensor([*token_ids, 0])
        with torch.no_grad():
            logits = tiny.transformers_logits(model, config, request.prompt, response)[-1]
        logits[list(PADS)] = -torch.inf
        token_ids.append(int(logits.argmax()))
    return token_ids


def _log_probs_by_scoring(
    model: QwenVLModel, request: GenerationRequest, group: RolloutGroup, temperature: float
) -> Tensor:
    responses = tuple(torch.tensor(one.token_ids) for one in group.rollouts)
    batch = pack([Group(request.id, request.prompt, responses)], model.model_config)
    with torch.no_grad():
        return model.log_probs(model(batch), batch.target_ids, temperature=temperature)


@pytest.fixture
def one_process() -> Any:
    yield
    groups.shutdown()


def test_greedy_equals_transformers(model_dir: Path, tmp_path: Path, one_process: None) -> None:
    engine, model = _engine(model_dir)
    family = model.model_config.family
    generated = engine.generate(_requests(), SamplingParams(max_new_tokens=9, temperature=0))
    for request, group in zip(_requests(), generated, strict=True):
        expected = _greedy_by_transformers(family, tmp_path, request, 9)
        assert [list(one.token_ids) for one in group.rollouts] == [expected] * request.num_responses
        assert {one.finish_reason for one in group.rollouts} == {FinishReason.LENGTH}


def test_log_probs_equal_scoring(model_dir: Path, one_process: None) -> None:
    engine, model = _engine(model_dir, end=(5, 6, 7, 8, 9, 10, 11, 12))
    model.train()
    generated = engine.generate(_requests(), SamplingParams(max_new_tokens=70, temperature=0.7))
    assert model.training
    for request, group in zip(_requests(), generated, strict=True):
        scored = _log_probs_by_scoring(model, request, group, 0.7)
        sampled = torch.tensor([one for rollout in group.rollouts for one in rollout.log_probs])
        torch.testing.assert_close(sampled, scored, atol=TOLERANCE, rtol=0)


def _sampled(
    model_dir: Path, parallel: dict[str, Any], temperature: float, **settings: Any
) -> tuple[list[RolloutGroup], int]:
    engine, _ = _engine(model_dir, parallel, end=(5, 6, 7, 8, 9, 10), **settings)
    params = SamplingParams(max_new_tokens=30, temperature=temperature, top_p=0.9, top_k=150)
    return engine.generate(_requests(), params), groups.copy_index()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_samples_the_same(model_dir: Path, gloo_pool: GlooPool, layout: str) -> None:
    """On every rank, token for token."""
    expected, _ = gloo_pool.run(_sampled, model_dir, {}, 1.0)[0]
    for generated, _ in gloo_pool.run(_sampled, model_dir, LAYOUTS[layout], 1.0):
        for one, two in zip(generated, expected, strict=True):
            assert [r.token_ids for r in one.rollouts] == [r.token_ids for r in two.rollouts]
            for mine, theirs in zip(one.rollouts, two.rollouts, strict=True):
                assert mine.log_probs == pytest.approx(theirs.log_probs, abs=TOLERANCE)
                assert mine.finish_reason == theirs.finish_reason
