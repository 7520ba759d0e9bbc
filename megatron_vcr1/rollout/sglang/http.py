"""The HTTP interface of a server: calls with a timeout, and errors that say whether a retry can help."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

INITIAL_WEIGHTS = "default"
"""Weight version of a server that was started with weights, unless it is told another one (SGLang's own default)."""

HEALTH_TIMEOUT_S = 25.0
"""Maximum time of a health check, in which a server computes a token. SGLang's own limit is 20 s."""


# One client for all threads: creating a client takes 18 ms (it loads certificates), a call takes 1 ms. It keeps no
# connections open, because a restarted server would reset them.
_client = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


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
        ServerFault: no response in time, or status 5xx or 429.
        RequestRefused: any other status from 400 on.
    """
    try:
        response = _client.request(method, url + path, json=body, timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _connection_fault(url + path, error) from error
    return _parse(response)


async def call_async(client: httpx.AsyncClient, method: str, url: str, body: Any = None, *, timeout_s: float) -> Any:
    """Call a server as `call` does, given the whole URL. Cancelling the call closes the connection.

    SGLang aborts a request whose connection is closed.
    """
    try:
        # httpx's timeout limits each read, so a response that arrives in small pieces could take forever.
        async with asyncio.timeout(timeout_s):
            response = await client.request(method, url, json=body, timeout=None)
    except TimeoutError:
        raise ServerFault(f"{url}: no response within {timeout_s:.0f} s", unreachable=True) from None
    except httpx.HTTPError as error:
        raise _connection_fault(url, error) from error
    return _parse(response)


def _connection_fault(url: str, error: Exception) -> ServerFault:
    return ServerFault(f"{url}: {type(error).__name__} {error}".rstrip(), unreachable=True)


def _parse(response: httpx.Response) -> Any:
    """Return the content of a response. Raises ServerFault or RequestRefused for an error status."""
    if response.status_code >= 500 or response.status_code == 429:
        raise ServerFault(
            f"{response.url}: status {response.status_code}: {_error_message(response)}", unreachable=False
        )
    if response.status_code >= 400:
        raise RequestRefused(f"{response.url}: status {response.status_code}: {_error_message(response)}")
    try:
        return response.json()
    except ValueError:
        return response.text


def _error_message(response: httpx.Response) -> str:
    """Extract the explanation from an error response; SGLang's endpoints use different keys for it."""
    try:
        parsed = response.json()
        message = parsed.get("message") or parsed.get("error") or parsed.get("detail") or parsed
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = response.text
    return str(message)[:500]


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
    """Return the settings of a server. Raises ServerFault or RequestRefused."""
    return _require_key("tp_size", call(url, "GET", "/server_info", timeout_s=timeout_s), f"{url}/server_info")


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
