from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import pytest

from megatron_vcr1.data.workers import decode_ahead, worker_name
from tests.limits import HANG_S


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_are_in_the_order_of_an_endless_iterator(num_workers: int) -> None:
    assert list(islice(decode_ahead(abs, count(-3), num_workers=num_workers), 7)) == [3, 2, 1, 0, 1, 2, 3]


def name_of_the_worker(item: int) -> str:
    return worker_name()


def test_workers_have_names() -> None:
    assert set(islice(decode_ahead(name_of_the_worker, count(), num_workers=2), 4)) == {
        "decoding worker 0",
        "decoding worker 1",
    }
    assert worker_name() == "MainThread"


READER_THAT_IS_KILLED = """
import os, sys
from megatron_vcr1.data.workers import decode_ahead

if __name__ == "__main__":
    results = iter(decode_ahead(os.path.realpath, ["/proc/self"] * 9, num_workers=1))
    print(next(results), flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_reader_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(READER_THAT_IS_KILLED)
    reader = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    worker = Path(reader.stdout.readline().strip())
    assert worker.parent == Path("/proc") and worker.is_dir() and worker.name != str(reader.pid)
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate()
    deadline = time.monotonic() + HANG_S
    while worker.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_dir()


READER_THAT_FAILS = """
from megatron_vcr1.data.workers import decode_ahead

if __name__ == "__main__":
    kept = iter(decode_ahead(abs, [-1, -2, -3], num_workers=1))
    raise SystemExit(f"read {next(kept)}, then failed")
"""


def test_a_reader_that_fails_does_not_wait_for_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(READER_THAT_FAILS)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=HANG_S)
    assert (result.returncode, result.stderr) == (1, "read 1, then failed\n")
