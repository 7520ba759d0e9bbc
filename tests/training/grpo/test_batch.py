from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rewards import RewardBreakdown
from megatron_vcr1.training.grpo.batch import (
    Counts,
    LossNormalization,
    make_policy_batches,
    split_into_minibatches,
    token_weights,
)
from megatron_vcr1.training.grpo.scoring import ScoredGroup
from megatron_vcr1.training.prompts import DrawnPrompt
from megatron_vcr1.types import FinishReason, Rollout
from tests.model import tiny
from tests.rewards.samples import sample

LENGTHS = (4, 1, 7, 3)
MAX_NEW_TOKENS = 10


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _group(position: int, advantages: tuple[float | None, ...]) -> ScoredGroup:
    prompt = DrawnPrompt(position, 0, sample("quality"), tiny.prompt("t", seed=position))
    rollouts = tuple(
        Rollout((position + 1,) * (index + 2), (-index - 0.5,) * (index + 2), FinishReason.STOP, 0)
        for index in range(len(advantages))
    )
    rewards = (RewardBreakdown({"format": 1.0}),) * len(advantages)
    return ScoredGroup(prompt, rollouts, ("",) * len(advantages), rewards, advantages, True)


def test_minibatches_are_consecutive_parts_and_count_their_own_tokens() -> None:
    groups = [_group(position, (1.0, -1.0)) for position in (0, 3, 5, 9)]
    first, second = split_into_minibatches(groups, 2)
    assert [group.id for group in first[0]] == [group.prompt.id for group in groups[:2]]
    assert [group.id for group in second[0]] == [group.prompt.id for group in groups[2:]]
    assert first[1] == second[1] == Counts(num_responses=4, num_tokens=10)


def test_responses_without_an_advantage_and_groups_without_any_are_left_out() -> None:
    groups = [_group(0, (1.0, None, -1.0)), _group(1, (None, None, None))]
    ((minibatch, counts),) = split_into_minibatches(groups, 2)  # the second minibatch would be empty
    (group,) = minibatch
    assert group.advantages == (1.0, -1.0) and [len(response) for response in group.responses] == [2, 4]
    assert group.rollout_log_probs == ((-0.5,) * 2, (-2.5,) * 4)
    assert counts == Counts(num_responses=2, num_tokens=6)


def test_no_trainable_group_means_no_minibatch() -> None:
    assert split_into_minibatches([_group(0, (None, None))], 3) == []


def test_groups_without_a_gradient_can_be_skipped_but_are_counted() -> None:
    groups = [_group(0, (1.0, -1.0)), _group(1, (0.0, 0.0)), _group(2, (0.0, 0.0))]
    first, second = split_into_minibatches(groups, 2, skip_zero_advantages=True)
    assert [group.id for group in first[0]] == [groups[0].prompt.id] and second[0] == []
    assert [first[1], second[1]] == [pair[1] for pair in split_into_minibatches(groups, 2)]


def test_every_target_token_has_the_values_of_its_response(tmp_path: Path) -> None:
    tiny.create("qwen2_5_vl", tmp_path)
    run = RunConfig.model_validate({"model": {"path": tmp_path, "dtype": "float32"}})
    model = build_model(
        ModelConfig.from_pretrained(tmp_path), run.model, run.parallel, run.recompute, initialize_weights=True
    )
    groups = [_group(position, (1.0 + position, -1.0 - position)) for position in range(3)]
    ((minibatch, counts),) = split_into_minibatches(groups, 1)
    batches = make_policy_batches(
        minibatch, counts, model, microbatch_tokens=10_000, normalization="token", max_new_tokens=MAX_NEW_TOKENS
    )
    (batch,) = batches
    assert batch.packed.target_ids.tolist() == [1] * 5 + [2] * 5 + [3] * 5
    assert batch.advantages.tolist() == [1, 1, -1, -1, -1, 2, 2, -2, -2, -2, 3, 3, -3, -3, -3]
    assert batch.rollout_log_probs.tolist() == [-0.5, -0.5, -1.5, -1.5, -1.5] * 3
    assert batch.segment_ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5]
    assert batch.weights.tolist() == pytest.approx([1 / 15] * 15)
    assert batch.ref_log_probs is None and batch.old_log_probs is None


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
def test_token_weights_do_not_depend_on_the_packing(normalization: LossNormalization) -> None:
    counts = Counts(len(LENGTHS), sum(LENGTHS))
    whole = token_weights(LENGTHS, counts, normalization, MAX_NEW_TOKENS)
    parts = [token_weights(part, counts, normalization, MAX_NEW_TOKENS) for part in (LENGTHS[:1], LENGTHS[1:])]
    assert torch.equal(whole, torch.cat(parts))
    expected = sum(LENGTHS) / (len(LENGTHS) * MAX_NEW_TOKENS) if normalization == "constant" else 1
    assert whole.sum().item() == pytest.approx(expected)
