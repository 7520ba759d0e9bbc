from __future__ import annotations

import json

import torch

from megatron_vcr1.training.environment import environment


def test_a_start_is_described_in_json(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    described = json.loads(json.dumps(environment(8)))
    assert described["ranks"] == 8 and described["slurm_job"] == "42"
    assert described["torch"].startswith(torch.__version__.split("+")[0])
    assert {"started", "command", "host", "device", "python", "megatron-core"} <= described.keys()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "slurm_job" not in environment(1)
