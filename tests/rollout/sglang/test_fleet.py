"""Servers that the settings name: which of them would do, and for what."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import EngineError
from megatron_vcr1.rollout.sglang import fleet
from megatron_vcr1.rollout.sglang.fleet import check_server, find_or_start_servers
from megatron_vcr1.rollout.sglang.http import is_here
from tests.rollout.sglang.fake_server import FakeServer
from tests.rollout.sglang.test_loan import Lender, loan_of

READY = {"tp_size": 1, "weight_version": "default"}


@pytest.mark.parametrize("saver", [True, False])
@pytest.mark.parametrize("backup", [True, False])
def test_only_a_server_that_keeps_its_weights_lends_its_memory(saver: bool, backup: bool) -> None:
    info = {"enable_memory_saver": saver, "enable_weights_cpu_backup": backup}
    with FakeServer(lambda path, body: (200, READY | info)) as server:
        assert check_server(server.url) == (saver and backup)


@pytest.mark.parametrize("is_lent", [True, False], ids=["lent", "paused for an update"])
def test_a_run_takes_back_what_a_killed_one_left(is_lent: bool) -> None:
    lender = Lender()
    with FakeServer(lender) as server:
        if is_lent:
            loan_of(server).lend()
        lender.is_paused = True
        check_server(server.url)
        assert (lender.is_lent, lender.is_paused, lender.has_ended) == (False, False, False)
        assert lender.version == "3@run"


@pytest.mark.parametrize("info", [{"enable_deterministic_inference": True}, {"dp_size": 2}, {"pp_size": 2}], ids=str)
def test_a_server_that_would_not_do_is_refused(info: dict[str, Any]) -> None:
    with (
        FakeServer(lambda path, body: (200, READY | info)) as server,
        pytest.raises(UserError, match="start it without"),
    ):
        check_server(server.url)


@pytest.mark.parametrize("url", ["http://[", "localhost:30000", "http://nowhere.invalid:30000"])
def test_what_is_no_address_of_a_server_is_named(url: str) -> None:
    with pytest.raises(EngineError, match="correct the URL"):
        check_server(url)


def test_this_host_is_known_by_all_of_its_addresses() -> None:
    mine = [one.address for some in psutil.net_if_addrs().values() for one in some if one.family == socket.AF_INET]
    assert all(is_here(f"http://{host}:30000") for host in ("127.0.1.1", "localhost", *mine))
    assert not any(is_here(f"http://{host}:30000") for host in ("192.0.2.1", "nowhere.invalid"))


def muster_with(folder: Path, **sglang: Any) -> fleet.Fleet:
    run = {"model": {"path": folder}, "train": {"run_dir": folder / "run"}, "sglang": sglang}
    config = RunConfig.model_validate(run)
    with mesh.world(config.parallel):
        return find_or_start_servers(config)


@pytest.mark.parametrize("settings", [{"weight_sync": "tensor"}, {"transport": "file"}], ids=str)
def test_a_server_of_another_host_is_sent_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """It would end when it is to open what is not there."""
    with FakeServer(lambda path, body: (200, READY)) as server:
        muster_with(tmp_path, urls=[server.url], **settings)
        monkeypatch.setattr(fleet, "is_here", lambda url: False)
        with pytest.raises(UserError, match=f"sglang.urls: {server.url} is not on "):
            muster_with(tmp_path, urls=[server.url], **settings)


def test_a_server_of_another_host_has_no_memory_for_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = READY | {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    with FakeServer(lambda path, body: (200, info)) as server:
        assert muster_with(tmp_path, urls=[server.url]).lenders == (server.url,)
        monkeypatch.setattr(fleet, "is_here", lambda url: False)
        assert muster_with(tmp_path, urls=[server.url]).lenders == ()
