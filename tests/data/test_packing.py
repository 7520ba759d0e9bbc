from __future__ import annotations

import random

import pytest
import torch

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.packing import Group, pack_groups


def group(name: object, num_prompt_tokens: int, *response_lengths: int) -> Group:
    responses = tuple(torch.zeros(length, dtype=torch.int64) for length in response_lengths)
    return Group(str(name), EncodedPrompt(torch.zeros(num_prompt_tokens, dtype=torch.int64), ()), responses)


def names(microbatches: list[tuple[Group, ...]]) -> list[list[str]]:
    return [[member.id for member in microbatch] for microbatch in microbatches]


def test_the_prompt_counts_once_for_all_responses() -> None:
    assert group("a", 100, 5, 7, 0, 8).num_tokens == 120


def test_groups_are_packed_by_best_fit() -> None:
    # 9; 7 and 3; 6 and 4: three microbatches of 10 tokens. Packing the groups in their order needs four.
    groups = [group("a", 4, 0), group("b", 7, 0), group("c", 5, 1), group("d", 2, 1), group("e", 9, 0)]
    assert names(pack_groups(groups, 10)) == [["a", "c"], ["b", "d"], ["e"]]


def test_a_group_may_fill_the_budget_exactly_and_an_empty_list_has_no_microbatches() -> None:
    assert names(pack_groups([group("a", 8, 1, 1)], 10)) == [["a"]]
    assert pack_groups([], 10) == []


def test_equal_groups_keep_their_order() -> None:
    assert names(pack_groups([group(i, 3, 2) for i in range(5)], 10)) == [["0", "1"], ["2", "3"], ["4"]]


def test_a_group_over_the_budget_gets_a_microbatch_of_its_own() -> None:
    """The others stay within the budget: a pipeline has several microbatches in memory."""
    groups = [group("a", 4, 1), group("long", 28, 1, 2), group("b", 4, 1), group("c", 6, 2), group("longer", 40, 0)]
    assert names(pack_groups(groups, 10)) == [["a", "b"], ["long"], ["c"], ["longer"]]


@pytest.mark.parametrize("seed", range(20))
def test_random_groups_are_packed_once_within_budget_and_no_two_microbatches_could_be_merged(seed: int) -> None:
    rng = random.Random(seed)
    groups = [group(i, rng.randint(1, 60), *(rng.randint(0, 5) for _ in range(8))) for i in range(rng.randint(1, 80))]
    microbatches = pack_groups(groups, 100)
    packed = [name for microbatch in names(microbatches) for name in microbatch]
    assert sorted(packed, key=int) == [member.id for member in groups]
    sizes = [sum(member.num_tokens for member in microbatch) for microbatch in microbatches]
    assert max(sizes) <= 100
    assert len(sizes) < 2 or sum(sorted(sizes)[:2]) > 100  # no two microbatches fit into one
    assert names(pack_groups(groups, 100)) == names(microbatches)
