"""The job scripts on a real Slurm cluster, with a fake `vcr1` to be fast: signals, requeues, crashes, bad nodes."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.limits import HANG_S

pytestmark = pytest.mark.xdist_group("slurm")

FAKE_VCR1 = f"""#!{sys.executable}
# Starts and ends like a rank of `vcr1 train`; the configuration file is the name of a scenario.
import os, signal, sys, time

def save_and_stop(*_):
    print("saved", flush=True)
    sys.exit(85)

if sys.argv[1] != "train":
    print(os.environ["SLURMD_NODENAME"], *sys.argv[1:], flush=True)
    print("CPUs:", os.environ["SLURM_CPUS_PER_TASK"], flush=True)
    slow = sys.argv[1] == "rollout" or (sys.argv[2:3] == ["slow"] and "SLURM_RESTART_COUNT" not in os.environ)
    time.sleep(300 if slow else 0)
    sys.exit()
scenario, start, node = sys.argv[2], int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["SLURMD_NODENAME"]
if scenario == "stop" and start == 0:
    signal.signal(signal.SIGUSR1, save_and_stop)
    signal.signal(signal.SIGTERM, save_and_stop)
print(f"start {{start}} of {{scenario}} as rank {{os.environ['SLURM_PROCID']}} on {{node}}", flush=True)
if scenario == "stop" and start == 0:
    time.sleep(300)
elif scenario == "loading" and start == 0:
    time.sleep(300)  # a signal ends it without a checkpoint
elif scenario == "wrong":
    sys.exit(2)
elif scenario == "judging" and os.environ["SLURM_PROCID"] == "0":
    time.sleep(6)
elif scenario == "crash" or (scenario == "crash once" and start == 0):
    raise RuntimeError("something broke")
elif scenario == "progress" and start < 2:
    print(f"resumed from runs/own run/checkpoints/step_{{start}}", flush=True)
    raise RuntimeError("something broke")
print("CPUs:", os.environ["SLURM_CPUS_PER_TASK"], flush=True)
print("finished", *sys.argv[3:], flush=True)
"""

PRINT_ARGUMENTS = """#!/bin/sh
echo "$SLURMD_NODENAME $(basename "$0") $*"
"""


@pytest.fixture
def workdir(submit_dir: Path) -> Path:
    (submit_dir / ".venv").unlink()
    (submit_dir / ".venv/bin").mkdir(parents=True)
    (submit_dir / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    programs = {"vcr1": FAKE_VCR1, "python": PRINT_ARGUMENTS, "torchrun": PRINT_ARGUMENTS}
    for name, text in programs.items():
        (submit_dir / ".venv/bin" / name).write_text(text)
        (submit_dir / ".venv/bin" / name).chmod(0o755)
    return submit_dir


SMALL = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--time=10")
SCRIPT = "examples/slurm/train.sbatch"


def output(folder: Path, job: str) -> str:
    return (folder / f"vcr1-{job}.out").read_text()


def logs(folder: Path, job: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / f"logs/vcr1-{job}").glob("train-*.log")}


def wait_for_ranks(folder: Path, job: str, text: str, num_ranks: int) -> None:
    """Wait until the logs of `num_ranks` ranks contain the text."""
    end = time.monotonic() + HANG_S
    while sum(text in log for log in logs(folder, job).values()) < num_ranks:
        assert time.monotonic() < end, f"{text!r} did not appear: {logs(folder, job)}"
        time.sleep(0.2)


def test_a_job_saves_before_its_time_limit_and_continues(cluster, workdir):
    # Slurm compares the times every 30 s, and rounds up: it sends the signal 20 s to 50 s after the start.
    job = cluster.submit(workdir, *SMALL, "--time=2", "--signal=B:USR1@70", SCRIPT, "stop")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    printed = output(workdir, job)
    for line in ("Slurm asks the job to stop: saving", "saved; requeued", "start 2] vcr1 train", "done"):
        assert line in printed
    ranks = logs(workdir, job)
    assert set(ranks) == {f"train-{rank}.log" for rank in range(4)}
    for rank, text in enumerate(ranks[f"train-{rank}.log"] for rank in range(4)):
        node = "n1" if rank < 2 else "n2"
        assert text.splitlines()[-5:] == [
            f"start 0 of stop as rank {rank} on {node}",
            "saved",
            f"start 1 of stop as rank {rank} on {node}",
            "CPUs: 2",
            "finished",
        ]
    # Only the log of the first rank is printed.
    assert "start 0 of stop as rank 0" in printed and "as rank 1" not in printed


def test_ranks_get_the_environment_although_the_user_exports_nothing(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, "--export=NONE", SCRIPT, "done")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), output(workdir, job)
    assert all("finished" in text for text in logs(workdir, job).values())


def test_a_signal_during_loading_requeues_the_job(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "loading")
    wait_for_ranks(workdir, job, "start 0", 4)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "stopped before it could save" in output(workdir, job)


def test_the_first_rank_may_run_longer_than_the_others(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "judging", SLURM_WAIT="2")  # like a cluster with a WaitTime of 2 s
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0")
    assert all("finished" in text for text in logs(workdir, job).values())


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "stop")
    wait_for_ranks(workdir, job, "start 0", 4)
    cluster.call("scancel", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    wait_for_ranks(workdir, job, "saved", 4)
    assert cluster.call("squeue", "--noheader", "--jobs", job) == ""


def test_save_and_stop(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "stop")
    wait_for_ranks(workdir, job, "start 0", 4)
    cluster.call("scontrol", "update", f"JobId={job}", "Requeue=0")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0")
    assert all("saved" in text for text in logs(workdir, job).values())
    assert "Slurm did not requeue the job; submit it again to continue" in output(workdir, job)


def test_apptainer_runs_every_rank(cluster, workdir):
    """A fake apptainer prints its options and runs the command, as the real one does in the image."""
    fake = workdir / ".venv/bin/apptainer"
    fake.write_text('#!/bin/bash\necho "apptainer $*"\nwhile [[ "$1" != *.sif ]]; do shift; done\nshift\nexec "$@"\n')
    fake.chmod(0o755)
    path = f"{workdir}/.venv/bin:{os.environ['PATH']}"
    job = cluster.submit(workdir, *SMALL, SCRIPT, "done", CONTAINER="image.sif", MOUNTS="/data", PATH=path)
    assert cluster.wait(job)["JobState"] == "COMPLETED", output(workdir, job)
    for text in logs(workdir, job).values():
        assert f"apptainer exec --nv --bind {workdir},/data --pwd {workdir} image.sif" in text and "finished" in text


def test_wrong_settings_are_not_retried(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "wrong")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
    assert "wrong settings or data" in output(workdir, job)


def test_a_crash_is_printed_and_retried(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "crash once")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "RuntimeError: something broke" in output(workdir, job)


def test_repeated_crashes_end_the_job(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "crash", MAX_CRASHES="2")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "1")
    assert "2 crashes without a new checkpoint: giving up" in output(workdir, job)


def test_a_crash_on_a_full_disk_ends_the_job(cluster, workdir):
    """Crashes that cannot be counted would requeue the job for ever."""
    job = cluster.submit(workdir, *SMALL, "--hold", SCRIPT, "crash once")
    (workdir / f"logs/vcr1-{job}/crashes").mkdir(parents=True)  # a folder, to which the job cannot write
    cluster.call("scontrol", "release", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0")
    assert f"logs/vcr1-{job}/crashes cannot be written: giving up" in output(workdir, job)


def test_a_job_that_saves_on_a_full_disk_is_not_done(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, "--hold", SCRIPT, "stop")
    (workdir / f"logs/vcr1-{job}/exit-codes").mkdir(parents=True)  # a folder, to which no rank can write
    cluster.call("scontrol", "release", job)
    wait_for_ranks(workdir, job, "start 0", 4)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output(workdir, job)


def test_crashes_with_a_new_checkpoint_between_them_do_not_add_up(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "progress", MAX_CRASHES="2", HEALTH_CHECK="[ 'sick' = all ]")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"], fields["ExcNodeList"]) == ("COMPLETED", "2", "(null)")
    printed = output(workdir, job)
    assert printed.count("crash 1; requeued\n") == 2
    assert "the health check fails on all nodes: no node is excluded" in printed


def test_a_node_that_fails_its_health_check_is_excluded(cluster, workdir):
    check = "[ $SLURMD_NODENAME != 'n1' ]"
    job = cluster.submit(workdir, *SMALL, "--nodes=1", SCRIPT, "crash once", HEALTH_CHECK=check)
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"], fields["ExcNodeList"]) == ("COMPLETED", "1", "n1")
    assert re.search(r"requeued, without n1$", output(workdir, job), re.MULTILINE)
    assert "start 1 of crash once as rank 0 on n2" in logs(workdir, job)["train-0.log"]


def test_a_job_is_requeued_although_slurm_refuses_the_job_that_would_exclude_a_node(cluster, workdir):
    refusing = workdir / ".venv/bin/sbatch"
    refusing.write_text("#!/bin/sh\necho 'sbatch: error: Batch job submission failed' >&2\nexit 1\n")
    refusing.chmod(0o755)
    job = cluster.submit(workdir, *SMALL, "--nodes=1", SCRIPT, "crash once", HEALTH_CHECK="false")
    fields = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "crash 1; requeued, but n1 could not be excluded" in output(workdir, job)


def test_a_job_is_requeued_when_a_node_dies(cluster, workdir):
    job = cluster.submit(workdir, *SMALL, SCRIPT, "stop")
    wait_for_ranks(workdir, job, "start 0", 4)
    cluster.cut_power("n2")
    try:
        cluster.wait(job, until=lambda fields: fields["Restarts"] == "1")
    finally:
        cluster.boot("n2")
    assert cluster.wait(job)["JobState"] == "COMPLETED"


def test_rollouts_and_judge_run_on_separate_nodes(cluster, workdir):
    script = ("examples/slurm/train_separate.sbatch", "none", "--train.num_steps", "2")
    nodes = ("--nodes=1", "--gpus-per-node=4", ":", "--nodes=2", "--gpus-per-node=4")
    job = cluster.submit(workdir, *nodes, *script, SERVER_GPUS="2", JUDGE_MODEL="models/judge")
    assert cluster.wait(job)["JobState"] == "COMPLETED", output(workdir, job)
    ranks = logs(workdir, job)
    assert len(ranks) == 8 and "as rank 7 on n1" in ranks["train-7.log"]
    (finished,) = (line for line in ranks["train-0.log"].splitlines() if line.startswith("finished"))
    urls = "http://n2:30000,http://n2:30001"
    for option in (
        "--train.num_steps 2",
        "--rollout.engine sglang",
        "--sglang.num_servers 2",
        "--sglang.tensor 2",
        f"--sglang.urls {urls}",
        "--judge.base_url http://n3:30000/v1",
    ):
        assert option in finished
    folder = workdir / f"logs/vcr1-{job}"
    assert (folder / "rollout-0.log").read_text().startswith("n2 rollout serve none --train.num_steps 2")
    assert "CPUs: 12" in ranks["train-0.log"] and "CPUs: 96" in (folder / "rollout-0.log").read_text()
    assert not (folder / "rollout-1.log").exists()
    assert "n3 python -m sglang.launch_server --model-path models/judge --tp 4" in (folder / "judge-0.log").read_text()


def test_a_heterogeneous_job_continues_after_a_signal(cluster, workdir):
    job = cluster.submit(workdir, "--nodes=1", ":", "--nodes=1", "examples/slurm/train_separate.sbatch", "stop")
    wait_for_ranks(workdir, job, "start 0", 8)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, until=lambda fields: fields["Restarts"] == "1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", output(workdir, job)
    assert "saved; requeued" in output(workdir, job)


def test_a_sick_node_in_the_second_group_is_excluded(cluster, workdir):
    script = ("examples/slurm/train_separate.sbatch", "crash once")
    check = "[ $SLURMD_NODENAME != 'n2' ]"
    job = cluster.submit(workdir, "--nodes=1", ":", "--nodes=1", *script, HEALTH_CHECK=check)
    cluster.wait(job, until=lambda fields: fields["Restarts"] == "1")
    assert cluster.wait(job)["JobState"] == "COMPLETED", output(workdir, job)
    assert "crash 1; requeued, without n2\n" in output(workdir, job)
    assert (workdir / f"logs/vcr1-{job}/rollout-0.log").read_text().count("n3 rollout serve") == 1


def test_an_evaluation_continues_after_its_time_limit(cluster, workdir):
    script = ("examples/slurm/evaluate.sbatch", "slow", "models/a")
    job = cluster.submit(workdir, "--array=0", "--ntasks-per-node=2", *script)
    log = workdir / f"logs/vcr1-evaluate-{job}/evaluate-1.log"
    end = time.monotonic() + HANG_S
    while not log.exists() or "CPUs" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.2)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_0")
    fields = cluster.wait(f"{job}_0")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "stopped; requeued" in (workdir / f"vcr1-evaluate-{job}_0.out").read_text()


def test_an_array_evaluates_one_model_per_task(cluster, workdir):
    job = cluster.submit(
        workdir,
        "--array=0-2",
        "--ntasks-per-node=2",
        "examples/slurm/evaluate.sbatch",
        "run.toml",
        "models/a",
        "runs/b",
        "../c",
        "--judge.kind",
        "openai",
    )
    elsewhere = str(workdir.parent / "c").replace("/", "-")
    for task, name, folder in ((0, "models/a", "models-a"), (1, "runs/b", "runs-b"), (2, "../c", elsewhere)):
        assert cluster.wait(f"{job}_{task}")["JobState"] == "COMPLETED"
        text = (workdir / f"vcr1-evaluate-{job}_{task}.out").read_text()
        assert f"evaluate run.toml --model.path {name} --train.run_dir evaluations/{folder} --judge.kind openai" in text


def test_conversion_and_throughput_of_several_layouts(cluster, workdir):
    convert = cluster.submit(workdir, "examples/slurm/convert.sbatch", "import", "--hf", "models/a", "--out", "b")
    (workdir / "layouts.txt").write_text("--tensor 2\n--tensor 4 --recompute full\n")
    script = ("examples/slurm/throughput.sbatch", "layouts.txt", "train")
    sweep = cluster.submit(workdir, "--array=0-2", "--gpus-per-node=4", *script)
    assert cluster.wait(convert)["JobState"] == "COMPLETED"
    converted = (workdir / f"vcr1-convert-{convert}.out").read_text()
    assert " convert import --hf models/a --out b" in converted
    assert [cluster.wait(f"{sweep}_{task}")["JobState"] for task in range(3)] == ["COMPLETED", "COMPLETED", "FAILED"]
    printed = [(workdir / f"vcr1-throughput-{sweep}_{task}.out").read_text() for task in range(3)]
    assert (
        f"vcr1 benchmark train --tensor 4 --recompute full --sides ours --json throughput/{sweep}_1.json" in printed[1]
    )
    assert "--nnodes=1 --nproc-per-node=4" in printed[0] and "layouts.txt has no line 3" in printed[2]
