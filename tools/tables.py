"""How the tools' tables look."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table


def frameless(title: str, caption: str | None = None) -> Table:
    """A table to add columns to, without frames: 80 columns hold it, or 120 a wide one."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
