from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.toy_run import ToyRun
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "pp4": {"pipeline": 4},
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    tiny.create(request.param, folder)
    return folder


def _weights(run: ToyRun) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def _save_and_go_on(model_dir: Path, directory: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    run = ToyRun(model_dir, directory, **settings)
    assert run.resume() is None
    run.train(2)
    run.save()
    rest = run.train(2)  # while it is written
    run.store.finish()
    return rest, _weights(run)


def _resume(model_dir: Path, directory: Path, settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    run = ToyRun(model_dir, directory, **settings)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(torch.nan)
    assert run.resume() == 2
    return run.train(2), _weights(run)


@pytest.mark.parametrize("distributed", [True, False], ids=["divided", "undivided"])
@pytest.mark.parametrize("layout", ["tp2", "tp2-pp2", "dp4"])
def test_a_resumed_run_is_the_uninterrupted_one_digit_for_digit(
    model_dir: Path, tmp_path: Path, gloo_pool: GlooPool, layout: str, distributed: bool
) -> None:
    settings = {"parallel": LAYOUTS[layout], "optimizer": {"distributed": distributed}}
    whole = gloo_pool.run(_save_and_go_on, model_dir, tmp_path, settings)
    resumed = gloo_pool.run(_resume, model_dir, tmp_path, settings)
    for (losses, weights), (resumed_losses, resumed_weights) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses
        assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.mark.parametrize("saved_at, loaded_at", [("tp2-pp2", ("dp4", "tp2", "pp4")), ("dp4", ("tp2-pp2", "pp2"))])
def test_a_run_resumes_at_another_layout(
    model_dir: Path, tmp_path: Path, gloo_pool: GlooPool, saved_at: str, loaded_at: tuple[str, ...]
) -> None:
    whole, _ = gloo_pool.run(_save_and_go_on, model_dir, tmp_path, {"parallel": LAYOUTS[saved_at]})[0]
    for layout in loaded_at:
        for losses, _ in gloo_pool.run(_resume, model_dir, tmp_path, {"parallel": LAYOUTS[layout]}):
            assert torch.tensor(losses) == pytest.approx(torch.tensor(whole), rel=1e-6), layout
