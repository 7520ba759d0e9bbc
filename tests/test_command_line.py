"""Helpers that commands share."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from megatron_vcr1.command_line import text_table, write_json


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
