"""Tests of end tokens, of tokens that are never sampled, and of the repetition penalty."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.special_tokens import SpecialTokens, read_repetition_penalty
from tests.data.tiny_processor import tiny_processor

NUM_EMBEDDINGS = 103  # of tiny_processor's tokenizer


@pytest.mark.parametrize("value, expected", [(7, {7}), ([7, 9], {7, 9})])
def test_end_tokens_come_from_the_generation_config(tmp_path: Path, value: object, expected: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value, "top_k": 1}))
    assert SpecialTokens.from_pretrained(tmp_path, tiny_processor(), NUM_EMBEDDINGS).end == expected


@pytest.mark.parametrize("content", [None, "{}", '{"eos_token_id": null}', '{"eos_token_id": []}'])
def test_end_tokens_default_to_those_of_the_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    processor = tiny_processor()
    with pytest.raises(UserError, match=r"neither generation_config\.json nor the tokenizer names an end token"):
        SpecialTokens.from_pretrained(tmp_path, processor, NUM_EMBEDDINGS)
    processor.tokenizer.eos_token = "<|im_end|>"
    end = SpecialTokens.from_pretrained(tmp_path, processor, NUM_EMBEDDINGS).end
    assert end == {processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_an_invalid_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        SpecialTokens.from_pretrained(tmp_path, tiny_processor(), NUM_EMBEDDINGS)


def test_the_repetition_penalty_comes_from_the_generation_config(tmp_path: Path) -> None:
    assert read_repetition_penalty(tmp_path) == 1
    config = tmp_path / "generation_config.json"
    for content, expected in (('{"repetition_penalty": 1.05}', 1.05), ('{"repetition_penalty": null}', 1), ("{}", 1)):
        config.write_text(content)
        assert read_repetition_penalty(tmp_path) == expected
    for content in ("[]", '{"repetition_penalty": 0}', '{"repetition_penalty": "1"}', '{"repetition_penalty": true}'):
        config.write_text(content)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            read_repetition_penalty(tmp_path)


def test_vision_tokens_are_never_sampled(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    processor = tiny_processor()
    vocabulary = processor.tokenizer.get_vocab()
    never = SpecialTokens.from_pretrained(tmp_path, processor, NUM_EMBEDDINGS).never_sampled
    assert set(never) == {vocabulary[token] for token in processor.vision_tokens}
    other = replace(processor, image_token_id=50, video_token_id=51)
    assert {50, 51} < set(SpecialTokens.from_pretrained(tmp_path, other, NUM_EMBEDDINGS).never_sampled)
