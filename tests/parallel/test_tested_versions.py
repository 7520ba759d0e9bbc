"""Newer libraries than the tested ones are named in a warning, and nothing else happens."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError

import pytest

from megatron_vcr1.parallel import tested_versions
from megatron_vcr1.parallel.tested_versions import warn_about_untested_versions


def test_a_newer_library_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    installed = {
        "torch": "3.0.0a0+1f2e",
        "megatron-core": "0.19.7",
        "transformers": "5.9.0",
        "av": "18.1.0",
        "triton": "3.9rc1+git12",
    }

    def version(package: str) -> str:
        if package in installed:
            return installed[package]
        raise PackageNotFoundError(package)

    monkeypatch.setattr(tested_versions, "version", version)
    warn_about_untested_versions.cache_clear()
    with caplog.at_level(logging.WARNING):
        warn_about_untested_versions()
        warn_about_untested_versions()
    warn_about_untested_versions.cache_clear()
    assert caplog.messages == [
        "torch 3.0.0a0+1f2e is newer than 2.15, the newest version that megatron_vcr1 is tested with"
    ]


def test_the_libraries_of_this_environment_are_tested(caplog: pytest.LogCaptureFixture) -> None:
    warn_about_untested_versions.cache_clear()
    warn_about_untested_versions()
    assert not caplog.messages
