"""On-disk cache of the judge's responses, so that no run pays for a request twice. Each response is one small file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import read_json


class ResponseCache:
    """A folder of responses that any number of processes may share, also on a network file system.

    A file is named after the hash of its request, and gets this name only when it is complete. If two processes write
    the same file, the later one wins; both files hold a valid response, so no lock is needed. A file that cannot be
    read counts as missing and is written again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, request: object) -> Any | None:
        """Return the stored response to a request; None if there is none."""
        try:
            return read_json(self._path(request))["answer"]
        except (UserError, KeyError, TypeError):
            return None

    def put(self, request: object, response: object) -> None:
        """Store a response together with its request, so that a person can read the file.

        Args:
            request: the key; any JSON value.
            response: any JSON value except null.
        """
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"question": request, "answer": response}, file)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise

    def _path(self, request: object) -> Path:
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"
