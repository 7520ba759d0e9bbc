from __future__ import annotations

import os
from pathlib import Path

from megatron_vcr1.judge.cache import ResponseCache

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Ein Hund bellt."}]}


def test_a_response_is_found_under_its_request_only(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache")
    assert cache.get(REQUEST) is None
    cache.put(REQUEST, ["A dog barks."])
    assert ResponseCache(tmp_path / "cache").get(REQUEST) == ["A dog barks."]
    assert cache.get(REQUEST | {"model": "another"}) is None


def test_an_unreadable_file_counts_as_missing(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path)
    cache.put(REQUEST, ["A dog barks."])
    (file,) = tmp_path.rglob("*.json")
    for content in ("", "{", "[]", "\0\0"):
        file.write_text(content)
        assert cache.get(REQUEST) is None
    assert not list(tmp_path.rglob("*.part"))


def test_hostile_files_count_as_missing(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path)
    cache.put(REQUEST, ["A dog barks."])
    (file,) = tmp_path.rglob("*.json")
    for content in ("[" * 100_000, '{"answer": ' + "9" * 5_000 + "}", "\ufeff["):
        file.write_text(content)
        assert cache.get(REQUEST) is None
    file.unlink()
    os.mkfifo(file)
    assert cache.get(REQUEST) is None
    cache.put(REQUEST, ["A cat runs."])
    assert cache.get(REQUEST) == ["A cat runs."]
