"""Tests of GRPO steps whose responses come from a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.evaluation.evaluate import evaluate_model
from megatron_vcr1.training.train import train
from tests.data.tiny_processor import CHAT_TEMPLATE
from tests.rollout.sglang.conftest import Serving
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("sglang")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(serving: Serving, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create videos and prompts. The model is the server's, whose tokens are characters."""
    folder = workspace.create(tmp_path_factory.mktemp("training"))
    (serving.model_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.mark.parametrize("weight_sync, one_step_off", [("broadcast", False), ("tensor", True), ("disk", False)])
def test_log_probs_of_rollout_and_training_agree_at_every_step(
    serving: Serving, folder: Path, tmp_path: Path, weight_sync: str, one_step_off: bool
) -> None:
    source: dict[str, Any] = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
    benchmark = {"name": "temporal_grounding", "manifest": source["manifest"], "thinking": False}
    data = workspace.config(folder, "grpo").data.model_dump()
    config = workspace.config(
        folder,
        "grpo",
        model={"path": serving.model_dir},
        data=data | {"sources": [source | {"rewards": ["tests.training.own_rewards:variety"]}]},
        train={"num_steps": 3, "run_dir": tmp_path / "run"},
        validation={"benchmarks": [benchmark], "every_steps": 3, "max_new_tokens": 6},
        evaluate={"benchmarks": [benchmark], "max_new_tokens": 6},
        grpo={"one_step_off": one_step_off, "group_size": 4},
        rollout={"engine": "sglang"},
        sglang={"urls": [serving.url], "weight_sync": weight_sync, "weight_sync_bucket_mb": 1, "colocated": False},
    )
    assert train(config) == 0
    rows = [row for row in workspace.metrics(config.train.run_dir) if "loss" in row]
    assert [row["policy_version"] for row in rows] == [0, 1, 2]
    assert [row["policy_lag"] for row in rows] == ([0, 1, 1] if one_step_off else [0, 0, 0])
    assert all(row["grad_norm"] > 0 for row in rows)
    for row in rows:
        if row["policy_lag"] == 0:  # otherwise the policies differ by one step
            assert row["mismatch/max_abs"] < TOLERANCE
    # The validation samples from the server as the engine of this process does. Of the trained weights, this test only
    # checks that they are the ones that answer: sampling on the server differs between runs, and a run may end in ties.
    local = {"rollout": {"engine": "local"}, "train": {"run_dir": tmp_path / "evaluated"}}
    evaluate_model(RunConfig.model_validate(config.model_dump() | local))
    at_start, at_end = (_outputs(config.train.run_dir / f"validation/step_{step}") for step in (0, 3))
    assert at_start == _outputs(tmp_path / "evaluated/evaluation") and at_start != at_end


def _outputs(results: Path) -> list[str]:
    lines = (results / "temporal_grounding" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["output"] for line in lines]
