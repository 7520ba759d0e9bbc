"""The command line of benchmark_throughput.py."""

from __future__ import annotations

import benchmark_throughput
import pytest


@pytest.mark.parametrize("module", benchmark_throughput.COMMANDS, ids=lambda module: module.__name__)
def test_every_command_has_help_that_fits_into_80_columns(module, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        benchmark_throughput.main([module.__name__.rpartition(".")[2], "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert any("--json FILE" in line for line in lines)
    assert max(map(len, lines)) <= 85  # a usage line may be longer by a bracket


def test_an_unknown_command_exits_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark_throughput.main(["nothing"])
