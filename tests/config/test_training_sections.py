from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_vcr1.config.training_sections import GrpoSection, OptimizerSection, ProfileSection


def test_the_minimum_learning_rate_may_not_exceed_the_peak():
    with pytest.raises(ValidationError, match=r"min_learning_rate = 0\.1 is above learning_rate = 0\.01; lower min_"):
        OptimizerSection(learning_rate=0.01, min_learning_rate=0.1)
    assert OptimizerSection(learning_rate=0.1, min_learning_rate=0.1).decay == "constant"


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
