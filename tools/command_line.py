"""Helpers for the command lines of all tools: parsers, exit codes, JSON files and tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_vcr1.errors import UserError


class HelpFormatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a help text to the terminal's width, except indented ones, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(part if part.startswith(" ") else fill(part, width, indent) for part in paragraphs)


def tool_parser(doc: str | None) -> argparse.ArgumentParser:
    """Create a parser from a module's docstring: the first paragraph on top of the help text, the rest below."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=HelpFormatter, allow_abbrev=False)


def run_tool(name: str, run: Callable[[], int]) -> int:
    """Call a tool's main function and return the exit code: 2 for wrong input, 130 for Ctrl-C."""
    try:
        return run()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def positive(text: str) -> int:
    """Parse an argument that must be an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def write_json(path: Path | None, result: Any) -> None:
    """Write a result to a JSON file and create its directory; do nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def text_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    *,
    left_columns: Sequence[int] = (0,),
    wrap: bool = False,
) -> Table:
    """Build a table without a frame, so that it fits into 80 columns.

    Args:
        columns: headings; a newline in a heading breaks it.
        rows: cells of each row; missing cells at the end of a row stay empty.
        left_columns: indices of left-aligned columns; the others are right-aligned.
        wrap: whether cells may be broken over several lines.
    """
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="left" if index in left_columns else "right", no_wrap=not wrap, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    return table


def console() -> Console:
    """Return a console for tables: as wide as the terminal, or 120 columns where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 120)
