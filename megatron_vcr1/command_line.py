"""Helpers for commands that compute numbers: help texts, JSON files and tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `vcr1 --help` must not load rich
    from rich.console import Console
    from rich.table import Table


class HelpFormatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a help text to the terminal's width, except indented ones, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(part if part.startswith(" ") else fill(part, width, indent) for part in paragraphs)


def positive(text: str) -> int:
    """Parse an integer above 0."""
    if not int(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


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
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

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
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)
