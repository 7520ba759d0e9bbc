"""Templates of pages, and the writing of their files."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from jinja2 import ChainableUndefined, Environment, PackageLoader

from megatron_vcr1.report.charts import short, words
from megatron_vcr1.report.curves import phase_colour


def made_with() -> str:
    """Return the versions that a page was written with."""
    return f"megatron_vcr1 {version('megatron_vcr1')}, Python {platform.python_version()}"


def environment() -> Environment:
    """Return the templates of the package, with the filters that they use."""
    templates = Environment(
        loader=PackageLoader("megatron_vcr1.report"),
        autoescape=True,
        undefined=ChainableUndefined,  # a row of another version may lack a key
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"short": short, "percent": _percent, "path_end": _path_end, "words": words}
    templates.filters["phase_colour"] = phase_colour
    return templates


def _percent(value: float, *, sign: bool = False) -> str:
    """Format a fraction in percent, as the paper does: 0.6084 is 60.8. With `sign`, format a difference."""
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def _path_end(path: str) -> str:
    """Return the last two parts of a path, which are enough to distinguish models."""
    parts = Path(path).parts
    return str(Path("…", *parts[-2:])) if len(parts) > 3 else path


def write_text(path: Path, text: str) -> int:
    """Write UTF-8, with lone surrogates as question marks, and return the size in bytes.

    The file appears under its name only when it is complete.
    """
    content = text.encode("utf-8", "replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return len(content)
