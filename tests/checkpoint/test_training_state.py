from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.checkpoint.training_state import TrainingState, read_state, write_state
from megatron_vcr1.errors import UserError

STATE = TrainingState(
    step=7, num_updates=5, schedule={"num_steps": 7}, trainer={"prompts": {"position": 56}}, reference="0a1b"
)


def test_state_is_read_back(tmp_path: Path) -> None:
    write_state(tmp_path, STATE.to_json())
    assert read_state(tmp_path) == STATE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2, "step": 7}'])
def test_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json: damaged or missing"):
        read_state(tmp_path)


def test_another_version_is_refused_with_advice(tmp_path: Path) -> None:
    write_state(tmp_path, json.dumps({**json.loads(STATE.to_json()), "version": 1}))
    with pytest.raises(UserError, match=r"has version 1, .*choose another train.run_dir, with the checkpoint as"):
        read_state(tmp_path)
