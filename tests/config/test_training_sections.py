from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from megatron_vcr1.config.training_sections import MAX_BFLOAT16_DECAY, GrpoSection, OptimizerSection, ProfileSection


def test_the_minimum_learning_rate_may_not_exceed_the_peak():
    with pytest.raises(ValidationError, match=r"min_learning_rate = 0\.1 is above learning_rate = 0\.01; lower min_"):
        OptimizerSection(learning_rate=0.01, min_learning_rate=0.1)
    assert OptimizerSection(learning_rate=0.1, min_learning_rate=0.1).decay == "constant"


def test_gathering_during_the_forward_pass_needs_buckets_of_a_sharded_optimizer():
    for settings in ({}, {"overlap_grad_reduce": True, "distributed": False}):
        with pytest.raises(ValidationError, match="overlap_param_gather needs distributed = true, which"):
            OptimizerSection(overlap_param_gather=True, **settings)
    assert OptimizerSection(overlap_param_gather=True, overlap_grad_reduce=True).distributed


def test_moments_in_bfloat16_need_a_decay_that_rounding_keeps():
    with pytest.raises(ValidationError, match=r"second_moment_dtype = 'bfloat16' needs beta2 <= 0\.99, not 0\.999"):
        OptimizerSection(first_moment_dtype="bfloat16", second_moment_dtype="bfloat16")
    OptimizerSection(first_moment_dtype="bfloat16", second_moment_dtype="bfloat16", beta2=0.95)
    for decay, is_kept in ((MAX_BFLOAT16_DECAY, True), (0.999, False)):
        moments = torch.linspace(1, 2, 1000).bfloat16()
        assert bool((moments * decay < moments).all()) == is_kept


def test_profiled_steps_must_be_in_order():
    with pytest.raises(ValidationError, match="last_step = 3 comes before first_step = 4; raise last_step"):
        ProfileSection(first_step=4)
    assert ProfileSection(first_step=3).last_step == 3


def test_the_defaults_are_the_papers():
    grpo = GrpoSection()
    assert (grpo.group_size, grpo.kl_coef, grpo.epochs_per_rollout, grpo.num_minibatches) == (8, 0.04, 1, 1)
    assert (grpo.clip_low, grpo.clip_high, grpo.loss_normalization, grpo.divide_by_std) == (0.2, 0.2, "sequence", True)


@pytest.mark.parametrize("settings", [{"group_size": 1}, {"dual_clip": 1.0}, {"clip_low": 1.5}, {"kl_coef": -1}])
def test_values_without_meaning_are_refused(settings):
    with pytest.raises(ValidationError):
        GrpoSection.model_validate(settings)
