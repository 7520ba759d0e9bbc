"""Code of the user, tasks and rewards: importing its modules, and calling its functions."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from megatron_vcr1.errors import UserError

T = TypeVar("T")


class UserCodeError(RuntimeError):
    """Raised if a user's function fails. The message names the sample and has the function's traceback."""


def call_user_code(compute: Callable[[], T], where: str) -> T:
    """Return what `compute` returns; an exception becomes an error that has its traceback.

    Args:
        where: the sample and the function, for the error message.

    Raises:
        UserCodeError: `compute` raised an exception.
    """
    try:
        return compute()
    except UserError:
        raise
    except Exception as error:  # a user's function may raise any error
        raise UserCodeError(f"{where} raised an exception:\n{traceback.format_exc().rstrip()}") from error


def make_importable(folder: Path | None) -> None:
    """Let modules in a folder be imported, here and in the worker processes that multiprocessing starts.

    Modules of the package and of installed packages take precedence: a file torch.py beside the settings replaces
    nothing.
    """
    if folder is not None and (path := str(folder.absolute())) not in sys.path:
        sys.path.append(path)


def import_user_module(name: str, what: str) -> ModuleType:
    """Import a module.

    Args:
        name: dotted name of the module.
        what: what names it, for the error message, such as "reward 'a:b'".

    Raises:
        UserError: the name is malformed, or importing the module raises an error; the message has the traceback.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{what}: {name!r} is not the name of a module; write it as in `import my_project.counting`")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(_failure(what, name)) from error
        raise UserError(
            f"{what}: there is no module {error.name}; install it, put it beside the TOML file, or add its folder to "
            "PYTHONPATH"
        ) from error
    except Exception as error:  # a user's module may raise any error
        raise UserError(_failure(what, name)) from error


def _failure(what: str, name: str) -> str:
    return f"{what}: importing {name} failed:\n{traceback.format_exc().rstrip()}"
