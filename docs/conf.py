"""Sphinx configuration: `python -m sphinx -W docs build/docs` builds the manual and the API reference."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project = "megatron_vcr1"
author = "the megatron_vcr1 authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "megatron_vcr1"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings use Markdown-style single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes as one list per class instead of a paragraph each
toc_object_entries_show_parents = "hide"


def skip_members(app: object, what: str, name: str, item: object, skip: bool, options: object) -> bool:
    """Leave out members whose docstrings are not ours.

    Type aliases would show the docstring of their origin, and fields of named tuples "Alias for field number 0".
    """
    is_field = (getattr(item, "__doc__", None) or "").startswith("Alias for field number")
    return skip or is_field or hasattr(item, "__origin__")


def setup(app: object) -> None:
    app.connect("autodoc-skip-member", skip_members)  # type: ignore[attr-defined]
