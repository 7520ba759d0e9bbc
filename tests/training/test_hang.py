"""A rank that never comes back: every rank tells where it stands, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_vcr1.config.rendering import render_toml
from tests.training import workspace

STEP_TIMEOUT_S = 20


def never_returns_on_the_last_rank(sample: object, completion: str) -> float:
    """A user's reward with a lock that nobody opens."""
    while os.environ["RANK"] == "1":
        time.sleep(0.1)
    return 0.5


def test_a_hung_run_ends_with_the_stacks_of_every_rank(tmp_path: Path) -> None:
    workspace.create(tmp_path, num_videos=4)
    source = {"manifest": tmp_path / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = [f"{__name__}:{never_returns_on_the_last_rank.__name__}"]
    data = {**workspace.config(tmp_path, "grpo").data.model_dump(), "sources": [source]}
    config = workspace.config(
        tmp_path,
        "grpo",
        data=data,
        train={**workspace.config(tmp_path, "grpo").train.model_dump(), "step_timeout_s": STEP_TIMEOUT_S},
    )
    file = tmp_path / "run.toml"
    file.write_text(render_toml(config, documented=False))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29473", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_vcr1", "train", str(file)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "Timeout (0:00:20)!" in told[1] and never_returns_on_the_last_rank.__name__ in told[1], told[1]
    # The other rank's own stacks, or, where the clock of the last rank was first, what its end did to the collective.
    assert "distributed_c10d" in told[0] and never_returns_on_the_last_rank.__name__ not in told[0], told[0]
