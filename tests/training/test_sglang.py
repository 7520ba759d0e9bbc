"""GRPO with a real SGLang server on the CPU (tools/test.sh --with-sglang): the whole run, in step and one step off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.training.train import train
from tests.rollout.sglang.conftest import ENVIRONMENT, free_port, settings, sglang_python  # noqa: F401
from tests.training import workspace


@pytest.mark.parametrize("one_step_off", [False, True])
def test_a_run_samples_from_its_own_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sglang_python: Path,  # noqa: F811
    free_port: int,  # noqa: F811
    one_step_off: bool,
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    folder = workspace.create(tmp_path)
    base = workspace.config(folder, "grpo").model_dump()
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = ["tests.training.own_rewards:letters"]
    servers = settings(folder, folder / "model", sglang_python, port=free_port)
    sections: dict[str, dict[str, Any]] = {
        "data": base["data"] | {"sources": [source]},
        "train": {"stage": "grpo", "run_dir": folder / "run", "num_steps": 3, "prompts_per_step": 2},
        "rollout": {"engine": "sglang", "max_new_tokens": 6},
        "sglang": servers["sglang"],
        "grpo": {"group_size": 4, "one_step_off": one_step_off},
    }
    assert train(workspace.config(folder, "grpo", **sections)) == 0
    rows = workspace.metrics(folder / "run")
    assert [row["policy_version"] for row in rows] == [0, 1, 2]
    assert [row["policy_lag"] for row in rows] == ([0, 1, 1] if one_step_off else [0, 0, 0])
    for row in rows:
        assert row["grad_norm"] > 0
        if row["policy_lag"] == 0:  # the server has the weights of the moment, and computes as training does
            assert row["mismatch/max_abs"] < 1e-4
        else:
            assert row["mismatch/mean_abs"] > 1e-3
