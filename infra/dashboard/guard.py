"""Who may read the dashboard: the outer ASGI layer, before any route.

A run's store holds what the policy wrote, and the answers of its tasks. So:

- A page of another site must not read it through the visitor's browser: the Host header must be ours (DNS rebinding).
- On loopback, whoever is on the machine may read; anywhere else a token is asked for, compared in constant time. The first
  link carries it (`?token=...`) and is answered with a cookie and the same link without it.
- The page runs its own scripts alone: the Content-Security-Policy allows no inline and no foreign script, style, picture or frame.
- Only GET and HEAD are answered: nothing here changes anything.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Answers what may not pass; everything else goes to `app`, and its answers get HEADERS."""

    def __init__(self, app: ASGIApp, *, host: str, port: int, token: str = "") -> None:
        if not is_loopback(host) and not token:
            raise ValueError(f"{host} is not loopback: others could read the run; give a token with --token or POLYRL_DASHBOARD_TOKEN")
        self._app, self._token = app, token
        self._names = set(LOOPBACK_NAMES) if is_loopback(host) else {*LOOPBACK_NAMES, host, socket.gethostname(), socket.getfqdn()}
        self._any_address = not is_loopback(host)
        self._cookie = f"polyrl-{port}"  # cookies do not tell ports apart
        self._pass = hmac.new(token.encode(), b"polyrl dashboard cookie", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refuse(scope)
        await (self._app if refusal is None else refusal)(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        """What to answer instead of the app; None to let the request pass."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return PlainTextResponse("This is not the dashboard's host name; open the link that `polyrl dashboard` printed.\n", 421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The dashboard only reads: GET or HEAD.\n", 405, headers={"Allow": "GET, HEAD"})
        if not self._token:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        offered = [value for name, value in query if name == "token"]
        if offered and _same(offered[0], self._token):
            return self._admit(scope["path"], [(name, value) for name, value in query if name != "token"])
        if _same(_bearer(headers), self._token) or _same(_cookie(headers.getlist("cookie"), self._cookie), self._pass):
            return None
        wrong = "That token is wrong." if offered else "A token is needed."
        return PlainTextResponse(f"{wrong} Open the link that `polyrl dashboard` printed; it carries the token.\n", 401)

    def _is_ours(self, host: str) -> bool:
        """A DNS name of an attacker may point at us; an address in digits cannot be one."""
        name = _without_port(host)
        if name in self._names:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _admit(self, path: str, query: list[tuple[str, str]]) -> Response:
        """The same link without its token, and a cookie."""
        path = "/" + path.lstrip("/\\")  # "//elsewhere" would be another host
        response = Response(status_code=303, headers={"Location": path + (f"?{urlencode(query)}" if query else "")})
        # Not "strict": a browser would not send it with this very redirect, if the link was clicked in a chat or a mail.
        response.set_cookie(self._cookie, self._pass, httponly=True, samesite="lax", path="/")
        return response


def _same(offered: str, wanted: str) -> bool:
    """In constant time, for any text."""
    return hmac.compare_digest(offered.encode("utf-8", "surrogatepass"), wanted.encode("utf-8", "surrogatepass"))


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _bearer(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value if scheme.lower() == "bearer" else ""


def _cookie(headers: Iterable[str], name: str) -> str:
    for header in headers:
        try:
            morsel = SimpleCookie(header).get(name)
        except CookieError:
            continue
        if morsel is not None:
            return morsel.value
    return ""


__all__ = ["HEADERS", "Guard", "is_loopback"]
