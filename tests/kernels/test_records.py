from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from vcr1_kernels import Objective, grpo_token_loss, linear_grpo_loss
from vcr1_kernels.records import TokenInputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.5}, "need 0 <= clip_low <= 1 and clip_high >= 0, got 1.5 and 0.2"),
        ({"clip_high": -0.1}, "need 0 <= clip_low <= 1 and clip_high >= 0, got 0.2 and -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be greater than 1, got 1.0"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of .*got 'k4'"),
        ({"rollout_ratio_cap": 0.0}, "rollout_ratio_cap must be positive, got 0.0"),
        ({"importance_level": "segment"}, "importance_level must be one of .*got 'segment'"),
    ],
)
def test_invalid_objective_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_objective_is_immutable() -> None:
    objective = Objective(clip_low=0.1)
    with pytest.raises(FrozenInstanceError):
        objective.clip_low = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("function", [grpo_token_loss, linear_grpo_loss])
def test_keyword_defaults_equal_the_objectives_defaults(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    shared = [field for field in fields(Objective) if field.name in parameters]
    assert len(shared) >= 7
    assert {field.name: parameters[field.name].default for field in shared} == {
        field.name: field.default for field in shared
    }


def test_selected_inputs_are_views_and_missing_ones_stay_missing() -> None:
    inputs = TokenInputs(torch.arange(5.0), None, 10 + torch.arange(5.0), None)
    selected = inputs.select(slice(1, 3))
    assert selected.advantages.tolist() == [1, 2]
    assert selected.ref_log_probs is not None and selected.ref_log_probs.tolist() == [11, 12]
    assert selected.old_log_probs is None and selected.rollout_log_probs is None
    assert selected.advantages.untyped_storage().data_ptr() == inputs.advantages.untyped_storage().data_ptr()
