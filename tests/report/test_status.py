from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.config.rendering import default_config, render_toml
from megatron_vcr1.errors import UserError
from megatron_vcr1.report.status import process_state, read_status

START = {"step": 0, "num_steps": 100, "host": "node7", "pid": 1234}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (tmp_path / "config.toml").write_text(render_toml(default_config(), documented=False))
    (tmp_path / "starts.jsonl").write_text(json.dumps(START) + "\n")
    rows = [{"step": 0, "validation/a/mIoU": 0.9, "validation/a/num_samples": 4, "time/validation_s": 2.0}]
    for step in range(1, 6):
        rows.append({"step": step, "loss": 0.1, "time/total_s": 3.0, "time/save_s": 0.0})
        if step in (2, 4):
            rows.append({"step": step, "validation/a/mIoU": 0.5 - step / 10, "time/validation_s": 4.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "skipped.jsonl").write_text('{"step": 1, "id": "x", "reason": "damaged"}\n' * 2)
    return tmp_path


def test_status_has_step_time_left_checkpoint_and_best_metric(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = read_status(run_dir)
    assert (status.step, status.num_steps, list(status.checkpoints), status.num_skipped) == (5, 100, [2, 4], 1)
    assert status.seconds_per_step == 5.0 and status.eta_s == 95 * 5.0  # 10 s of validation in 5 steps
    assert status.metric == "a/mIoU"
    assert status.best == (2, pytest.approx(0.3)) and status.last == (4, pytest.approx(0.1))
    assert main(["status", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    for part in ("5 of 100", "7 min 55 s", "step 4 (also 2)", "a/mIoU 0.1 at step 4; best 0.3 at step 2", "1 samples"):
        assert part in printed
    assert max(map(len, printed.splitlines()[1:])) <= 80
    assert main(["status", "--json", str(run_dir)]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 5


def test_an_early_stop_leaves_no_time(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for patience, is_stopped in ((1, True), (2, False)):
        validation = default_config().validation.model_copy(update={"patience": patience})
        config = default_config().model_copy(update={"validation": validation})
        (run_dir / "config.toml").write_text(render_toml(config, documented=False))
        assert main(["status", str(run_dir)]) == 0
        printed = capsys.readouterr().out
        assert ("5 of 100, stopped early; newest" in printed) == is_stopped
        assert ("time left" in printed) != is_stopped


def test_lines_that_cannot_be_read_are_noted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not read_status(run_dir).notes
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:-1], "damaged", lines[-1][:9]]))
    assert main(["status", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "note        metrics.jsonl: the last line is incomplete and is left out" in printed
    assert "metrics.jsonl: 1 lines are not JSON objects and are left out" in printed


def test_run_before_its_first_step_and_folder_without_a_run(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    status = read_status(run_dir)
    assert (status.step, status.idle_s, status.eta_s, status.last) == (0, None, None, None)
    with pytest.raises(UserError, match="no run has started here; give the folder of a run"):
        read_status(tmp_path / "nowhere")


HOLD = """
import sys
from pathlib import Path
from megatron_vcr1.checkpoint.run_lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_process_is_found_by_the_lock_that_it_holds(run_dir: Path) -> None:
    """The row of the start names another host: only the lock tells."""
    folder = run_dir / "checkpoints"
    assert process_state(folder, START) == "unknown"  # no lock file
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "locked\n"
        assert process_state(folder, START) == process_state(folder, START) == "running"
        process.stdin.close()
    assert process_state(folder, START) == "not running"


def test_without_locks_this_hosts_processes_are_asked(run_dir: Path) -> None:

    folder, mine = run_dir / "checkpoints", {"host": platform.node(), "pid": os.getpid()}
    assert process_state(folder, mine) == "running"
    assert process_state(folder, {**mine, "pid": 2**22 + 1}) == "not running"
