from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from megatron_vcr1.checkpoint.optimizer_state import num_updates, optimizer_slices, set_num_updates
from megatron_vcr1.checkpoint.shard_slices import ShardSlice, parameter_slices
from tests.checkpoint.toy_run import ToyRun
from tests.model import tiny

pytestmark = pytest.mark.usefixtures("single_process")


def _run(tmp_path: Path, **settings: dict[str, object]) -> ToyRun:
    tiny.create("qwen2_vl", tmp_path / "model")
    return ToyRun(tmp_path / "model", tmp_path / "checkpoints", settings)


def _slices(run: ToyRun) -> list[ShardSlice]:
    parameters = parameter_slices(run.model)
    return [
        part
        for distributed in (True, False)
        for part in optimizer_slices(run.learner.optimizer, parameters, distributed=distributed)
    ]


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype, num_states", [("float32", 2), ("bfloat16", 3)])
def test_every_parameter_has_moments_and_bfloat16_parameters_have_master_weights(
    tmp_path: Path, distributed: bool, dtype: str, num_states: int
) -> None:
    run = _run(tmp_path, optimizer={"distributed": distributed}, model={"dtype": dtype})
    weights = list(chain.from_iterable(parameter_slices(run.model).values()))
    state = _slices(run)
    kinds = ("exp_avg", "exp_avg_sq", "param")[:num_states]
    assert {part.key for part in state} == {f"optimizer.state.{kind}.{part.key}" for kind in kinds for part in weights}
    assert sum(len(part.values) for part in state) == num_states * sum(len(part.values) for part in weights)
    assert all(part.values.dtype == torch.float32 for part in state)


def test_moments_exist_as_zeros_before_the_first_step(tmp_path: Path) -> None:
    run = _run(tmp_path)
    before = _slices(run)
    assert num_updates(run.learner.optimizer) == 0
    assert not any(part.values.any() for part in before)
    run.train(2)
    assert num_updates(run.learner.optimizer) == 2
    assert any(part.values.any() for part in before)  # the slices are views of the optimizer's own tensors
    set_num_updates(run.learner.optimizer, 7)
    assert num_updates(run.learner.optimizer) == 7
