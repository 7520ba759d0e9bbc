"""The job scripts on a real Slurm: signals, requeues, crashes, bad nodes. A stand-in for `vcr1` makes them quick."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("slurm")

STAND_IN = f"""#!{sys.executable}
# Behaves like `vcr1 train SCENARIO` at its ends, rank by rank.
import os, signal, sys, time

def save_and_stop(*_):
    print("saved", flush=True)
    sys.exit(85)

scenario, start, node = sys.argv[2], int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["SLURMD_NODENAME"]
print(f"start {{start}} of {{scenario}} as rank {{os.environ['SLURM_PROCID']}} on {{node}}", flush=True)
if scenario == "stop" and start == 0:
    signal.signal(signal.SIGUSR1, save_and_stop)
    signal.signal(signal.SIGTERM, save_and_stop)
    time.sleep(300)
elif scenario == "loading" and start == 0:
    time.sleep(300)  # a signal ends it without a checkpoint
elif scenario == "wrong":
    sys.exit(2)
elif scenario == "crash" or (scenario == "crash once" and start == 0):
    raise RuntimeError("something broke")
print("finished", flush=True)
"""


@pytest.fixture
def stand_in(workplace: Path) -> Path:
    (workplace / ".venv").unlink()
    (workplace / ".venv/bin").mkdir(parents=True)
    (workplace / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    (workplace / ".venv/bin/vcr1").write_text(STAND_IN)
    (workplace / ".venv/bin/vcr1").chmod(0o755)
    return workplace


SMALL = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--time=10")
SCRIPT = "examples/slurm/train.sbatch"


def output(folder: Path, job: str) -> str:
    return (folder / f"vcr1-{job}.out").read_text()


def logs(folder: Path, job: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / f"logs/vcr1-{job}").glob("train-*.log")}


def wait_for_text(read, text: str) -> None:
    end = time.monotonic() + 120
    while text not in read():
        assert time.monotonic() < end, f"{text!r} did not come: {read()}"
        time.sleep(0.2)


def test_a_signal_before_the_time_limit_saves_and_the_job_goes_on(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, "--time=1", "--signal=B:USR1@50", SCRIPT, "stop")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    told = output(stand_in, job)
    for line in ("Slurm asks to stop: saving", "saved; started again", "start 2] vcr1 train", "done"):
        assert line in told
    ranks = logs(stand_in, job)
    assert set(ranks) == {f"train-{rank}.log" for rank in range(4)}
    for rank, text in enumerate(ranks[f"train-{rank}.log"] for rank in range(4)):
        node = "n1" if rank < 2 else "n2"
        assert text.splitlines()[-4:] == [
            f"start 0 of stop as rank {rank} on {node}",
            "saved",
            f"start 1 of stop as rank {rank} on {node}",
            "finished",
        ]
    assert "start 0 of stop as rank 0" in told and "as rank 1" not in told  # the first rank's log is shown


def test_a_signal_while_it_loads_starts_it_again(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, SCRIPT, "loading")
    wait_for_text(lambda: "".join(logs(stand_in, job).values()), "as rank 3")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "stopped before it could save" in output(stand_in, job)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, SCRIPT, "stop")
    wait_for_text(lambda: "".join(logs(stand_in, job).values()), "as rank 3")
    cluster.call("scancel", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    wait_for_text(lambda: logs(stand_in, job)["train-3.log"], "saved")
    assert cluster.call("squeue", "--noheader", "--jobs", job) == ""


def test_wrong_settings_are_not_tried_again(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, SCRIPT, "wrong")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
    assert "settings or data are wrong" in output(stand_in, job)


def test_a_crash_is_shown_and_tried_again(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, SCRIPT, "crash once")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "RuntimeError: something broke" in output(stand_in, job)


def test_crash_after_crash_is_given_up(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, SCRIPT, "crash", MAX_CRASHES="2")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "1")
    assert "2 crashes soon after their starts: given up" in output(stand_in, job)


def test_a_node_that_fails_its_health_check_is_left_out(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, "--nodes=1", SCRIPT, "crash once", HEALTH_CHECK="[ $SLURMD_NODENAME != n1 ]")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"], fields["ExcNodeList"]) == ("COMPLETED", "1", "n1")
    assert re.search(r"started again, without n1$", output(stand_in, job), re.MULTILINE)
    assert "start 1 of crash once as rank 0 on n2" in logs(stand_in, job)["train-0.log"]


def test_a_node_that_dies_takes_the_job_back_to_the_queue(cluster, stand_in):
    job = cluster.submit(stand_in, *SMALL, SCRIPT, "stop")
    wait_for_text(lambda: "".join(logs(stand_in, job).values()), "as rank 3")
    cluster.cut_power("n2")
    try:
        cluster.wait(job, until=lambda fields: fields["Restarts"] == "1")
    finally:
        cluster.boot("n2")
    assert cluster.wait(job)["JobState"] == "COMPLETED"
