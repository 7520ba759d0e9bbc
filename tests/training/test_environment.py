from __future__ import annotations

import json

import torch

from megatron_vcr1.training.environment import environment


def test_environment_is_json_and_names_the_slurm_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    environment_row = json.loads(json.dumps(environment(8)))
    assert environment_row["ranks"] == 8 and environment_row["slurm_job"] == "42"
    assert environment_row["torch"].startswith(torch.__version__.split("+")[0])
    assert {"started", "command", "host", "device", "python", "megatron-core"} <= environment_row.keys()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "slurm_job" not in environment(1)
