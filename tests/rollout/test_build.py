"""Tests of the environment variable that `disable_nccl_cumem` sets; local/test_engine.py builds an engine."""

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
        ("sglang", {}, None),  # weights reach colocated servers by shared memory
        ("sglang", {"colocated": False, "weight_sync": "disk"}, None),
        ("local", {"colocated": False}, None),
    ],
)
def test_nccl_cumem_is_disabled_if_weights_may_be_broadcast_to_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, sglang: dict[str, Any], expected: str | None
) -> None:
    monkeypatch.setenv(NAME, "restored at the end")
    monkeypatch.delenv(NAME)
    run = {"model": {"path": tmp_path}, "train": {"run_dir": tmp_path}, "rollout": {"engine": engine}, "sglang": sglang}
    config = RunConfig.model_validate(run)
    disable_nccl_cumem(config.rollout, config.sglang)
    assert os.environ.get(NAME) == expected
    monkeypatch.setenv(NAME, "1")
    disable_nccl_cumem(config.rollout, config.sglang)
    assert os.environ[NAME] == "1"  # a value of the user is kept
