"""One server's HTTP interface: calls with a time-out, and errors that say whose fault they are."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

INITIAL_WEIGHTS = "default"
"""What SGLang calls the weights that a server was started with, unless told otherwise."""

LOOK_S = 25.0
"""Longest wait for a server to compute something, to show that it can; SGLang itself gives up after 20 s."""


# One for all threads: making it takes 18 ms (of certificates), a call 1 ms. It keeps no connections: a server that is
# started anew would not know them.
_client = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


class ServerFault(Exception):
    """A server did not answer, or answered that it cannot: another one may, or the same one later.

    Attributes:
        gone: it could not be reached, or went silent: whether it still lives is unknown.
    """

    def __init__(self, message: str, *, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


class RequestRefused(Exception):
    """A server says that the request itself is wrong (status 4xx): it would refuse it again."""


def call(url: str, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
    """Call a server; gives the parsed JSON of the answer, or its text.

    Raises:
        ServerFault, RequestRefused: see there.
    """
    try:
        answer = _client.request(method, url + path, json=body, timeout=timeout_s)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise fault(url + path, error) from error
    return content(answer)


async def acall(client: httpx.AsyncClient, method: str, url: str, body: Any = None, *, timeout_s: float) -> Any:
    """As `call`, asynchronously, with the whole URL; cancelling it closes the connection."""
    try:
        async with asyncio.timeout(timeout_s):  # httpx's own limits one read, and an answer may trickle
            answer = await client.request(method, url, json=body, timeout=None)
    except TimeoutError:
        raise ServerFault(f"{url}: no answer within {timeout_s:.0f} s", gone=True) from None
    except httpx.HTTPError as error:
        raise fault(url, error) from error
    return content(answer)


def fault(url: str, error: Exception) -> ServerFault:
    return ServerFault(f"{url}: {type(error).__name__} {error}".rstrip(), gone=True)


def content(answer: httpx.Response) -> Any:
    """Raises ServerFault or RequestRefused for an answer that is none."""
    if answer.status_code >= 500 or answer.status_code == 429:
        raise ServerFault(f"{answer.url}: status {answer.status_code}: {_message(answer)}", gone=False)
    if answer.status_code >= 400:
        raise RequestRefused(f"{answer.url}: status {answer.status_code}: {_message(answer)}")
    try:
        return answer.json()
    except ValueError:
        return answer.text


def _message(answer: httpx.Response) -> str:
    """The server's explanation, as short as it goes."""
    try:
        parsed = answer.json()
        message = parsed.get("message") or parsed.get("error") or parsed.get("detail") or parsed
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = answer.text
    return str(message)[:500]


def addresses(url: str) -> tuple[str, str]:
    """This host's address as a server sees it, and the server's own. Raises OSError for a host that is not known."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
        return probe.getsockname()[0], probe.getpeername()[0]


def is_here(url: str) -> bool:
    """Whether a server's host is known to be this one."""
    try:
        mine, other = addresses(url)
    except OSError:
        return False
    return mine == other or ip_address(other).is_loopback


def server_info(url: str, *, timeout_s: float) -> dict[str, Any]:
    """A server's settings. Raises ServerFault, RequestRefused."""
    return _expect("tp_size", call(url, "GET", "/server_info", timeout_s=timeout_s), f"{url}/server_info")


def weights_of(url: str, *, timeout_s: float = 15.0) -> str:
    """The version that a server gives its weights. Raises ServerFault, RequestRefused."""
    return weights_in(call(url, "GET", "/model_info", timeout_s=timeout_s), url)


def weights_in(model_info: Any, url: str) -> str:
    """The version in a server's answer to /model_info. Raises ServerFault."""
    return str(_expect("weight_version", model_info, f"{url}/model_info")["weight_version"])


def _expect(key: str, answer: Any, url: str) -> dict[str, Any]:
    if not isinstance(answer, dict) or key not in answer:
        raise ServerFault(f"{url}: an answer without {key!r}; is this an SGLang server?", gone=False)
    return answer


def is_ready(url: str, *, timeout_s: float = LOOK_S) -> bool:
    """Whether a server takes requests now: it has just computed something."""
    try:
        call(url, "GET", "/health_generate", timeout_s=timeout_s)
    except (ServerFault, RequestRefused):
        return False
    return True
