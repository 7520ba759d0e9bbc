from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.grpo.rollout_source import SynchronousSource
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.train import train
from tests.training import workspace
from tests.training.grpo.steps import build_trainer, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("source"), num_videos=12)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def test_responses_depend_on_the_seed_and_the_position_only(folder: Path, world: None) -> None:
    def responses(**train_keys: int) -> list[str]:
        _, trainer = build_trainer(config(folder, train=train_keys, optimizer={"learning_rate": 1e-12}))
        groups = trainer._source.next_groups(1, Metrics()).kept
        assert [group.prompt.position for group in groups] == list(range(len(groups)))
        return [text for group in groups for text in group.texts]

    assert responses(prompts_per_step=2) == responses(prompts_per_step=4)[:8]
    assert responses(prompts_per_step=2) != responses(prompts_per_step=2, seed=1)


def test_state_restores_the_stream_and_the_policy_version(folder: Path, world: None) -> None:
    _, first = build_trainer(config(folder))
    for step in (1, 2):
        first.step(step, Metrics())
    state = first.state_dict()
    assert state["policy_version"] == 2 and state["prompts"]["next_position"] == 8
    _, second = build_trainer(config(folder))
    second.load_state_dict(state)
    source = second._source
    assert isinstance(source, SynchronousSource)
    assert source.policy_version == 2 and source._engine.policy_version == 2
    assert [group.prompt.position for group in source.next_groups(3, Metrics()).kept] == [8, 9, 10, 11]


def test_dynamic_sampling_replaces_groups_without_reward_variance(folder: Path, world: None) -> None:
    settings = {"dynamic_sampling": True, "max_refills": 10, "group_size": 2}
    run = config(folder, ["tests.training.own_rewards:starts_small"], grpo=settings, rollout={"max_new_tokens": 3})
    _, trainer = build_trainer(run)
    result = trainer.step(1, metrics := Metrics())
    step = metrics.reduce()
    rows = list(result.rollouts.values())
    trained = [row for row in rows if row["trained"]]
    assert len(trained) == 4 and step["groups/dropped"] == len(rows) - 4 > 0
    for row in trained:
        assert len({response["reward"]["total"] for response in row["responses"]}) > 1
    positions = [position for position, row in result.rollouts.items() if row["trained"]]
    assert positions == sorted(positions)


def test_dynamic_sampling_continues_without_an_update_if_no_group_has_reward_variance(
    folder: Path, world: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(folder, [], grpo={"dynamic_sampling": True, "max_refills": 2})
    learner, trainer = build_trainer(run)
    before = {name: weight.detach().clone() for name, weight in learner.model.named_parameters()}
    with caplog.at_level("INFO"):
        result = trainer.step(1, metrics := Metrics())
    assert "0 of 4 groups have reward variance after 2 refills" in caplog.text
    assert result.applied and result.samples == ()
    assert metrics.reduce()["groups/dropped"] == 12  # 4 prompts and 2 refills
    assert all(torch.equal(before[name], weight) for name, weight in learner.model.named_parameters())


def test_prompts_of_dynamic_sampling_count_towards_an_epoch(folder: Path) -> None:
    settings = {"dynamic_sampling": True, "max_refills": 1, "group_size": 2}
    run_dir = folder / "epoch"
    run = config(
        folder,
        [],  # all rewards are 0, so every step draws its prompts twice and drops all groups
        grpo=settings,
        train={"stage": "grpo", "run_dir": run_dir, "num_steps": None, "num_epochs": 1.0, "prompts_per_step": 4},
        checkpoint={"every_steps": 1, "export": "never"},
    )
    assert train(run) == 0 and train(run) == 0
    assert [row["groups/dropped"] for row in workspace.metrics(run_dir)] == [
        8,
        8,
    ]  # 2 steps use up the 12 samples, not 3
