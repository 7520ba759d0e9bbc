"""Helpers that all tools share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run_tool, text_table, tool_parser, write_json
from rich.console import Console

from megatron_vcr1.errors import UserError


def test_exit_codes_of_a_tool(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        raise error

    assert run_tool("tool", lambda: 0) == 0
    assert run_tool("tool", lambda: raising(UserError("--option: wrong"))) == 2
    assert run_tool("tool", lambda: raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tool: error: --option: wrong\ntool: interrupted\n"


def test_help_starts_with_the_summary_and_ends_with_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool_parser("Do it.\n\n    example").parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.index("Do it.") < text.index("options:") < text.index("    example")


def test_json_is_written_into_a_new_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "result.json", {"a": 1})
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"a": 1}
    write_json(None, {})


def test_only_the_first_column_of_a_table_is_left_aligned() -> None:
    console = Console(width=40)
    with console.capture() as capture:
        console.print(text_table("title", ("name", "s"), [("a", "1.0"), ("long", "10.0")]))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[0] == "title" and lines[-2].startswith("a ") and lines[-2].endswith(" 1.0")
