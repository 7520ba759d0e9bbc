from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.rollout.build import disable_nccl_cumem

NAME = "NCCL_CUMEM_ENABLE"


@pytest.mark.parametrize(
    "engine, sglang, expected",
    [
        ("sglang", {"colocated": False}, "0"),
        ("sglang", {"urls": ["http://other:30000"]}, "0"),
        ("sglang", {}, None),  # servers on the training's GPUs: shared memory brings the weights
        ("sglang", {"colocated": False, "weight_sync": "disk"}, None),
        ("local", {"colocated": False}, None),
    ],
)
def test_nccl_agrees_with_the_servers_that_it_brings_weights_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, sglang: dict[str, Any], expected: str | None
) -> None:
    monkeypatch.setenv(NAME, "taken back at the end")
    monkeypatch.delenv(NAME)
    run = {"model": {"path": tmp_path}, "train": {"run_dir": tmp_path}, "rollout": {"engine": engine}, "sglang": sglang}
    config = RunConfig.model_validate(run)
    disable_nccl_cumem(config)
    assert os.environ.get(NAME) == expected
    monkeypatch.setenv(NAME, "1")
    disable_nccl_cumem(config)
    assert os.environ[NAME] == "1"  # what a user says counts
