"""Paths with `~` and variables."""

from __future__ import annotations

import pwd

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.user_paths import expand_path


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/runs/x", "/home/me/runs/x"),
        ("~", "/home/me"),
        ("$SCRATCH/x", "/scratch/x"),
        ("${SCRATCH}/x", "/scratch/x"),
        ("a/${SCRATCH}x$SCRATCH", "a//scratchx/scratch"),
        ("a/~/b", "a/~/b"),
        ("runs/100$", "runs/100$"),
        ("./~x", "./~x"),
        ("", ""),
    ],
)
def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch, path: str, expanded: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert expand_path(path) == expanded


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NO_SUCH_NAME/x", "environment variable NO_SUCH_NAME is not set"),
        ("x/${NO_SUCH_NAME}", "environment variable NO_SUCH_NAME is not set"),
        ("$EMPTY/x", "environment variable EMPTY is not set"),
        ("~no_such_user_here/x", "the home folder of ~no_such_user_here is not known"),
        ("a\0b", "NUL"),
    ],
)
def test_unknown_names_are_user_errors(monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError, match=message):
        expand_path(path)


def test_the_home_folder_of_a_named_user_is_expanded() -> None:
    user = pwd.getpwnam("root")  # in a container, the user of this process may have no name
    assert expand_path(f"~{user.pw_name}/x") == f"{user.pw_dir.rstrip('/')}/x"
