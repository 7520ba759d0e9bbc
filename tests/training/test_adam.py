"""Our Adam against torch.optim.AdamW, and inside megatron-core's optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_vcr1.training.adam import Adam, install


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (2, 2))]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + index)
        # the last one learns only now and then
        parameter.grad = None if index == 2 and step % 2 else torch.randn(parameter.shape, generator=generator)


def _groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]


SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}


def test_steps_are_those_of_torch() -> None:
    mine, theirs = _parameters(), _parameters()
    ours, reference = Adam(_groups(mine), **SETTINGS), torch.optim.AdamW(_groups(theirs), **SETTINGS, fused=True)
    for step in range(6):
        for parameters, optimizer in ((mine, ours), (theirs, reference)):
            _set_gradients(parameters, step)
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_the_state_holds_all_that_is_needed_to_go_on() -> None:
    parameters = _parameters()
    optimizer = Adam(_groups(parameters), **SETTINGS)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    copies = [torch.nn.Parameter(one.detach().clone()) for one in parameters]
    resumed = Adam(_groups(copies), **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, one in ((parameters, optimizer), (copies, resumed)):
        _set_gradients(some, 3)
        one.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, copies, strict=True))
    assert [group["step"] for group in resumed.param_groups] == [4, 2]


def test_the_first_step_by_hand() -> None:
    """Bias-corrected moments of one gradient are the gradient and its square."""
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    parameter.grad = torch.tensor([0.5])
    Adam([parameter], lr=0.1, eps=1e-3, weight_decay=0.2).step()
    assert parameter.item() == pytest.approx(2 * (1 - 0.1 * 0.2) - 0.1 * 0.5 / (math.sqrt(0.25) + 1e-3))


def test_plain_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        Adam(_parameters(), lr=1e-3, adam_w_mode=False)


def test_megatron_core_uses_it_where_nothing_fused_is_installed() -> None:
    import megatron.core.optimizer as optimizers

    name = install()
    assert name == install()
    if optimizers.Adam is Adam:
        assert name == "torch's fused AdamW" and not optimizers.USING_PYTORCH_OPTIMIZER
    else:
        assert "transformer_engine" in name or "apex" in name
