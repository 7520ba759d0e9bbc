"""Tests of servers that the settings name: which of them are accepted, and which may release memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang import fleet
from megatron_vcr1.rollout.sglang.fleet import check_server, find_or_start_servers
from tests.rollout.sglang.fake_server import FakeServer
from tests.rollout.sglang.test_memory import ReleasingServer, memory_of

READY = {"tp_size": 1, "weight_version": "default"}


@pytest.mark.parametrize("saver", [True, False])
@pytest.mark.parametrize("backup", [True, False])
def test_only_a_server_that_keeps_a_copy_of_its_weights_releases_its_memory(saver: bool, backup: bool) -> None:
    info = {"enable_memory_saver": saver, "enable_weights_cpu_backup": backup}
    with FakeServer(lambda path, body: (200, READY | info)) as server:
        assert check_server(server.url) == (saver and backup)


@pytest.mark.parametrize("is_released", [True, False], ids=["released", "paused for an update"])
def test_a_run_undoes_what_a_killed_run_left(is_released: bool) -> None:
    behavior = ReleasingServer()
    with FakeServer(behavior) as server:
        if is_released:
            memory_of(server).release()
        behavior.is_paused = True
        check_server(server.url)
        assert (behavior.is_released, behavior.is_paused, behavior.has_ended) == (False, False, False)
        assert behavior.version == "3@run"


@pytest.mark.parametrize("info", [{"enable_deterministic_inference": True}, {"dp_size": 2}, {"pp_size": 2}], ids=str)
def test_a_server_with_unsupported_settings_is_rejected(info: dict[str, Any]) -> None:
    with (
        FakeServer(lambda path, body: (200, READY | info)) as server,
        pytest.raises(UserError, match="start it without"),
    ):
        check_server(server.url)


@pytest.mark.parametrize("url", ["http://[", "localhost:30000", "http://nowhere.invalid:30000"])
def test_a_wrong_url_is_named(url: str) -> None:
    with pytest.raises(EngineError, match="correct the URL"):
        check_server(url)


def find_with(folder: Path, **sglang: Any) -> fleet.Fleet:
    run = {"model": {"path": folder}, "train": {"run_dir": folder / "run"}, "sglang": sglang}
    config = RunConfig.model_validate(run)
    with mesh.world(config.parallel):
        return find_or_start_servers(config.sglang, config.model, run_dir=config.train.run_dir, seed=0)


@pytest.mark.parametrize("settings", [{"weight_sync": "tensor"}, {"transport": "file"}], ids=str)
def test_a_server_of_another_host_cannot_use_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Such a server would end when it opens shared memory that does not exist on its host."""
    with FakeServer(lambda path, body: (200, READY)) as server:
        find_with(tmp_path, urls=[server.url], **settings)
        monkeypatch.setattr(fleet, "is_on_this_host", lambda url: False)
        with pytest.raises(UserError, match=f"sglang.urls: {server.url} is not on "):
            find_with(tmp_path, urls=[server.url], **settings)


def test_a_server_of_another_host_does_not_release_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = READY | {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    with FakeServer(lambda path, body: (200, info)) as server:
        assert find_with(tmp_path, urls=[server.url]).releasing == (server.url,)
        monkeypatch.setattr(fleet, "is_on_this_host", lambda url: False)
        assert find_with(tmp_path, urls=[server.url]).releasing == ()
