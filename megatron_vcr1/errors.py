"""The error that means: the user's input is at fault, and the message says where and what to do; and any error's way
to another process.
"""

from __future__ import annotations

import pickle
from typing import cast


class UserError(ValueError):
    """Bad input. The command line prints the message without a traceback and exits with 2.

    The message names the file, row or key and the way out, so that nobody needs the traceback.
    """


def portable(error: Exception) -> Exception:
    """An error as another process can raise it: not all of them can be pickled."""
    try:
        return cast(Exception, pickle.loads(pickle.dumps(error)))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
