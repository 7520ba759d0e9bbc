"""A microbatch split across context-parallel ranks: every token, target, feature and query-key pair is on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vcr1_kernels import SegmentLayout
from vcr1_kernels.reference import attention_mask

from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import shard_batch, zigzag_ranges
from megatron_vcr1.model.packed_batch import ContextShard, PackedBatch, pack
from tests.model import tiny

# The images (i) and videos (v) of each group's prompt, and the lengths of its responses.
CASES = {
    "group-of-8": [("v", (3, 9, 1, 4, 5, 2, 6, 7))],
    "several-videos": [("ivv", (2, 7)), ("v", (6,))],
    "text": [("", (3, 5)), ("", ())],
    "one-response-for-four-ranks": [("vv", (1,))],
}
with_cases = pytest.mark.parametrize(
    ("groups", "num_ranks"), [(groups, num_ranks) for groups in CASES.values() for num_ranks in (2, 4)]
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    tiny.hf_config("qwen2_5_vl").save_pretrained(folder)
    return ModelConfig.from_pretrained(folder)


def _pack(config: ModelConfig, groups: list[tuple[str, tuple[int, ...]]]) -> PackedBatch:
    return pack(
        [
            Group(str(index), tiny.prompt(kinds, seed=index), tiny.responses(lengths, seed=100 + index))
            for index, (kinds, lengths) in enumerate(groups)
        ],
        config,
    )


def _context(shard: PackedBatch) -> ContextShard:
    assert shard.context is not None
    return shard.context


def _shards(batch: PackedBatch, config: ModelConfig, num_ranks: int, multiple: int = 1) -> list[PackedBatch]:
    return [
        shard_batch(batch, config.vision, rank=rank, num_ranks=num_ranks, pad_to_multiple_of=multiple)
        for rank in range(num_ranks)
    ]


def _gather(shards: list[PackedBatch], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Do what the ranks do together: return each rank's keys, from the values of every rank's tokens."""
    slots = _context(shards[0]).keys.slots
    parts = []
    for shard, value in zip(shards, values, strict=True):
        part = torch.full((slots,), -1)
        part[: _context(shard).keys.num_prompt_tokens] = value[: _context(shard).keys.num_prompt_tokens]
        parts.append(part)
    contributions = torch.cat(parts)
    return [
        torch.cat((contributions[_context(shard).keys.rows], value[_context(shard).keys.own_start :]))
        for shard, value in zip(shards, values, strict=True)
    ]


@with_cases
def test_every_rank_attends_as_the_whole_does(
    config: ModelConfig, groups: list[tuple[str, tuple[int, ...]]], num_ranks: int
) -> None:
    batch = _pack(config, groups)
    mask = attention_mask(batch.layout)
    # Every token is told apart by its id, so that the tokens of queries and gathered keys can be read from values.
    num_tokens = batch.layout.num_tokens
    numbered = replace(batch, token_ids=torch.arange(num_tokens))
    shards = _shards(numbered, config, num_ranks, multiple=4)
    keys = _gather(shards, [shard.token_ids for shard in shards])
    for shard, key_tokens in zip(shards, keys, strict=True):
        assert len(shard.token_ids) % 4 == 0
        assert shard.layout.num_queries == len(shard.token_ids)
        padding = shard.layout.lengths[-1]
        num_keys, num_queries = len(key_tokens) - padding, len(shard.token_ids) - padding
        tokens = shard.token_ids[:num_queries]
        rank_mask = attention_mask(shard.layout)
        assert torch.equal(rank_mask[:num_queries, :num_keys], mask[tokens][:, key_tokens[:num_keys]])
        assert not rank_mask[:num_queries, num_keys:].any()
        # A key that is not on the rank is not visible to its queries.
        missing = torch.ones(num_tokens, dtype=torch.bool)
        missing[key_tokens[:num_keys]] = False
        assert not mask[tokens][:, missing].any()


@with_cases
def test_every_token_target_and_feature_is_on_one_rank(
    config: ModelConfig, groups: list[tuple[str, tuple[int, ...]]], num_ranks: int
) -> None:
    batch = _pack(config, groups)
    shards = _shards(batch, config, num_ranks)
    num_prompt_tokens = sum(
        length for length, prefix in zip(batch.layout.lengths, batch.layout.prefixes, strict=True) if prefix < 0
    )
    assert sum(_context(shard).keys.num_prompt_tokens for shard in shards) == num_prompt_tokens
    targets = torch.cat([_context(shard).target_indices for shard in shards])
    assert targets.sort().values.tolist() == list(range(len(batch.target_ids)))
    assert sorted(length for shard in shards for length in shard.response_lengths) == sorted(batch.response_lengths)
    for shard in shards:
        indices = _context(shard).target_indices
        assert torch.equal(batch.select_targets(batch.target_ids)[indices], shard.target_ids)
        assert torch.equal(shard.select_targets(batch.target_ids), shard.target_ids)
        assert len(shard.predicting_token_indices) == len(shard.target_ids)
        predicting = batch.predicting_token_indices[indices]
        assert torch.equal(shard.token_ids[shard.predicting_token_indices], batch.token_ids[predicting])
        assert torch.equal(shard.position_ids[:, shard.predicting_token_indices], batch.position_ids[:, predicting])
    frames = [[frame for item in part.vision for frame in item.frames] for part in (batch, *shards)]
    whole, parts = frames[0], [frame for part in frames[1:] for frame in part]
    assert len(whole) == len(parts) and all(map(torch.equal, whole, parts))


def test_zigzag_gives_every_rank_the_same_work() -> None:
    for length, num_ranks in ((0, 2), (3, 4), (97, 4), (800, 8)):
        parts = [zigzag_ranges(length, rank, num_ranks) for rank in range(num_ranks)]
        tokens = [token for ranges in parts for start, end in ranges for token in range(start, end)]
        assert sorted(tokens) == list(range(length))
        sizes = [sum(end - start for start, end in ranges) for ranges in parts]
        assert max(sizes) == -(-length // num_ranks)
        pairs = [sum(token + 1 for start, end in ranges for token in range(start, end)) for ranges in parts]
        if length == 800:
            assert max(pairs) == min(pairs) and set(sizes) == {100}


def test_a_rank_without_tokens_gets_padding(config: ModelConfig) -> None:
    batch = _pack(config, [("", ())])
    short = SegmentLayout((1,), (-1,))
    batch = replace(batch, layout=short, token_ids=torch.tensor([5]), position_ids=torch.zeros(3, 1).long())
    assert [len(shard.token_ids) for shard in _shards(batch, config, 2)] == [1, 1]
