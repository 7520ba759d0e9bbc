"""Sphinx configuration: `python -m sphinx -W docs build/docs` builds the manual and the API reference."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project = "megatron_vcr1"
author = "the megatron_vcr1 authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings use Markdown-style single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def skip_aliases(app: object, what: str, name: str, item: object, skip: bool, options: object) -> bool:
    """Leave out type aliases: autodoc would show the docstring of what they stand for."""
    return skip or hasattr(item, "__origin__")


def setup(app: object) -> None:
    app.connect("autodoc-skip-member", skip_aliases)  # type: ignore[attr-defined]
