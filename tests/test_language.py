"""Words and constructions that must not come back; docs/glossary.md has the terms to use instead. Repeated sections."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_vcr1", "kernels", "tools", "examples", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))
DOCUMENTS = [ROOT / "README.md", ROOT / "kernels/README.md"]
DOCUMENTS += [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "glossary.md"]
SETTINGS = sorted((ROOT / "examples").rglob("*.toml"))

# What a reader stumbles over, and what to write.
IN_PROSE = {
    r"\bcop(y|ies) of the model\b": "replica",
    r"\b(all|other|each|every|this|these) cop(y|ies)'?s? (of|share|train|sample|have|has|do|does)\b": "replica",
    r"\b(is|are|stands?|lies?|runs?|waits?|comes?|follow(s|ed)?) behind (the|its|every|each|a|one)\b": "after",
    r"\bso many\b(?! \w+ that\b)": "the number",
    r"\b(is|are) of it\b": "name the thing",
    r"\bdivided? (over|among|between) (the )?ranks\b": "shard across ranks",
    r"\bcomputed? again\b": "recompute",
    r"\bhands? (the )?weights over\b": "sync weights",
    r"\bhas a signal\b": "has reward variance",
    r"\bwordings?\b": "prompt, text",
    r"\bspeaks for\b": "name the rank's role",
    r"\b(a|each|every) (row|scale|token|sample) (a|each) (second|token|tensor|row|block)\b": "per second, per tensor",
    r"\bis no (number|file|tensor|directory|folder|list)\b": "is not a",
    r"\bgives? (itself )?up its\b": "release",
}
IN_CODE = {
    r"\bfor one in\b": "name the element",
    r"\bnum_copies\b|\b_?is_first_of_copy\b|\bspeaks_for_copy\b|_in_copy\b|\bcopy_index\b": "replica",
    r"\b(muster|knows_layers|times_transposed|computed_again|note_oddities|let_go|condemn|patience_s)\b": "glossary",
}
DOCSTRING_STARTS = re.compile(r"(What|Of|Whether it|Where it|Who|How so)\b")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of all docstrings, attribute docstrings included."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of all string constants: messages, descriptions, help texts and docstrings."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text), lineno=line):
                yield line, text


def faults(pieces: Iterator[tuple[int, str]] | list[tuple[int, str]], rules: dict[str, str]) -> Iterator[str]:
    for line, text in pieces:
        plain = " ".join(text.split())
        for pattern, instead in rules.items():
            if match := re.search(pattern, plain, re.IGNORECASE):
                yield f"line {line}: {match[0]!r}: write {instead}"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_python_uses_the_glossary(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = list(faults([*strings(tree), *comments(text)], IN_PROSE))
    found += faults(list(enumerate(text.splitlines(), 1)), IN_CODE)
    found += [
        f"line {line}: docstring begins with {match[0]!r}: use a verb (functions) or a noun phrase (classes)"
        for line, docstring in docstrings(tree)
        if (match := DOCSTRING_STARTS.match(docstring.strip()))
    ]
    assert not found


@pytest.mark.parametrize("path", [*DOCUMENTS, *SETTINGS], ids=relative)
def test_documents_use_the_glossary(path: Path) -> None:
    lines = list(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    assert not list(faults(lines, IN_PROSE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_a_document_has_no_section_twice(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ .*", text, flags=re.MULTILINE)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize(
    "source", ['"""What a rank does."""', "x = [one for one in y]  # for one in", "# is no number"]
)
def test_faults_are_found(source: str) -> None:
    tree = ast.parse(source)
    starts = [text for _, text in docstrings(tree) if DOCSTRING_STARTS.match(text)]
    prose = list(faults([*strings(tree), *comments(source + "\n")], IN_PROSE))
    assert starts or prose or list(faults([(1, source)], IN_CODE))
