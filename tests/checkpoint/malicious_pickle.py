"""A pickle that runs code when it is loaded, to test that checkpoints are read safely."""

from __future__ import annotations

from pathlib import Path


class PickleThatCreatesFile:
    """An object whose pickle creates a file when an unrestricted unpickler loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))
