"""Every broad `except` says why: an error of our own code must never be taken for bad input."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BROAD = {"Exception", "BaseException"}


def broad_handlers(source: str) -> Iterator[ast.ExceptHandler]:
    """Yield the handlers of every exception that do not raise it again."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {name.id for name in caught if isinstance(name, ast.Name)}
        reraises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        if (node.type is None or names & BROAD) and not reraises:
            yield node


def has_reason(handler: ast.ExceptHandler, lines: list[str]) -> bool:
    """Return whether there is a comment on the line of the `except`, before it, or at the beginning of its body."""
    first, body = handler.lineno - 1, handler.body[0].lineno - 1
    return any("# " in line for line in lines[first - 1 : max(body, first + 1)])


def test_broad_excepts_have_a_reason() -> None:
    missing = []
    for folder in ("megatron_vcr1", "kernels", "tools", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text()
            for handler in broad_handlers(source):
                if not has_reason(handler, source.splitlines()):
                    missing.append(f"{path.relative_to(ROOT)}:{handler.lineno}")
    assert not missing
