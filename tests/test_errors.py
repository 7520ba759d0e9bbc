"""Errors that are sent to other processes."""

from __future__ import annotations

import pickle

import pytest

from megatron_vcr1.errors import UserError, portable


class _TwoArguments(RuntimeError):
    """An error that can be pickled but not restored: pickle passes its one-argument message to __init__."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(f"{server}: {reason}")


def test_an_ordinary_error_keeps_its_type_and_message() -> None:
    error = portable(UserError("row 3: no video"))
    assert type(error) is UserError and str(error) == "row 3: no video"


@pytest.mark.parametrize(
    "error", [_TwoArguments("gpu3", "gone"), RuntimeError(lambda: None)], ids=["restore", "pickle"]
)
def test_an_error_that_cannot_be_pickled_becomes_a_runtime_error(error: Exception) -> None:
    restored = pickle.loads(pickle.dumps(portable(error)))
    assert type(restored) is RuntimeError
    assert str(restored) == f"{type(error).__name__}: {error}"
