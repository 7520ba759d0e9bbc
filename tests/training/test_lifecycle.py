"""Stop signals, and the watchdog that ends a hung run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.training.lifecycle import STOP_SIGNALS, Lifecycle
from megatron_vcr1.training.trainer import TrainingStopped
from tests.commands import Process, vcr1
from tests.limits import HANG_S
from tests.ports import free_ports
from tests.training import workspace

pytestmark = pytest.mark.one_lane

SHORT_TIMEOUT_S = 20
_armed: list[Lifecycle] = []


def _lifecycle(finish_saving: mock.Mock | None = None) -> Lifecycle:
    return Lifecycle(step_timeout_s=600, finish_saving=finish_saving or mock.Mock())


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signals_are_noted_and_handlers_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with _lifecycle() as lifecycle:
        assert not lifecycle.stop_requested
        os.kill(os.getpid(), number)
        assert lifecycle.stop_requested
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("error", "finishes"), [(TrainingStopped("diverged"), True), (ValueError("a bug"), False)])
def test_saving_is_finished_only_after_errors_that_all_ranks_raise(error: Exception, finishes: bool) -> None:
    finish_saving = mock.Mock()
    with pytest.raises(type(error)), _lifecycle(finish_saving):
        raise error
    assert finish_saving.called == finishes


def test_watchdog_is_disarmed_at_the_end() -> None:
    """The watchdog is a thread: while it exists, it can end the process."""
    code = f"""
import os, time
from megatron_vcr1.training.lifecycle import Lifecycle
num_threads = lambda: len(os.listdir("/proc/self/task"))
before = num_threads()
with Lifecycle(step_timeout_s={HANG_S}, finish_saving=lambda: None) as lifecycle:
    lifecycle.expect_progress()
    assert num_threads() == before + 1
while num_threads() > before:
    time.sleep(0.01)
with Lifecycle(step_timeout_s=1, finish_saving=lambda: None) as lifecycle:
    print("hangs now", flush=True)
    lifecycle.expect_progress()
    time.sleep({HANG_S})
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert process.stdout == "hangs now\n" and process.returncode == 1, process.stderr
    assert "Timeout (0:00:01)!" in process.stderr


def train_and_keep_the_lifecycle(file: Path) -> int:
    """Run `vcr1 train`; `_armed` gets the lifecycle whose watchdog it arms."""
    expect_progress = Lifecycle.expect_progress

    def noted(lifecycle: Lifecycle) -> None:
        _armed.append(lifecycle)
        expect_progress(lifecycle)

    with mock.patch.object(Lifecycle, "expect_progress", noted):
        return vcr1("train", file)


def never_returns_on_the_last_rank(sample: object, completion: str) -> float:
    """A user's reward that waits for a lock forever.

    The first call lowers the watchdog's time, and arms it again: how long a busy machine takes for the step until here
    does not matter.
    """
    lifecycle = _armed[-1]
    if lifecycle._step_timeout_s == HANG_S:
        lifecycle._step_timeout_s = SHORT_TIMEOUT_S
        lifecycle.expect_progress()
    while os.environ["RANK"] == "1":
        time.sleep(0.1)
    return 0.5


def test_hung_run_ends_with_the_stacks_of_every_rank(tmp_path: Path) -> None:
    workspace.create(tmp_path, num_videos=4)
    source = {"manifest": tmp_path / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = [f"{__name__}:{never_returns_on_the_last_rank.__name__}"]
    config = workspace.config(
        tmp_path, "grpo", data={"sources": [source]}, train={"stage": "grpo", "step_timeout_s": HANG_S}
    )
    file = tmp_path / "run.toml"
    file.write_text(render_toml(config, documented=False))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    ranks = [
        Process(
            train_and_keep_the_lifecycle,
            file,
            stdout=tmp_path / "stdout",
            stderr=log,
            environment=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    assert [rank.wait() for rank in ranks] == [1, 1]
    first, last = [log.read_text() for log in logs]
    assert "Timeout (0:00:20)!" in last and never_returns_on_the_last_rank.__name__ in last, last
    # Rank 0 either dumps its own stacks, or, if rank 1 ended earlier, fails in the collective that waits for rank 1.
    assert "distributed_c10d" in first and never_returns_on_the_last_rank.__name__ not in first, first
