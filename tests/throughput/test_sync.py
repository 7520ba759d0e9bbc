"""The weight-sync benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_throughput
import pytest

pytestmark = pytest.mark.xdist_group("gloo")


def test_every_weight_is_streamed(tmp_path: Path) -> None:
    out = tmp_path / "sync.json"
    assert benchmark_throughput.main(["sync", "--model", "tiny", "--rounds", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"] == "vcr1 benchmark sync --model tiny --rounds 2"
    assert result["bytes"] == 4 * 1_545_920 and len(result["seconds"]) == 2


def test_servers_need_the_directory_of_their_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_throughput.main(["sync", "--model", "tiny", "--urls", "http://127.0.0.1:1"]) == 2
    assert "--model must be the directory" in capsys.readouterr().err
