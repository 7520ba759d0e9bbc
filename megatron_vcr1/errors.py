"""The error for bad user input, and how errors travel to other processes."""

from __future__ import annotations

import pickle
from typing import cast


class UserError(ValueError):
    """An error caused by the user's input. The command line prints its message without a traceback and exits with 2.

    The message names the file, row or key and says what to do, so that the user needs no traceback.
    """


def portable(error: Exception) -> Exception:
    """Return an error that can be pickled and raised in another process.

    An error that cannot be pickled becomes a RuntimeError with its type and message.
    """
    try:
        # Some errors can be pickled but not restored, so the round trip is tried here.
        return cast(Exception, pickle.loads(pickle.dumps(error)))
    except Exception:  # pickling runs the error's own code, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
