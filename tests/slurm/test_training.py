"""`vcr1 train` on a real Slurm cluster: a run that is requeued twice gives the results of an uninterrupted run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_vcr1.config.rendering import render_toml
from tests.limits import HANG_S
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("slurm")

NUM_STEPS = 16
TIMED = ("time/", "tokens_per_s", "tflops_per_s", "mfu", "memory/")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=30", "examples/slurm/train.sbatch")


@pytest.fixture
def settings(submit_dir: Path) -> Path:
    """The directory to submit from, with a run.toml; the run directory is given on the command line."""
    workspace.create(submit_dir, num_videos=8)
    source = {"manifest": submit_dir / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = ["tests.slurm.gated_reward:variety"]
    config = workspace.config(
        submit_dir,
        "grpo",
        train={"stage": "grpo", "num_steps": NUM_STEPS, "prompts_per_step": 4},
        data={**workspace.config(submit_dir, "grpo").data.model_dump(), "sources": [source]},
        checkpoint={"every_steps": 3, "export": "never"},
    )
    (submit_dir / "run.toml").write_text(render_toml(config, documented=False))
    return submit_dir


def rows(run_dir: Path) -> list[dict[str, object]]:
    """Read the metrics that do not depend on time or memory."""
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMED)} for row in workspace.metrics(run_dir)
    ]


def wait_for_step(run_dir: Path, step: int, log: Path) -> None:
    end = time.monotonic() + HANG_S
    while not (run_dir / "metrics.jsonl").exists() or len(workspace.metrics(run_dir)) < step:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def wait_for_line(log: Path, line: str) -> None:
    end = time.monotonic() + HANG_S
    while line not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_a_run_over_three_starts_equals_an_uninterrupted_run(cluster, settings):
    # The host names of the nodes exist only in Slurm's configuration, so the master address is given.
    gate = settings / "gate"
    environment = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[2]), "GATE": str(gate)}
    whole, parts = settings / "whole", settings / "parts"
    job = cluster.submit(settings, *TWO_NODES, "run.toml", "--train.run_dir", whole, **environment)
    assert cluster.wait(job, timeout_s=HANG_S)["JobState"] == "COMPLETED", (settings / f"vcr1-{job}.out").read_text()

    job = cluster.submit(settings, *TWO_NODES, "run.toml", "--train.run_dir", parts, **environment)
    log = settings / f"vcr1-{job}.out"
    wait_for_step(parts, 2, log)
    gate.touch()
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait_for_line(log, "Slurm asks the job to stop: saving")
    gate.unlink()
    cluster.wait(job, until=lambda fields: fields["Restarts"] == "1")
    saved = max(int(path.name.removeprefix("step_")) for path in (parts / "checkpoints").glob("step_*"))
    wait_for_step(parts, saved + 4, log)
    gate.touch()
    cluster.cut_power("n2")
    gate.unlink()
    try:
        cluster.wait(job, until=lambda fields: fields["Restarts"] == "2")
    finally:
        cluster.boot("n2")
    assert cluster.wait(job, timeout_s=HANG_S)["JobState"] == "COMPLETED", log.read_text()

    assert len(rows(whole)) == NUM_STEPS and any(row["loss"] for row in rows(whole))
    assert rows(parts) == rows(whole)
    starts = [json.loads(line) for line in (parts / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and starts[0]["step"] == 0 and starts[1]["step"] == saved and starts[2]["step"] > saved
    assert {start["slurm_job"] for start in starts} == {job} and {start["ranks"] for start in starts} == {2}
