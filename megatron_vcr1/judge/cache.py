"""Answers on disk, so that no run pays twice: one small file an answer, named by the hash of what was asked."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class AnswerCache:
    """A folder that any number of processes may share, on a network file system too.

    A file appears when it is whole. One that cannot be read counts as missing, and is written again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, question: object) -> Any | None:
        """The stored answer; None if there is none."""
        try:
            return json.loads(self._path(question).read_text(encoding="utf-8"))["answer"]
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            return None

    def put(self, question: object, answer: object) -> None:
        """Stores an answer beside its question, for whoever wants to read them.

        Args:
            question: anything that JSON can hold; it is the key.
            answer: the same, and not None.
        """
        path = self._path(question)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"question": question, "answer": answer}, file)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise

    def _path(self, question: object) -> Path:
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"
