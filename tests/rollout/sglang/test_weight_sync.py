"""Tests of the weight sync: the locks of shared servers, and which servers a pass updates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang.fleet import Fleet
from megatron_vcr1.rollout.sglang.weight_sync import UpdateLocks, WeightSync
from tests.rollout.sglang.fake_server import FakeServer, Reply


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


class VersionedServer:
    """A server that stores its weight version."""

    def __init__(self, version: str) -> None:
        self.version = version

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {"weight_version": self.version, "tp_size": 1}


def sync_to(urls: tuple[str, ...], folder: Path) -> WeightSync:
    section = SglangSection(urls=urls or ("http://unused",), weight_sync="tensor", startup_timeout_s=0.1)
    fleet = Fleet(urls, False, (), None, True, "job", Placement.from_section(section))
    return WeightSync(fleet, section, folder, folder / "weights")


def test_only_one_replica_holds_the_lock_of_a_server() -> None:
    first, second = UpdateLocks("job"), UpdateLocks("job")
    assert first.acquire("a") and not second.acquire("a") and second.acquire("b")
    assert second.is_locked("a")
    first.release("a")
    assert not first.is_locked("a") and second.acquire("a")
    assert UpdateLocks("another job").acquire("a")


def test_a_pass_only_updates_servers_without_the_version(tmp_path: Path) -> None:
    with FakeServer(VersionedServer("default")) as old, FakeServer(VersionedServer("2@job")) as new:
        sync = sync_to((old.url, new.url), tmp_path)
        assert sync.current == (old.url,) and sync.outdated == [new.url]  # of the initial weights
        sync.wait_for_server()
        sync.begin("2@job")
        sync.send([("w", torch.zeros(1))])
        assert sync.end()
        assert set(sync.current) == {old.url, new.url} and not sync.outdated
        assert [server.count("/update_weights_from_tensor") for server in (old, new)] == [1, 0]
        assert not any(UpdateLocks("job").is_locked(server.url) for server in (old, new))


def test_a_pass_without_a_server_that_takes_the_weights_fails(tmp_path: Path) -> None:
    with FakeServer(lambda path, body: (200 if body is None else 400, {"weight_version": "default"})) as server:
        sync = sync_to((server.url,), tmp_path)
        sync.begin("2@job")
        sync.send([("w", torch.zeros(1))])
        assert not sync.end()
        assert not UpdateLocks("job").is_locked(server.url)
    with pytest.raises(EngineError, match=f"no SGLang server is left: {server.url} does not respond"):
        sync.wait_for_server()


class RecordingProcesses:
    """Supervised servers; records which weight directories exist when restarts are told to load one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directories: list[tuple[str, list[str]]] = []

    def failure(self, url: str) -> str | None:
        return None

    def set_restart_weights(self, url: str, model_dir: Path, weight_version: str) -> None:
        self.directories.append((model_dir.name, sorted(path.name for path in self.folder.iterdir())))


def test_a_restart_never_loads_a_directory_that_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "1@job").mkdir(parents=True)
    with FakeServer(VersionedServer("1@job")) as server:
        section = SglangSection(urls=(server.url,), weight_sync="disk", startup_timeout_s=0.1)
        processes = RecordingProcesses(folder)
        placement = Placement.from_section(section)
        fleet = Fleet((server.url,), False, (), processes, True, "job", placement)  # type: ignore[arg-type]
        sync = WeightSync(fleet, section, tmp_path, folder)
        sync.begin("2@job")
        sync.send([("w", torch.zeros(1))])
        assert sync.end()
    # Until restarts load the new directory, they load the old one.
    assert processes.directories == [("2@job", ["1@job", "2@job"])]
    assert [path.name for path in folder.iterdir()] == ["2@job"]
