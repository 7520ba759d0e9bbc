"""GRPO steps in one process: updates, references, frozen parts and losses that are not finite."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.encoding import VisionInput
from megatron_vcr1.data.scenes import PAPER_TASKS
from megatron_vcr1.model.vision import VisionTower
from megatron_vcr1.model.vision_features import FeatureMemo, VisionFeatures
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.local import sampling
from megatron_vcr1.training.environment import use_deterministic_algorithms
from megatron_vcr1.training.grpo.batch import split_into_minibatches
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.train import train
from megatron_vcr1.training.trainer import TrainingStopped
from megatron_vcr1.types import RolloutGroup
from tests.training import workspace
from tests.training.grpo.steps import LETTERS, VARIETY, build_trainer, config, do_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("grpo"), num_videos=12)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def test_single_update_is_on_policy(folder: Path, world: None) -> None:
    _, trainer = build_trainer(config(folder))
    for number in (1, 2):
        step = do_step(trainer, number)
        assert step["ratio/mean"] == 1 and step["clip_fraction"] == 0
        assert step["mismatch/max_abs"] < 1e-4 and abs(step["mismatch/kl"]) < 1e-8
        assert step["policy_version"] == number - 1 and step["policy_lag"] == 0
        assert (step["kl"] == 0) == (number == 1)  # the first policy is the reference
        assert 0 < step["entropy"] < math.log(204)
        assert step["response_tokens/mean"] <= step["response_tokens/max"] <= 8
        assert step["cached_prompt_fraction"] == 3 / 4  # a group's prompt is computed once


def test_several_updates_per_rollout_move_and_clip_the_ratio(folder: Path, world: None) -> None:
    settings = {"epochs_per_rollout": 3, "num_minibatches": 2, "clip_low": 0.01, "clip_high": 0.01}
    learner, trainer = build_trainer(config(folder, grpo={**settings, "kl_coef": 0.0}))
    step = do_step(trainer)
    assert "kl" not in step  # there is no reference
    assert step["ratio/mean"] != 1 and step["clip_fraction"] > 0.05
    assert step["mismatch/max_abs"] < 1e-4  # compares the policy that sampled, not the one between updates
    steps = {group["step"] for group in learner.optimizer.param_groups if group["params"]}
    assert steps == {6}


def test_minibatch_losses_average_to_the_loss_of_the_whole_batch(folder: Path, world: None) -> None:
    """With a learning rate of almost 0 the policy stays the same, and both minibatches have the same size."""
    whole = do_step(build_trainer(config(folder, optimizer={"learning_rate": 1e-12}))[1])
    parts = do_step(build_trainer(config(folder, optimizer={"learning_rate": 1e-12}, grpo={"num_minibatches": 2}))[1])
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4, abs=1e-6)


def test_reference_stays_frozen_while_the_policy_trains(folder: Path, world: None) -> None:
    kl = []
    for placement in ("host", "resident"):
        learner, trainer = build_trainer(config(folder, grpo={"reference": placement}))
        assert trainer._reference is not None
        before = _weights(learner)
        assert do_step(trainer, 1)["kl"] == 0
        kl.append(do_step(trainer, 2)["kl"])
        after = _weights(learner)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        with trainer._reference.swapped_in():
            inside = _weights(learner)
        assert all(torch.equal(before[name], inside[name]) for name in before)
        assert all(torch.equal(after[name], weight) for name, weight in _weights(learner).items())
    assert kl[0] == kl[1] > 0  # the log-probs are bitwise the same


def test_gradient_buffers_are_free_while_the_engine_samples_and_nothing_changes(
    folder: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colocated servers use that memory."""
    _, trainer = build_trainer(config(folder))
    expected = [do_step(trainer, number) for number in (1, 2)]
    learner, trainer = build_trainer(config(folder))
    monkeypatch.setattr(trainer, "_releases_gradients", True)
    learner.release_gradients()
    sizes = []
    for name in ("next_groups", "policy_updated"):
        method = getattr(trainer._source, name)

        def record(*args: Any, method: Any = method) -> Any:
            sizes.append(sum(buffer.grad_data.untyped_storage().nbytes() for buffer in learner.ddp_model.buffers))
            return method(*args)

        monkeypatch.setattr(trainer._source, name, record)
    found = [do_step(trainer, number) for number in (1, 2)]
    assert sizes == [0] * 4
    for key in ("loss", "grad_norm", "kl", "reward/total"):
        assert [step[key] for step in found] == [step[key] for step in expected]


class _CudaOperators(TorchDispatchMode):
    """Refuses the operators for which CUDA has no deterministic algorithm (docs of use_deterministic_algorithms)."""

    NONDETERMINISTIC = (
        *("cumsum", "cumprod", "kthvalue", "median", "histc", "put_", "nll_loss2d", "ctc_loss", "embedding_bag"),
        *("scatter_reduce", "index_reduce", "grid_sampler", "upsample", "reflection_pad", "replication_pad"),
        *("adaptive_avg_pool", "adaptive_max_pool", "avg_pool3d", "max_unpool", "max_pool3d", "fractional_max_pool"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.names.add(name)
        assert not name.startswith(self.NONDETERMINISTIC), name
        return func(*args, **(kwargs or {}))


def test_deterministic_training_uses_no_operator_that_is_not(
    folder: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = do_step(build_trainer(config(folder))[1])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    use_deterministic_algorithms()
    try:
        learner, trainer = build_trainer(config(folder))
        assert learner.model.config.deterministic_mode
        # Sampling has its own way on a GPU.
        monkeypatch.setattr(sampling, "_cumulative_sum", lambda values: torch.from_numpy(values.numpy().cumsum(-1)))
        with _CudaOperators() as operators:
            found = do_step(trainer)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert len(operators.names) > 50
    assert "embedding_dense_backward" not in operators.names
    assert found["loss"] == expected["loss"] and found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("frozen", ["vision_tower", "merger", "language_model"])
def test_frozen_parts_keep_their_weights_bitwise(folder: Path, world: None, frozen: str) -> None:
    model = {"path": folder / "model", "dtype": "float32", "freeze": [frozen]}
    learner, trainer = build_trainer(
        config(folder, model=model, optimizer={"weight_decay": 0.1, "learning_rate": 1e-2})
    )
    before = _weights(learner)
    for number in (1, 2):
        assert do_step(trainer, number)["applied"]
    changed = {name for name, weight in _weights(learner).items() if not torch.equal(weight, before[name])}
    trainable = {name for name, weight in learner.model.named_parameters() if weight.requires_grad}
    assert changed == trainable != set(before)


class _Memo(FeatureMemo):
    """A memo that weak references can refer to."""


def test_features_of_a_frozen_vision_tower_are_computed_once_per_step(
    folder: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two updates after a reference pass, each microbatch has three forward passes."""
    model = {"path": folder / "model", "dtype": "float32", "freeze": ["vision_tower", "merger"]}
    run = config(folder, model=model, grpo={"num_minibatches": 2})
    passes: list[bool] = []  # of the vision tower: whether it computed with gradients, as an update does
    forward = VisionTower.forward

    def counting_forward(tower: VisionTower, inputs: Sequence[VisionInput]) -> VisionFeatures:
        passes.append(torch.is_grad_enabled())
        return forward(tower, inputs)

    monkeypatch.setattr(VisionTower, "forward", counting_forward)
    memos: list[weakref.ref[_Memo]] = []

    def new_memo() -> _Memo:
        memo = _Memo()
        memos.append(weakref.ref(memo))
        return memo

    monkeypatch.setattr("megatron_vcr1.training.grpo.trainer.FeatureMemo", new_memo)
    learner, trainer = build_trainer(run)
    policy_updated = trainer._source.policy_updated

    def check_memory(*args: Any) -> None:
        assert memos and not any(memo() for memo in memos), "colocated servers take their memory back now"
        policy_updated(*args)

    monkeypatch.setattr(trainer._source, "policy_updated", check_memory)
    step, weights = do_step(trainer), _weights(learner)
    assert passes and not any(passes)
    num_passes = len(passes)
    monkeypatch.setattr("megatron_vcr1.training.grpo.trainer.FeatureMemo", lambda: None)
    other_learner, other_trainer = build_trainer(run)
    other = do_step(other_trainer)
    num_microbatches = sum(passes)
    assert num_microbatches and len(passes) == num_passes + (num_passes + 2 * num_microbatches)
    for name in ("loss", "grad_norm", "kl", "ratio/mean", "model_flops/reference"):
        assert step[name] == other[name], name
    assert all(torch.equal(weights[name], weight) for name, weight in _weights(other_learner).items())
    vision = other["model_flops/old_log_probs"] - step["model_flops/old_log_probs"]
    assert 0 < vision == pytest.approx(other["model_flops"] - step["model_flops"])


def test_overlong_responses_lose_reward(folder: Path, world: None) -> None:
    _, trainer = build_trainer(config(folder, [], grpo={"overlong_buffer_tokens": 4}))
    result = trainer.step(1, metrics := Metrics())
    for row in result.rollouts.values():
        for response in row["responses"]:
            penalty = -min(1.0, max(0.0, (response["num_tokens"] - 4) / 4))
            assert response["reward"]["extra"]["overlong"] == penalty
            assert response["reward"]["total"] == penalty
    step = metrics.reduce()
    assert step["reward/temporal_grounding/overlong"] == step["reward/total"] < 0


def test_skipping_groups_without_a_gradient_changes_no_weight(
    folder: Path, world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rewards are equal and there is no KL term, so the optimizer step is weight decay alone."""
    settings: dict[str, Any] = {"grpo": {"kl_coef": 0.0}, "optimizer": {"weight_decay": 0.5, "warmup_steps": 0}}
    learner, trainer = build_trainer(config(folder, [], **settings))
    before = _weights(learner)
    step = do_step(trainer)
    assert (step["loss"], step["grad_norm"], step["applied"], step["tokens"]) == (0, 0, True, 0)
    assert any(not torch.equal(before[name], weight) for name, weight in _weights(learner).items())
    monkeypatch.setattr(
        "megatron_vcr1.training.grpo.trainer.split_into_minibatches",
        lambda groups, num_minibatches, **_: split_into_minibatches(groups, num_minibatches),
    )
    other_learner, other_trainer = build_trainer(config(folder, [], **settings))
    assert do_step(other_trainer)["tokens"] > 0
    other = _weights(other_learner)
    assert all(torch.equal(other[name], weight) for name, weight in _weights(learner).items())


def test_step_that_is_not_finite_leaves_the_weights_unchanged(folder: Path, world: None) -> None:
    learner, trainer = build_trainer(config(folder))
    do_step(trainer, 1)
    before, head = _weights(learner), learner.model.head_weight()
    good = head[0, 0].item()
    generate = trainer._source._generate

    def generate_then_break_the_policy(*args: Any) -> list[RolloutGroup]:
        responses = generate(*args)
        with torch.no_grad():
            head[0, 0] = float("nan")
        return responses

    trainer._source._generate = generate_then_break_the_policy  # type: ignore[method-assign]
    step = do_step(trainer, 2)
    assert not step["applied"] and not math.isfinite(step["loss"])
    with torch.no_grad():
        head[0, 0] = good
    assert all(torch.equal(before[name], weight) for name, weight in _weights(learner).items())
    trainer._source._generate = generate  # type: ignore[method-assign]
    assert do_step(trainer, 3)["applied"]


def test_diverged_policy_stops_the_run_with_an_error(folder: Path) -> None:
    """A finite update can make the weights infinite; then every response and every loss is garbage."""
    train_keys = {"stage": "grpo", "num_steps": 9, "prompts_per_step": 2, "max_skipped_steps": 2}
    run = config(
        folder,
        optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0},
        train={**train_keys, "run_dir": folder / "lost"},
    )
    with pytest.raises(TrainingStopped, match=r"3 steps in a row .* samples are train_0"):
        train(run)
    assert [row["update_skipped"] for row in workspace.metrics(folder / "lost")][-3:] == [1, 1, 1]


def test_policy_learns_to_write_letters(folder: Path) -> None:
    """The reward is the fraction of lower-case letters, about 13 % for the untrained policy."""
    run_dir = folder / "learns"
    run = config(
        folder,
        [LETTERS],
        train={"stage": "grpo", "run_dir": run_dir, "num_steps": 12, "prompts_per_step": 4},
        optimizer={"learning_rate": 1e-3},
        grpo={"group_size": 8, "kl_coef": 0.001},
        rollout={"max_new_tokens": 6},
    )
    assert train(run) == 0
    rewards = [row["reward/total"] for row in workspace.metrics(run_dir)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_all_tasks_train_together_with_metrics_of_their_own(tmp_path: Path) -> None:
    workspace.create(tmp_path, tasks=list(PAPER_TASKS), num_videos=8)
    run_dir = tmp_path / "all"
    run = config(tmp_path, train={"stage": "grpo", "run_dir": run_dir, "num_steps": 2, "prompts_per_step": 12})
    assert train(run) == 0
    rows = [json.loads(line) for file in (run_dir / "rollouts").iterdir() for line in file.read_text().splitlines()]
    assert {row["sample"]["task"] for row in rows} == set(PAPER_TASKS)
    seen = {name for row in workspace.metrics(run_dir) for name in row}
    for task in PAPER_TASKS:
        assert {f"reward/{task}/total", f"reward/{task}/format", f"reward/{task}/{VARIETY}"} <= seen
    assert "zero_rewards/grounded_qa/accuracy/no <answer>" in seen
