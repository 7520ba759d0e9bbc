from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_vcr1.training.reference import Reference


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    return model


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("on_host", [False, True], ids=["swap-storages", "copy-values"])
def test_model_has_the_reference_weights_only_while_swapped_in(on_host: bool) -> None:
    model = _model()
    reference = Reference(model, "swap")
    reference._on_host = on_host  # as it is for a policy on a GPU
    initial = _weights(model)
    with torch.no_grad():
        model[0].weight += 1
    trained = _weights(model)
    with reference.swapped_in():
        assert all(map(torch.equal, _weights(model), initial))
    assert all(map(torch.equal, _weights(model), trained))


def test_policy_comes_back_after_an_error() -> None:
    model = _model()
    reference = Reference(model, "resident")
    with torch.no_grad():
        model[0].weight += 1
    trained = _weights(model)
    with pytest.raises(RuntimeError, match="out of memory"), reference.swapped_in():
        raise RuntimeError("out of memory")
    assert all(map(torch.equal, _weights(model), trained))


def test_optimizer_views_follow_the_policy() -> None:
    """The distributed optimizer writes to views of the parameters' memory, which must be the policy's afterwards."""
    model = _model()
    reference = Reference(model, "resident")
    view = model[0].weight.data.view(-1)
    with reference.swapped_in():
        pass
    view.fill_(3.0)
    assert (model[0].weight == 3).all()


def test_frozen_parameters_are_not_copied() -> None:
    assert len(Reference(_model(), "resident")._stored) == 2
