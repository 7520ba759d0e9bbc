from __future__ import annotations

import signal
import subprocess
import time

import pytest

from megatron_vcr1.data.signals import block_job_signals_in_children
from tests.limits import HANG_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_children_survive_the_signals_of_the_job(number: signal.Signals) -> None:
    with block_job_signals_in_children():
        protected = subprocess.Popen(["sleep", "60"])
    plain = subprocess.Popen(["sleep", "60"])
    for process in (protected, plain):
        process.send_signal(number)
    assert plain.wait(HANG_S) == -number
    time.sleep(0.05)
    assert protected.poll() is None
    protected.kill()
    assert protected.wait(HANG_S) == -signal.SIGKILL
