"""Compares the in-process engine with transformers' generate, with a forward pass over its responses, and with itself
at other parallel layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.cpu import decode
from megatron_vcr1.model.kv_cache import PrefillAttention
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local import prefill as local_prefill
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.local.stages import forward_through_stages
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import FinishReason, RolloutGroup
from tests.data.tiny_processor import tiny_processor
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

PADS = (tiny.IMAGE_PAD, tiny.VIDEO_PAD, tiny.VISION_START, tiny.VISION_END)
END = tuple(range(5, 25))
TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2-sp-vision-data": {"tensor": 2, "sequence_parallel": True, "vision": "data"},
    "tp4-sp-more-ranks-than-kv-heads": {"tensor": 4, "sequence_parallel": True},
    "pp2-uneven": {"pipeline": 2, "first_stage_layers": 1},
    "pp4": {"pipeline": 4},
    "tp2-pp2-sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "cp2-tp2-sp": {"context": 2, "tensor": 2, "sequence_parallel": True},
    "cp2-pp2": {"context": 2, "pipeline": 2},
    "cp4": {"context": 4},
}
SAMPLING = SamplingParams(max_new_tokens=30, temperature=1.0, top_p=0.9, top_k=150)


ONE_FAMILY = pytest.mark.parametrize("model_dir", ["qwen2_5_vl"], indirect=True)
"""For tests of what does not depend on the model."""


def _requests(model_dir: Path) -> list[GenerationRequest]:
    """Requests with text, an image, a video, two of them, and all; 1 to 5 responses."""
    timestamps = ModelConfig.from_pretrained(model_dir).media.timestamps_as_text
    return [
        GenerationRequest(kind, tiny.prompt(kind, seed=3 + i, timestamps=timestamps), 1 + i, seed=i)
        for i, kind in enumerate(("", "i", "v", "ivv", "vi"))
    ]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.create(request.param, folder)
    return folder


@pytest.fixture
def one_process() -> Iterator[None]:
    yield
    mesh.shutdown()


def _engine(
    model_dir: Path,
    parallel: dict[str, Any] | None = None,
    *,
    end: tuple[int, ...] = (),
    max_batch_responses: int = 256,
) -> tuple[LocalEngine, VideoLanguageModel]:
    run = RunConfig.model_validate({"model": {"path": model_dir, "dtype": "float32"}, "parallel": parallel or {}})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(model_dir), run.model, run.parallel, run.recompute)
    load_model_weights(model, model_dir)
    decode = partial(tiny_processor().decode, skip_special_tokens=False)
    engine = LocalEngine(model, SpecialTokens(frozenset(end), PADS), decode, max_batch_responses=max_batch_responses)
    return engine, model


def _tokens(generated: list[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in group.rollouts] for group in generated]


def _transformers_greedy(
    model: Any, config: ModelConfig, request: GenerationRequest, params: SamplingParams
) -> list[int]:
    """Run transformers' `generate` with the positions of the published models (its own differ for videos)."""
    num_prompt_tokens = len(request.prompt.token_ids)
    one_token = (torch.zeros(1, dtype=torch.long),)
    positions = pack([Group(request.id, request.prompt, one_token)], config).position_ids
    answer = model.generate(
        **tiny.transformers_inputs(request.prompt),
        position_ids=torch.cat((torch.arange(num_prompt_tokens)[None], positions))[:, None],
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        repetition_penalty=params.repetition_penalty,
        eos_token_id=list(END),
        pad_token_id=0,
        suppress_tokens=list(PADS),
    )
    return answer[0, num_prompt_tokens:].tolist()


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_greedy_responses_equal_transformers_generate(
    model_dir: Path, tmp_path: Path, one_process: None, repetition_penalty: float
) -> None:
    engine, model = _engine(model_dir, end=END)
    config = model.model_config
    theirs = tiny.create(config.family.model_type, tmp_path)
    params = SamplingParams(max_new_tokens=12, temperature=0, repetition_penalty=repetition_penalty)
    generated = engine.generate(_requests(model_dir), params)
    for request, group in zip(_requests(model_dir), generated, strict=True):
        expected = _transformers_greedy(theirs, config, request, params)
        assert [list(rollout.token_ids) for rollout in group.rollouts] == [expected] * request.num_responses
        reason = FinishReason.STOP if expected[-1] in END else FinishReason.LENGTH
        assert {rollout.finish_reason for rollout in group.rollouts} == {reason}


def _scored(model: VideoLanguageModel, request: GenerationRequest, group: RolloutGroup, temperature: float) -> Tensor:
    responses = tuple(torch.tensor(rollout.token_ids) for rollout in group.rollouts)
    batch = pack([Group(request.id, request.prompt, responses)], model.model_config)
    with torch.no_grad():
        return model.log_probs(model(batch), batch.target_ids, temperature=temperature)


@pytest.mark.parametrize("end", [END, ()])
def test_log_probs_equal_those_of_a_forward_pass(model_dir: Path, one_process: None, end: tuple[int, ...]) -> None:
    """Checks responses that are removed from the batch early, and full-length responses, for which the cache grows."""
    engine, model = _engine(model_dir, end=end)
    generated = engine.generate(_requests(model_dir), SamplingParams(max_new_tokens=70, temperature=0.7))
    lengths = {len(rollout.token_ids) for group in generated for rollout in group.rollouts}
    assert len(lengths) > 5 if end else lengths == {70}
    for request, group in zip(_requests(model_dir), generated, strict=True):
        sampled = torch.tensor([log_prob for rollout in group.rollouts for log_prob in rollout.log_probs])
        torch.testing.assert_close(sampled, _scored(model, request, group, 0.7), atol=TOLERANCE, rtol=0)


def test_the_fast_token_step_equals_the_modules(
    model_dir: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = _engine(model_dir, end=END)
    assert decode.supports(model.language_model.decoder)
    generated = engine.generate(_requests(model_dir), SAMPLING)
    monkeypatch.setattr(decode, "supports", lambda decoder: False)
    from_modules = engine.generate(_requests(model_dir), SAMPLING)
    assert _tokens(generated) == _tokens(from_modules)
    for group, other in zip(generated, from_modules, strict=True):
        for rollout, same in zip(group.rollouts, other.rollouts, strict=True):
            assert rollout.log_probs == pytest.approx(same.log_probs, abs=TOLERANCE)


def _sample(model_dir: Path, parallel: dict[str, Any]) -> list[RolloutGroup]:
    engine, model = _engine(model_dir, parallel, end=END)
    generated = engine.generate(_requests(model_dir), SAMPLING)
    assert model.config.sequence_parallel == parallel.get("sequence_parallel", False)
    assert model.training and model.language_model.decoder.input_tensor is None
    return generated


@pytest.fixture(scope="module")
def sampled(model_dir: Path, gloo_pool: GlooPool) -> list[RolloutGroup]:
    return gloo_pool.run(_sample, model_dir, {})[0]


def _assert_same(generated: list[RolloutGroup], sampled: list[RolloutGroup]) -> None:
    assert _tokens(generated) == _tokens(sampled)
    for group, expected in zip(generated, sampled, strict=True):
        for rollout, other in zip(group.rollouts, expected.rollouts, strict=True):
            assert rollout.log_probs == pytest.approx(other.log_probs, abs=TOLERANCE)
            assert rollout.finish_reason == other.finish_reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_samples_the_same_tokens(
    model_dir: Path, sampled: list[RolloutGroup], gloo_pool: GlooPool, layout: str
) -> None:
    """Compares token by token, on every rank."""
    for generated in gloo_pool.run(_sample, model_dir, LAYOUTS[layout]):
        _assert_same(generated, sampled)


@ONE_FAMILY
def test_responses_do_not_depend_on_other_requests(
    model_dir: Path, sampled: list[RolloutGroup], one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares requests one by one with all at once, with waves that split groups, and with single-prompt prefills."""
    engine, _ = _engine(model_dir, end=END)
    alone = [engine.generate([request], SAMPLING)[0] for request in _requests(model_dir)]
    assert _tokens(alone) == _tokens(sampled)
    narrow, _ = _engine(model_dir, end=END, max_batch_responses=3)
    monkeypatch.setattr(local_prefill, "PREFILL_TOKENS", 20)
    divided = narrow.generate(_requests(model_dir), SAMPLING)
    assert _tokens(divided) == _tokens(sampled)
    num_prompt_tokens = len(_requests(model_dir)[3].prompt.token_ids)
    assert sampled[3].cached_tokens == (0, *[num_prompt_tokens] * 3)
    assert divided[3].cached_tokens == (0, num_prompt_tokens, num_prompt_tokens, 0)
    again = [replace(request, seed=request.seed + 1) for request in _requests(model_dir)]
    assert all(
        tokens != other for tokens, other in zip(_tokens(engine.generate(again, SAMPLING)), _tokens(alone), strict=True)
    )


@ONE_FAMILY
def test_max_new_tokens_stop_strings_and_banned_tokens(model_dir: Path, one_process: None) -> None:
    engine, _ = _engine(model_dir)
    request = GenerationRequest("many", tiny.prompt("i", seed=0), 32, seed=5)
    flat = SamplingParams(max_new_tokens=40, temperature=1000.0)  # all tokens are about equally likely
    (group,) = engine.generate([request], flat)
    token_ids = [token for rollout in group.rollouts for token in rollout.token_ids]
    assert len(token_ids) == 32 * 40 and not set(token_ids) & set(PADS)
    assert len(set(token_ids)) == tiny.VOCAB_SIZE - len(PADS)
    assert {rollout.finish_reason for rollout in group.rollouts} == {FinishReason.LENGTH}

    processor = tiny_processor()
    stop = processor.decode(group.rollouts[0].token_ids[3:5], skip_special_tokens=False)
    (stopped,) = engine.generate([request], replace(flat, stop=(stop,)))
    for rollout, whole in zip(stopped.rollouts, group.rollouts, strict=True):
        assert rollout.token_ids == whole.token_ids[: len(rollout.token_ids)]
        if rollout.finish_reason == FinishReason.STOP:
            assert processor.decode(rollout.token_ids, skip_special_tokens=False).endswith(stop)
    assert len(stopped.rollouts[0].token_ids) <= 5

    received: list[tuple[int, int, int]] = []
    one_token = replace(flat, max_new_tokens=1)
    (short,) = engine.generate([request], one_token, on_token=lambda *token: received.append(token))
    assert received == [(0, index, group.rollouts[index].token_ids[0]) for index in range(32)]
    assert [rollout.token_ids for rollout in short.rollouts] == [rollout.token_ids[:1] for rollout in group.rollouts]


@ONE_FAMILY
def test_build_engine_shares_the_trained_weights(model_dir: Path, one_process: None) -> None:
    run = RunConfig.model_validate({"model": {"path": model_dir, "dtype": "float32"}})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(model_dir), run.model, run.parallel, run.recompute)
    load_model_weights(model, model_dir)
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    processor = tiny_processor()
    engine = build_engine(run, model, processor, SpecialTokens.from_pretrained(model_dir, processor, tiny.VOCAB_SIZE))
    request = GenerationRequest("one", tiny.prompt("", seed=0), 1)
    greedy = SamplingParams(max_new_tokens=8, temperature=0)
    (before,) = engine.generate([request], greedy)
    assert engine.policy_version == before.rollouts[0].policy_version == 0
    with torch.no_grad():
        model.head_weight().neg_()
    engine.update_weights((pytest.fail("iterated the weights") for _ in range(1)), version=3)
    (after,) = engine.generate([request], greedy)
    assert engine.policy_version == after.rollouts[0].policy_version == 3
    assert before.rollouts[0].token_ids != after.rollouts[0].token_ids
    engine.close()


@ONE_FAMILY
def test_an_invalid_prompt_is_named(model_dir: Path, one_process: None) -> None:
    engine, model = _engine(model_dir)
    bad = GenerationRequest("bad", replace(tiny.prompt("i", seed=0), vision=()), 2)
    with pytest.raises(ValueError, match="sample bad: "):
        engine.generate([bad], SAMPLING)
    assert model.training


def _sample_in_small_waves(model_dir: Path) -> tuple[list[RolloutGroup], list[tuple[int, bool]]]:
    """Sample with context parallelism in waves of at most two responses: the ranks have different numbers of waves.

    Returns:
        The responses; and for each prefill pass of this rank the number of its tokens, and whether it stores the keys.
    """
    engine, _ = _engine(model_dir, {"context": 2}, end=END, max_batch_responses=2)
    passes: list[tuple[int, bool]] = []

    def forward(model: VideoLanguageModel, batch: PackedBatch, attention: PrefillAttention) -> Tensor | None:
        passes.append((len(batch.token_ids), attention._cache is not None))
        return forward_through_stages(model, batch, attention)

    with (
        mock.patch.object(local_prefill, "forward_through_stages", forward),
        mock.patch.object(local_prefill, "PREFILL_TOKENS", 1),
    ):
        return engine.generate(_requests(model_dir), SAMPLING), passes


@ONE_FAMILY
def test_context_parallel_ranks_split_each_prompt_and_one_of_them_decodes(
    model_dir: Path, sampled: list[RolloutGroup], gloo_pool: GlooPool
) -> None:
    answers = gloo_pool.run(_sample_in_small_waves, model_dir)[:2]
    for generated, _ in answers:
        _assert_same(generated, sampled)
    # Groups of 3, 4 and 5 responses are split into waves of 2, which prefill the prompt once more.
    lengths = [
        len(request.prompt.token_ids) for request in _requests(model_dir) for _ in range(0, request.num_responses, 2)
    ]
    owners = []
    split = []
    for (tokens, stores), (other_tokens, other_stores) in zip(answers[0][1], answers[1][1], strict=True):
        assert stores != other_stores
        owners.append(stores)
        assert abs(tokens - other_tokens) <= 2  # a rank without the prompt's last token computes it once more
        split.append(tokens + other_tokens)
    assert len(split) == len(lengths) and 0 < sum(owners) < len(owners)
    for length, total in zip(sorted(lengths), sorted(split), strict=True):
        assert length <= total <= length + 1
