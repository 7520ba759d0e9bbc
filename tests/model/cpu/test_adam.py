"""Adam against torch.optim.AdamW, and its place in megatron-core's optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_vcr1.model import cpu
from megatron_vcr1.model.cpu import adam
from megatron_vcr1.model.cpu.adam import Adam, adam_in_use


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), (2, 2))]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + index)
        # The last parameter has a gradient in every other step only.
        parameter.grad = None if index == 2 and step % 2 else torch.randn(parameter.shape, generator=generator)


def _groups(parameters: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]


SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}


def test_steps_equal_torch_adamw() -> None:
    our_parameters, torch_parameters = _parameters(), _parameters()
    ours = Adam(_groups(our_parameters), **SETTINGS)
    reference = torch.optim.AdamW(_groups(torch_parameters), **SETTINGS, fused=True)
    for step in range(6):
        for parameters, optimizer in ((our_parameters, ours), (torch_parameters, reference)):
            _set_gradients(parameters, step)
            optimizer.step()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(our_parameters, torch_parameters, strict=True))


@pytest.mark.parametrize("names", [("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq")])
def test_moments_in_bfloat16_are_rounded_after_each_step(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam, "_CHUNK_SIZE", 4)
    our_parameters, torch_parameters = _parameters(), _parameters()
    ours = Adam(_groups(our_parameters), **SETTINGS, **{f"{name}_dtype": torch.bfloat16 for name in names})
    reference = torch.optim.AdamW(_groups(torch_parameters), **SETTINGS, fused=True)
    for step in range(6):
        for parameters, optimizer in ((our_parameters, ours), (torch_parameters, reference)):
            _set_gradients(parameters, step)
            optimizer.step()
        for name in names:
            for state in reference.state.values():
                state[name] = state[name].bfloat16().float()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(our_parameters, torch_parameters, strict=True))
    dtypes = {name: tensor.dtype for name, tensor in ours.state[our_parameters[0]].items()}
    assert dtypes == {n: torch.bfloat16 if n in names else torch.float32 for n in ("exp_avg", "exp_avg_sq")}


def test_state_dict_is_enough_to_resume() -> None:
    parameters = _parameters()
    optimizer = Adam(_groups(parameters), **SETTINGS)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = Adam(_groups(copies), **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own_parameters, own_optimizer in ((parameters, optimizer), (copies, resumed)):
        _set_gradients(own_parameters, 3)
        own_optimizer.step()
    assert all(torch.equal(original, copied) for original, copied in zip(parameters, copies, strict=True))
    assert [group["step"] for group in resumed.param_groups] == [4, 2]


def test_first_step_by_hand() -> None:
    """The bias-corrected moments after one step are the gradient and its square."""
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    parameter.grad = torch.tensor([0.5])
    Adam([parameter], lr=0.1, eps=1e-3, weight_decay=0.2).step()
    assert parameter.item() == pytest.approx(2 * (1 - 0.1 * 0.2) - 0.1 * 0.5 / (math.sqrt(0.25) + 1e-3))


def test_coupled_weight_decay_is_rejected() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        Adam(_parameters(), lr=1e-3, adam_w_mode=False)


def test_megatron_core_uses_it_without_transformer_engine_and_apex() -> None:
    import megatron.core.optimizer as optimizers

    cpu.install()
    if optimizers.Adam is Adam:
        assert adam_in_use() == "torch's fused AdamW" and not optimizers.USING_PYTORCH_OPTIMIZER
    else:
        assert "transformer_engine" in adam_in_use() or "apex" in adam_in_use()


def test_an_adam_that_cannot_be_resumed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.optimizer as optimizers

    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", True)  # as before cpu.install()
    with pytest.raises(RuntimeError, match=r"cpu\.install"):
        adam_in_use()
