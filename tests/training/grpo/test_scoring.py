from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rewards import RewardBreakdown
from megatron_vcr1.rewards.scoring import NOT_JUDGED
from megatron_vcr1.training.grpo.rewarding import Response
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.trainer import TrainingStopped
from tests.training import workspace
from tests.training.grpo.steps import VARIETY, build_trainer, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("scoring"), num_videos=4)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def test_rollout_rows_hold_every_response_with_its_reward(folder: Path, world: None) -> None:
    _, trainer = build_trainer(config(folder))
    result = trainer.step(1, Metrics())
    row = json.loads(json.dumps(result.rollouts[0]))
    assert (row["step"], row["policy_version"], row["trained"], row["thinking"]) == (1, 0, True, False)
    assert row["sample"]["task"] == "temporal_grounding" and len(row["responses"]) == 4
    assert sum(response["advantage"] for response in row["responses"]) == pytest.approx(0)
    for response in row["responses"]:
        reward = response["reward"]
        assert reward["total"] == pytest.approx(reward["format"] + reward["iou"] + reward["extra"][VARIETY])
        assert 0 < response["num_tokens"] <= 8 and response["finish_reason"] in ("stop", "length")


class _FailingJudge:
    """Returns rewards as if the judge had failed on some responses of every group of 4."""

    def __init__(self, failed: Sequence[int]) -> None:
        self._failed = failed

    def rewards(self, responses: Sequence[Response]) -> list[RewardBreakdown]:
        reasons = {"recall": NOT_JUDGED}
        return [
            RewardBreakdown({"format": 1.0, "recall": None}, reasons)
            if index % 4 in self._failed
            else RewardBreakdown({"format": index / 7})
            for index in range(len(responses))
        ]


def test_responses_without_a_verdict_are_not_trained_on(folder: Path, world: None) -> None:
    _, trainer = build_trainer(config(folder))
    trainer._source._scorer._rewarder = _FailingJudge((1, 3))  # type: ignore[assignment]
    result = trainer.step(1, metrics := Metrics())
    step = metrics.reduce()
    assert result.applied and result.grad_norm > 0 and step["responses/unscored"] == 8
    assert all(row["trained"] for row in result.rollouts.values())
    for row in result.rollouts.values():
        assert [response["advantage"] is None for response in row["responses"]] == [False, True, False, True]
        advantages = [response["advantage"] for response in row["responses"][::2]]
        assert sum(advantages) == pytest.approx(0) and advantages[0] < 0
    num_trained_tokens = sum(
        response["num_tokens"] for row in result.rollouts.values() for response in row["responses"][::2]
    )
    num_tokens = sum(response["num_tokens"] for row in result.rollouts.values() for response in row["responses"])
    assert num_trained_tokens < num_tokens


def test_group_without_any_verdict_is_recorded_as_not_trained(folder: Path, world: None) -> None:
    _, trainer = build_trainer(config(folder))
    trainer._source._scorer._rewarder = _FailingJudge((0, 1, 2, 3))  # type: ignore[assignment]
    result = trainer.step(1, Metrics())
    assert result.applied and not any(row["trained"] for row in result.rollouts.values())


def test_too_many_captions_without_a_verdict_stop_the_run(tmp_path: Path, world: None) -> None:
    workspace.create(tmp_path, tasks=["captioning"], num_videos=4)
    _, trainer = build_trainer(config(tmp_path))
    trainer._source._scorer._rewarder = _FailingJudge((0, 1))  # type: ignore[assignment]
    with pytest.raises(TrainingStopped, match=r"no verdict on 8 of 16 captions .* judge.max_unscored_fraction = 0.2"):
        trainer.step(1, Metrics())
