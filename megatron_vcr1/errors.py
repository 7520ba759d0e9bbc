"""The error that means: the user's input is at fault, and the message says where and what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The command line prints the message without a traceback and exits with 2.

    The message names the file, row or key and the way out, so that nobody needs the traceback.
    """
