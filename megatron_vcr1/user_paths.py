"""Paths as users write them in settings and on the command line."""

from __future__ import annotations

import os
import re

from megatron_vcr1.errors import UserError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def expand_path(path: str) -> str:
    """Expand `~`, `~user`, `$NAME` and `${NAME}` in a path, as a shell does.

    Raises:
        UserError: a variable or a user's home folder is not known, or the path contains a NUL character.
    """
    if "\0" in path:
        raise UserError(f"{path!r}: contains a NUL character; remove it")
    for match in _VARIABLE.finditer(path):
        name = match[1] or match[2]
        # An empty variable would silently move the path to the root folder.
        if not os.environ.get(name):
            raise UserError(f"{path}: the environment variable {name} is not set; set it, or write the path out")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(f"{path}: the home folder of {user} is not known; write ./{expanded} for a folder of that name")
    return expanded
