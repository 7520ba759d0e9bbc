"""The HTTP interface of a server: calls with a timeout, and errors that say whether a retry can help."""

from __future__ import annotations

import asyncio
import socket
import time
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import parse_json

INITIAL_WEIGHTS = "default"
"""Weight version of a server that was started with weights, unless it is told another one (SGLang's own default)."""

HEALTH_TIMEOUT_S = 25.0
"""Maximum time of a health check, in which a server computes a token. SGLang's own limit is 20 s."""

MAX_RESPONSE_BYTES = 2**30
"""Largest response of a server. A group of 64 responses of 32k tokens with log-probs takes about 200 MB."""
MAX_SERVER_RANKS = 4096
"""Largest size that a server may report for its parallelism."""

# No connection is used twice. A restarted server would reset it, and SGLang closes an idle one after 5 s: a request at
# that moment would be lost, and the server would be taken for dead.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
# One client for all threads: creating a client takes 18 ms (it loads certificates), a call takes 1 ms.
_client = httpx.Client(trust_env=False, limits=_LIMITS)


class ServerFault(Exception):
    """A server did not respond, or reported an error of its own. Another server, or a later request, may succeed.

    Attributes:
        unreachable: no connection, or no response in time: it is not known whether the server is still alive.
    """

    def __init__(self, message: str, *, unreachable: bool) -> None:
        super().__init__(message)
        self.unreachable = unreachable


class RequestRefused(Exception):
    """A server says that the request itself is wrong (status 4xx), so a retry would fail in the same way."""


def call(url: str, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
    """Call a server and return the parsed JSON of its response, or the text if it is not JSON.

    Raises:
        ServerFault: no response in time, or status 5xx or 429, or a response of more than `MAX_RESPONSE_BYTES`.
        RequestRefused: any other status from 400 on.
    """
    url += path
    content = bytearray()
    deadline = time.monotonic() + timeout_s
    try:
        with _client.stream(method, url, json=body, timeout=timeout_s) as response:
            for chunk in response.iter_bytes():
                _append(content, chunk, url)
                # httpx's timeout limits each read, so a response that arrives in small pieces could take forever.
                if time.monotonic() > deadline:
                    raise _timeout_fault(url, timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _connection_fault(url, error) from error
    return _parse(url, response.status_code, bytes(content))


def async_client() -> httpx.AsyncClient:
    """Return a client for `call_async`. It belongs to one event loop, and is to be closed there."""
    return httpx.AsyncClient(trust_env=False, limits=_LIMITS)


async def call_async(client: httpx.AsyncClient, method: str, url: str, body: Any = None, *, timeout_s: float) -> Any:
    """Call a server as `call` does, given the whole URL. Cancelling the call closes the connection.

    SGLang aborts a request whose connection is closed.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(timeout_s), client.stream(method, url, json=body, timeout=None) as response:
            async for chunk in response.aiter_bytes():
                _append(content, chunk, url)
    except TimeoutError:
        raise _timeout_fault(url, timeout_s) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _connection_fault(url, error) from error
    return _parse(url, response.status_code, bytes(content))


def _append(content: bytearray, chunk: bytes, url: str) -> None:
    content += chunk
    if len(content) > MAX_RESPONSE_BYTES:
        raise ServerFault(f"{url}: the response has more than {MAX_RESPONSE_BYTES} bytes", unreachable=False)


def _timeout_fault(url: str, timeout_s: float) -> ServerFault:
    return ServerFault(f"{url}: no response within {timeout_s:.0f} s", unreachable=True)


def _connection_fault(url: str, error: Exception) -> ServerFault:
    return ServerFault(f"{url}: {type(error).__name__} {error}".rstrip(), unreachable=True)


def _parse(url: str, status: int, content: bytes) -> Any:
    """Return the content of a response. Raises ServerFault or RequestRefused for an error status."""
    try:
        parsed = parse_json(content, url)
    except UserError:  # not JSON, or nested too deeply to be one of SGLang's
        parsed = content.decode(errors="replace")
    if status >= 500 or status == 429:
        raise ServerFault(f"{url}: status {status}: {_error_message(parsed)}", unreachable=False)
    if status >= 400:
        raise RequestRefused(f"{url}: status {status}: {_error_message(parsed)}")
    return parsed


def _error_message(parsed: Any) -> str:
    """Extract the explanation from an error response; SGLang's endpoints use different keys for it."""
    if isinstance(parsed, dict):
        parsed = parsed.get("message") or parsed.get("error") or parsed.get("detail") or parsed
    if isinstance(parsed, dict):
        parsed = parsed.get("message", parsed)
    return str(parsed)[:500]


def addresses(url: str) -> tuple[str, str]:
    """Return the IP address of this host as a server sees it, and the IP address of the server.

    Raises:
        OSError: the host name is unknown.
    """
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # a UDP connect sends no packet
        return probe.getsockname()[0], probe.getpeername()[0]


def is_on_this_host(url: str) -> bool:
    """Return whether a server is known to run on this host."""
    try:
        own_address, server_address = addresses(url)
    except OSError:
        return False
    return own_address == server_address or ip_address(server_address).is_loopback


def server_info(url: str, *, timeout_s: float) -> dict[str, Any]:
    """Return the settings of a server, of which the sizes of its parallelism are integers that make sense.

    Raises:
        ServerFault, RequestRefused: the call failed, or the response is not an SGLang server's.
    """
    info = _require_key("tp_size", call(url, "GET", "/server_info", timeout_s=timeout_s), f"{url}/server_info")
    for key in ("tp_size", "dp_size", "pp_size"):
        value = info.get(key, 1)
        if type(value) is not int or not 1 <= value <= MAX_SERVER_RANKS:
            raise ServerFault(
                f"{url}/server_info: {key!r} is {str(value)[:50]!r}; is this an SGLang server?", unreachable=False
            )
    return info


def weight_version(url: str, *, timeout_s: float = 15.0) -> str:
    """Return the version of a server's weights. Raises ServerFault or RequestRefused."""
    return parse_weight_version(call(url, "GET", "/model_info", timeout_s=timeout_s), url)


def parse_weight_version(model_info: Any, url: str) -> str:
    """Return the weight version from a server's response to /model_info. Raises ServerFault."""
    return str(_require_key("weight_version", model_info, f"{url}/model_info")["weight_version"])


def _require_key(key: str, response: Any, url: str) -> dict[str, Any]:
    if not isinstance(response, dict) or key not in response:
        raise ServerFault(f"{url}: the response has no {key!r}; is this an SGLang server?", unreachable=False)
    return response


def is_ready(url: str, *, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
    """Return whether a server can take requests; it has to compute a token to prove it."""
    try:
        call(url, "GET", "/health_generate", timeout_s=timeout_s)
    except (ServerFault, RequestRefused):
        return False
    return True
