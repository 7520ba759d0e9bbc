from __future__ import annotations

import json

import pytest

from megatron_vcr1.serving.hosts import allowed_hosts
from tests.serving.requests import ServerProcess, post

pytestmark = pytest.mark.xdist_group("serving")  # one worker, one server

BODY = json.dumps({"messages": [{"role": "user", "content": "when?"}], "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "PROXY.example"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost:evil.example"}, 421),
        ({"Host": "[::1]evil.example"}, 421),
        ({"Host": "localhost,evil.example"}, 421),
        ({"Host": "evil.example@localhost"}, 421),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://proxy.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 421),
    ],
)
def test_other_hosts_and_web_pages_are_refused(server: ServerProcess, headers: dict[str, str], status: int) -> None:
    found, body = post(server.url, BODY, headers)
    assert found == status, body
    if status != 200:
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "host, extra, allowed",
    [
        ("127.0.0.1", (), {"localhost", "127.0.0.1", "::1"}),
        ("localhost", ("Box",), {"localhost", "127.0.0.1", "::1", "box"}),
        ("127.0.0.2", (), {"localhost", "127.0.0.1", "::1", "127.0.0.2"}),
        ("0.0.0.0", (), None),
        ("0.0.0.0", ("box",), {"localhost", "127.0.0.1", "::1", "0.0.0.0", "box"}),
        ("box.example", (), None),
    ],
)
def test_allowed_hosts_depend_on_the_address(host: str, extra: tuple[str, ...], allowed: set[str] | None) -> None:
    assert allowed_hosts(host, extra) == allowed
