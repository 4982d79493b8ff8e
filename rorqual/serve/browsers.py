"""A server without keys and the browsers of those who can reach it.

Any web page can have its reader's browser send requests to an address that only the reader can reach. What a page of
another origin sends is refused, and so is a request to a name that isn't the server's: a page can point its own name at
this machine and would then count as of the same origin. With keys none of this is needed: no page knows one.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.serve.errors import Refusal

PROBES = ("/health", "/ready")
"""Routes that tell nothing and cost nothing: whoever probes them may call the server anything."""


class Guard:
    """Refuses with 403 what browsers send for pages of others. `cors`: origins that may call; `hosts`: names by which
    the server may be called besides IP addresses, localhost and the machine's own name (a
    proxy may call it by its address: pages under such a name may then call it all the same)."""

    def __init__(self, cors: Iterable[str], hosts: Iterable[str]) -> None:
        self.cors = {origin.rstrip("/").lower() for origin in cors}
        self.named = {host.lower() for host in hosts}
        self.hosts = {"localhost", socket.gethostname().lower()}

    def check(self, request: Request) -> None:
        """Raises Refusal."""
        host = request.headers.get("host", "").lower()
        if host and not self._ours(_name("//" + host)) and request.url.path not in PROBES:
            told = f"this server is not called {host!r:.100}: use its address, or start it with --allow-host"
            raise Refusal(403, told, code="foreign_host")
        origin = request.headers.get("origin", "").lower()
        if not origin:
            return
        known = "*" in self.cors or origin in self.cors
        same = origin.partition("://")[2] == host or _name(origin) in self.named
        if not known and not same:
            told = f"pages of {origin!r:.100} may not call this server: start it with --cors to allow that"
            raise Refusal(403, told, code="foreign_origin")
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            told = f"a page must send application/json, not {kind!r:.100}"
            raise Refusal(415, told, code="unsupported_media_type")

    def _ours(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)  # no page has an address of ours for a name
        except ValueError:
            return name in self.hosts | self.named or name.endswith(".localhost")
        return True


def _name(url: str) -> str:
    """The host's name, without a port; "" for what is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class Guarded:
    """An application behind a guard. `refuse` makes the response to a request that the guard refuses."""

    def __init__(self, app: ASGIApp, guard: Guard, refuse: Callable[[Request, Refusal], Response]) -> None:
        self.app, self.guard, self.refuse = app, guard, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        app = self.app
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self.guard.check(request)
            except Refusal as refusal:
                app = self.refuse(request, refusal)
        await app(scope, receive, send)
