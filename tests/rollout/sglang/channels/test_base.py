"""Tests of the calls that open and close a weight update."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vcr1.rollout.sglang.channels.base import open_weight_update
from megatron_vcr1.rollout.sglang.http import RequestRefused
from tests.rollout.sglang.fake_server import FakeServer, Reply


class UpdatingServer:
    """A server that refuses to begin an update while another one is open."""

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/begin_weight_update" and self.is_open:
            return 400, {"message": "an update is open"}
        self.is_open = path == "/begin_weight_update"
        return 200, {}


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "left open"])
def test_an_update_that_was_interrupted_is_closed_first(is_open: bool) -> None:
    with FakeServer(UpdatingServer(is_open)) as server:
        open_weight_update(server.url, 5)
        assert server.count("/end_weight_update") == is_open


def test_a_server_that_refuses_twice_is_an_error() -> None:
    with (
        FakeServer(lambda path, body: (400 if path == "/begin_weight_update" else 200, {})) as server,
        pytest.raises(RequestRefused),
    ):
        open_weight_update(server.url, 5)
