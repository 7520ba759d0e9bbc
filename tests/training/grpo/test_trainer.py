"""GRPO steps in one process: what is sampled, dropped, left out, skipped and learned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rewards import RewardBreakdown
from megatron_vcr1.rewards.scoring import NOT_JUDGED
from megatron_vcr1.training import train as train_module
from megatron_vcr1.training.grpo.rewarding import Response
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.train import build, train
from megatron_vcr1.training.trainer import TrainingStopped
from megatron_vcr1.types import RolloutGroup, Task
from tests.training import workspace

VARIETY = "tests.training.own_rewards:variety"
LETTERS = "tests.training.own_rewards:letters"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("grpo"), num_videos=12)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(RunConfig.model_validate({"model": {"path": "model"}}).parallel):
        yield


def _config(folder: Path, rewards: Sequence[str] = (VARIETY,), **sections: dict[str, Any]) -> RunConfig:
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False, "rewards": rewards}
    data = {**workspace.config(folder, "grpo").data.model_dump(), "sources": [source]}
    return workspace.config(folder, "grpo", data=data, **sections)


def _build(config: RunConfig) -> tuple[Learner, GrpoTrainer]:
    learner, trainer, _ = build(config)
    assert isinstance(trainer, GrpoTrainer)
    return learner, trainer


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def _step(trainer: GrpoTrainer, number: int = 1) -> dict[str, float]:
    metrics = Metrics()
    result = trainer.step(number, metrics)
    return {"loss": result.loss, "grad_norm": result.grad_norm, "applied": result.applied, **metrics.reduce()}


def test_a_step_is_on_policy_and_says_so(folder: Path, world: None) -> None:
    _, trainer = _build(_config(folder))
    for number in (1, 2):
        step = _step(trainer, number)
        assert step["ratio/mean"] == 1 and step["clip_fraction"] == 0
        assert step["mismatch/max_abs"] < 1e-4 and abs(step["mismatch/kl"]) < 1e-8
        assert step["policy_version"] == number - 1 and step["policy_lag"] == 0
        assert (step["kl"] == 0) == (number == 1)  # the first policy is the reference
        assert 0 < step["entropy"] < math.log(204)
        assert step["response_tokens/mean"] <= step["response_tokens/max"] <= 8
        assert step["cached_prompt_fraction"] == 3 / 4  # a group's prompt is computed once


def test_several_updates_a_rollout_move_the_ratio_and_are_clipped(folder: Path, world: None) -> None:
    settings = {"epochs_per_rollout": 3, "num_minibatches": 2, "clip_low": 0.01, "clip_high": 0.01}
    learner, trainer = _build(_config(folder, grpo={**settings, "kl_coef": 0.0}))
    step = _step(trainer)
    assert "kl" not in step  # there is no reference
    assert step["ratio/mean"] != 1 and step["clip_fraction"] > 0.05
    assert step["mismatch/max_abs"] < 1e-4  # of the policy that sampled, not of the one between updates
    steps = {group["step"] for group in learner.optimizer.param_groups if group["params"]}
    assert steps == {6}


def test_minibatches_are_the_whole_batch_in_parts(folder: Path, world: None) -> None:
    """Without learning, the parts' gradients add up to the whole's: counts are each minibatch's own, of equal size."""
    whole = _step(_build(_config(folder, optimizer={"learning_rate": 1e-12}))[1])
    parts = _step(_build(_config(folder, optimizer={"learning_rate": 1e-12}, grpo={"num_minibatches": 2}))[1])
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("copied", [False, True], ids=["pointers", "copies"])
def test_the_reference_stays_and_the_policy_comes_back(folder: Path, world: None, copied: bool) -> None:
    learner, trainer = _build(_config(folder))
    assert trainer._reference is not None
    trainer._reference._on_host = copied  # as it is where the policy is on a GPU
    before = _weights(learner)
    assert _step(trainer, 1)["kl"] == 0 and _step(trainer, 2)["kl"] > 0
    after = _weights(learner)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with trainer._reference.in_place():
        inside = _weights(learner)
    assert all(torch.equal(before[name], inside[name]) for name in before)
    assert all(torch.equal(after[name], one) for name, one in _weights(learner).items())


@pytest.mark.parametrize("frozen", ["vision_tower", "merger", "language_model"])
def test_frozen_parts_stay_bit_for_bit(folder: Path, world: None, frozen: str) -> None:
    model = {"path": folder / "model", "dtype": "float32", "freeze": [frozen]}
    learner, trainer = _build(_config(folder, model=model, optimizer={"weight_decay": 0.1, "learning_rate": 1e-2}))
    before = _weights(learner)
    for number in (1, 2):
        assert _step(trainer, number)["applied"]
    changed = {name for name, one in _weights(learner).items() if not torch.equal(one, before[name])}
    learning = {name for name, one in learner.model.named_parameters() if one.requires_grad}
    assert changed == learning != set(before)


def test_dynamic_sampling_replaces_groups_without_a_signal(folder: Path, world: None) -> None:
    settings = {"dynamic_sampling": True, "max_refills": 10, "group_size": 2}
    config = _config(folder, ["tests.training.own_rewards:starts_small"], grpo=settings, rollout={"max_new_tokens": 3})
    _, trainer = _build(config)
    result = trainer.step(1, metrics := Metrics())
    step = metrics.reduce()
    rows = list(result.rollouts.values())
    trained = [row for row in rows if row["trained"]]
    assert len(trained) == 4 and step["groups/dropped"] == len(rows) - 4 > 0
    for row in trained:
        assert len({response["reward"]["total"] for response in row["responses"]}) > 1
    positions = [position for position, row in result.rollouts.items() if row["trained"]]
    assert positions == sorted(positions)


def test_dynamic_sampling_goes_on_short_and_without_an_update_if_nothing_differs(
    folder: Path, world: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(folder, [], grpo={"dynamic_sampling": True, "max_refills": 2})
    learner, trainer = _build(config)
    before = _weights(learner)
    with caplog.at_level("INFO"):
        result = trainer.step(1, metrics := Metrics())
    assert "0 of 4 groups have a signal after 2 refills" in caplog.text
    assert result.applied and result.samples == ()
    assert metrics.reduce()["groups/dropped"] == 12  # 4 prompts, and 2 rounds of refills
    assert all(torch.equal(before[name], one) for name, one in _weights(learner).items())


def test_prompts_that_dynamic_sampling_takes_count_towards_an_epoch(folder: Path) -> None:
    settings = {"dynamic_sampling": True, "max_refills": 1, "group_size": 2}
    run_dir = folder / "epoch"
    config = _config(
        folder,
        [],  # nothing is ever right, so that every prompt of a step is drawn in vain, twice
        grpo=settings,
        train={"stage": "grpo", "run_dir": run_dir, "num_steps": None, "num_epochs": 1.0, "prompts_per_step": 4},
        checkpoint={"every_steps": 1, "export": "never"},
    )
    assert train(config) == 0 and train(config) == 0
    assert [row["groups/dropped"] for row in workspace.metrics(run_dir)] == [8, 8]  # of 12 samples, not 3 steps


def test_long_responses_lose_some_of_their_reward(folder: Path, world: None) -> None:
    _, trainer = _build(_config(folder, [], grpo={"overlong_buffer_tokens": 4}))
    result = trainer.step(1, metrics := Metrics())
    for row in result.rollouts.values():
        for response in row["responses"]:
            penalty = -min(1.0, max(0.0, (response["num_tokens"] - 4) / 4))
            assert response["reward"]["extra"]["overlong"] == penalty
            assert response["reward"]["total"] == penalty
    step = metrics.reduce()
    assert step["reward/temporal_grounding/overlong"] == step["reward/total"] < 0


def test_nothing_is_learned_from_a_step_that_is_not_finite(folder: Path, world: None) -> None:
    learner, trainer = _build(_config(folder))
    _step(trainer, 1)
    before, head = _weights(learner), learner.model.head_weight()
    good = head[0, 0].item()
    sample = trainer._rollouts.sample

    def then_break_the_policy(*args: Any) -> list[RolloutGroup]:
        answers = sample(*args)
        with torch.no_grad():
            head[0, 0] = float("nan")
        return answers

    trainer._rollouts.sample = then_break_the_policy  # type: ignore[method-assign]
    step = _step(trainer, 2)
    assert not step["applied"] and not math.isfinite(step["loss"])
    with torch.no_grad():
        head[0, 0] = good
    assert all(torch.equal(before[name], one) for name, one in _weights(learner).items())
    trainer._rollouts.sample = sample  # type: ignore[method-assign]
    assert _step(trainer, 3)["applied"]


def test_a_policy_that_is_no_more_stops_the_run_and_not_the_machine(folder: Path) -> None:
    """An update can be finite and its result not: the weights, then every response, then every loss."""
    train_keys = {"stage": "grpo", "num_steps": 9, "prompts_per_step": 2, "max_skipped_steps": 2}
    config = _config(
        folder,
        optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0},
        train={**train_keys, "run_dir": folder / "lost"},
    )
    with pytest.raises(TrainingStopped, match=r"3 steps in a row .* samples are train_0"):
        train(config)
    assert [row["update_skipped"] for row in workspace.metrics(folder / "lost")][-3:] == [1, 1, 1]


class _NoVerdicts:
    """Rewards as if a judge had failed on some of the responses."""

    def __init__(self, failed: Sequence[int]) -> None:
        self._failed = failed

    def rewards(self, responses: Sequence[Response]) -> list[RewardBreakdown]:
        reasons = {"recall": NOT_JUDGED}
        return [
            RewardBreakdown(1.0, recall=None, reasons=reasons)
            if index % 4 in self._failed
            else RewardBreakdown(index / 7)
            for index in range(len(responses))
        ]


def test_responses_without_a_verdict_are_left_out(folder: Path, world: None) -> None:
    _, trainer = _build(_config(folder))
    trainer._rollouts._rewarder = _NoVerdicts((1, 3))  # type: ignore[assignment]
    result = trainer.step(1, metrics := Metrics())
    step = metrics.reduce()
    assert result.applied and result.grad_norm > 0 and step["responses/unscored"] == 8
    assert all(row["trained"] for row in result.rollouts.values())
    for row in result.rollouts.values():
        assert [response["advantage"] is None for response in row["responses"]] == [False, True, False, True]
        advantages = [response["advantage"] for response in row["responses"][::2]]
        assert sum(advantages) == pytest.approx(0) and advantages[0] < 0
    learned_from = sum(response["num_tokens"] for row in result.rollouts.values() for response in row["responses"][::2])
    assert learned_from < sum(one["num_tokens"] for row in result.rollouts.values() for one in row["responses"])


def test_a_group_without_any_verdict_is_not_called_trained(folder: Path, world: None) -> None:
    _, trainer = _build(_config(folder))
    trainer._rollouts._rewarder = _NoVerdicts((0, 1, 2, 3))  # type: ignore[assignment]
    result = trainer.step(1, Metrics())
    assert result.applied and not any(row["trained"] for row in result.rollouts.values())


def test_a_judge_that_fails_too_often_stops_the_run(tmp_path: Path, world: None) -> None:
    workspace.create(tmp_path, tasks=[Task.CAPTIONING], num_videos=4)
    _, trainer = _build(_config(tmp_path))
    trainer._rollouts._rewarder = _NoVerdicts((0, 1))  # type: ignore[assignment]
    with pytest.raises(TrainingStopped, match=r"no verdict on 8 of 16 captions .* judge.max_unscored_fraction = 0.2"):
        trainer.step(1, Metrics())


def test_a_reward_that_is_not_there_is_told_before_the_model_is_loaded(
    folder: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "build_model", lambda *_: pytest.fail("a large one takes minutes to load"))
    with pytest.raises(UserError, match="no function nowhere"):
        build(_config(folder, ["tests.training.own_rewards:nowhere"]))


def test_one_step_off_needs_servers(folder: Path, world: None) -> None:
    with pytest.raises(UserError, match=r"one_step_off needs rollout\.engine = 'sglang'"):
        build(_config(folder, grpo={"one_step_off": True}))


def test_a_policy_learns_to_write_letters(folder: Path) -> None:
    """The whole loop: the reward is the share of small letters, about 13 % by chance."""
    run_dir = folder / "learns"
    config = _config(
        folder,
        [LETTERS],
        train={"stage": "grpo", "run_dir": run_dir, "num_steps": 12, "prompts_per_step": 4},
        optimizer={"learning_rate": 1e-3},
        grpo={"group_size": 8, "kl_coef": 0.001},
        rollout={"max_new_tokens": 6},
    )
    assert train(config) == 0
    rewards = [row["reward/total"] for row in workspace.metrics(run_dir)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_every_task_trains_together_and_is_counted_by_itself(tmp_path: Path) -> None:
    workspace.create(tmp_path, tasks=list(Task), num_videos=8)
    run_dir = tmp_path / "all"
    config = _config(tmp_path, train={"stage": "grpo", "run_dir": run_dir, "num_steps": 2, "prompts_per_step": 12})
    assert train(config) == 0
    rows = [json.loads(line) for file in (run_dir / "rollouts").iterdir() for line in file.read_text().splitlines()]
    assert {row["sample"]["task"] for row in rows} == set(Task)
    seen = {name for row in workspace.metrics(run_dir) for name in row}
    for task in Task:
        assert {f"reward/{task}/total", f"reward/{task}/format", f"reward/{task}/{VARIETY}"} <= seen
    assert "zero_rewards/grounded_qa/accuracy/no <answer>" in seen
