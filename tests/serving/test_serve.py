"""Start and end of `vcr1 serve`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from tests.limits import HANG_S
from tests.serving.requests import ServerProcess, post


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_cleanly(folder: Path, number: signal.Signals, code: int) -> None:
    with ServerProcess(folder / "model") as server:
        idle = server.connect()  # must not hold the server up
        assert post(server.url, b'{"messages": [{"role": "user", "content": "when?"}], "max_tokens": 1}')[0] == 200
        server.process.send_signal(number)
        assert server.process.wait(timeout=HANG_S) == code
        assert idle.recv(1) == b""
        assert "Traceback" not in server.errors()


def test_several_processes_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["serve", "--model", str(folder / "model")]) == 2
    assert "vcr1 serve is one process" in capsys.readouterr().err
