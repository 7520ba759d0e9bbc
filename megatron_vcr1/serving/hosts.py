"""Checks which host names and web pages may use the server.

A web page that a user visits can resolve its own host name to 127.0.0.1 and then talk to a server on that machine (DNS
rebinding). Browsers send the page's host name in the Host and Origin headers, which is how such requests are refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_vcr1.serving.responses import error_body

_HOST_AND_PORT = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:@,/\[\]]+))(:[0-9]*)?")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def allowed_hosts(host: str, extra: Sequence[str]) -> frozenset[str] | None:
    """Return the host names that clients may use; None allows every name.

    Args:
        host: the address that the server listens on. On loopback, only names of this machine are allowed. Other
            addresses are reachable under names that the server cannot know, so every name is allowed unless `extra`
            lists them.
        extra: further allowed names.
    """
    if not extra and not _is_loopback(host):
        return None
    return frozenset(name.lower() for name in (*_LOOPBACK_NAMES, host, *extra))


class HostCheck:
    """ASGI middleware that refuses requests to other host names (421) and requests of other web pages (403).

    It also refuses requests with two lengths, Content-Length and Transfer-Encoding (400): HTTP allows them, but a proxy
    in front of the server may believe the other one, and take the rest of the body for another client's request.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if "content-length" in headers and "transfer-encoding" in headers:
                message = "Content-Length and Transfer-Encoding exclude each other; send one of them"
                await JSONResponse(error_body(message, 400), 400, {"Connection": "close"})(scope, receive, send)
                return
            host = _host_name(headers.get("host", ""))
            if self._allowed is not None and host not in self._allowed:
                message = (
                    f"Host {headers.get('host', '')[:100]!r} is not a name of this server; allow it with --allowed-host"
                )
                await JSONResponse(error_body(message, 421), 421)(scope, receive, send)
                return
            for origin in headers.getlist("origin"):
                if not self._may_use(_host_name(_netloc(origin)), host):
                    message = f"Origin {origin[:100]!r}: web pages of other hosts may not use this server"
                    await JSONResponse(error_body(message, 403), 403)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _may_use(self, origin: str, host: str) -> bool:
        return origin == host if self._allowed is None else origin in self._allowed


def _netloc(url: str) -> str:
    """Return the host and port of a URL; an empty string if it has none, as the origin "null"."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def _host_name(netloc: str) -> str:
    """Remove the port and the brackets of an IPv6 address; an empty string for what is not a host and a port."""
    match = _HOST_AND_PORT.fullmatch(netloc)
    return (match["address"] or match["name"]).lower() if match else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
