from __future__ import annotations

import pytest

from megatron_vcr1.config.rollout_sections import RolloutSection, SglangSection
from megatron_vcr1.config.training_sections import GrpoSection, OptimizerSection, TrainSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.training.settings_checks import check_grpo_settings, check_warmup, ignored_epochs


def test_warmup_must_be_shorter_than_the_run() -> None:
    check_warmup(OptimizerSection(warmup_steps=3), num_steps=4)
    with pytest.raises(UserError, match="warmup_steps = 4 must be less than the run's 4 steps"):
        check_warmup(OptimizerSection(warmup_steps=4), num_steps=4)


def test_epochs_beside_a_number_of_steps_are_noticed() -> None:
    assert ignored_epochs(TrainSection(num_steps=3)) is None
    assert ignored_epochs(TrainSection(num_epochs=2)) is None
    warning = ignored_epochs(TrainSection(num_steps=3, num_epochs=2))
    assert warning is not None and "train.num_epochs = 2 has no effect, because train.num_steps = 3" in warning


def test_one_step_off_excludes_colocated_servers() -> None:
    grpo, rollout = GrpoSection(one_step_off=True), RolloutSection(engine="sglang")
    with pytest.raises(UserError, match=r"set sglang\.colocated = false"):
        check_grpo_settings(grpo, rollout, SglangSection(colocated=True))
    check_grpo_settings(grpo, rollout, SglangSection(colocated=False))


def test_overlong_buffer_must_fit_into_a_response() -> None:
    rollout = RolloutSection(max_new_tokens=8)
    check_grpo_settings(GrpoSection(overlong_buffer_tokens=8), rollout, SglangSection())
    with pytest.raises(UserError, match=r"overlong_buffer_tokens = 9 is more than rollout\.max_new_tokens = 8"):
        check_grpo_settings(GrpoSection(overlong_buffer_tokens=9), rollout, SglangSection())
