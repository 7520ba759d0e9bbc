"""The documents, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In reading order: commands of later pages use the files that earlier ones leave.
ORDER = (
    "README",
    "install",
    "data",
    "own_data",
    "training",
    "monitoring",
    "evaluation",
    "using_the_model",
    "checkpoints",
)
NOT_RUN = (
    "needs a cluster",
    "needs a GPU",
    "needs an interactive shell",
    "needs the model of the configuration",
    "needs the network",
)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: its document, relative to the repository.
        line: line number of its first line of content.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def is_run(self) -> bool:
        """Whether this machine can run it; the others say in their first line what they need."""
        return not any(reason in self.text.partition("\n")[0] for reason in NOT_RUN)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """All documents for readers, in reading order."""
    found = [ROOT / "README.md", ROOT / "kernels/README.md", *sorted((ROOT / "docs").glob("*.md"))]

    def place(path: Path) -> tuple[int, str]:
        stem = "kernels" if path.parent.name == "kernels" else path.stem
        return (ORDER.index(stem) if stem in ORDER else len(ORDER), str(path))

    return sorted(found, key=place)


def blocks(language: str) -> list[Block]:
    """The code blocks of all documents in one language, in reading order."""
    found = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                found.append(Block(path.relative_to(ROOT).as_posix(), line, language, match[2]))
    return found
