"""The command line of `vcr1 benchmark` and of tools/benchmark_throughput.py."""

from __future__ import annotations

import benchmark_throughput
import pytest

from megatron_vcr1.cli.main import main

COMMANDS = ("train", "rollout", "step", "decode", "sync", "convert", "sweep")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits_into_80_columns(command, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["benchmark", command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert any("--json FILE" in line for line in lines)
    assert max(map(len, lines)) <= 85  # a usage line may be longer by a bracket


def test_help_lists_all_commands(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        benchmark_throughput.main(["--help"])
    printed = capsys.readouterr().out.split()
    assert set(COMMANDS) <= set(printed)


def test_an_unknown_command_exits_with_2() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "nothing"])
