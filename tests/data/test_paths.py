from __future__ import annotations

import pytest

from megatron_vcr1.data.paths import is_remote


@pytest.mark.parametrize("path", ["s3://bucket/a.mp4", "memory://a.mp4", "file:///videos/a.mp4"])
def test_urls_are_remote(path: str) -> None:
    assert is_remote(path)


@pytest.mark.parametrize("path", ["a.mp4", "/videos/12:30/a.mp4", "videos//a.mp4", "c:/a.mp4"])
def test_local_paths_are_not_remote(path: str) -> None:
    assert not is_remote(path)
