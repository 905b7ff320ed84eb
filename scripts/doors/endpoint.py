"""`outlive mcp --http`: the server over HTTP, for clients that start no programs.

Who may use it may run commands as you, so every request needs the token: `Authorization: Bearer TOKEN`.  It is what
OUTLIVE_MCP_TOKEN says, or a random one in a file that only you can read.

Always true
    It keeps no sessions of the protocol's: a bridge that was started again serves on, for clients of any revision.
    A request of a web page is refused, unless the page is of this very machine.
    Who has not shown the token holds a connection for `SILENT_MAX` seconds at most, and all together hold no more
    than `CONNECTIONS_MAX`.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import socket
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...common.client import Thread
from ...common.errors import BadRequest
from ...common.paths import Paths, private_folder
from .bridge import Bridge

PATH = "/mcp"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN_VARIABLE = "OUTLIVE_MCP_TOKEN"
# Characters: what is shorter can be guessed.
_TOKEN_MIN = 16
# Connections at once: a fraction of the descriptors that a process may usually have open.
CONNECTIONS_MAX = 256
# Seconds that a connection has for its first request.
SILENT_MAX = 10.0


def token_of(paths: Paths, environment: MutableMapping[str, str]) -> tuple[str, str]:
    """Return the token, and where it is from: the same at each start; made at the first one.

    It is taken out of `environment`: what a model starts and prints would have it otherwise.
    """
    if token := environment.pop(TOKEN_VARIABLE, None):
        if len(token) < _TOKEN_MIN or not token.isascii():
            raise BadRequest(f"{TOKEN_VARIABLE}: {len(token)} characters; use at least {_TOKEN_MIN}, of ASCII")
        return token, TOKEN_VARIABLE
    private_folder(paths.state)
    file = paths.state / "mcp-token"
    if not file.exists():
        # Complete before it has its name: another bridge may start at this moment.
        made = file.with_name(f"mcp-token-{secrets.token_hex(4)}")
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as written:
            written.write(secrets.token_urlsafe(32))
        with suppress(FileExistsError):
            os.link(made, file)
        made.unlink()
    token = file.read_text().strip()
    if len(token) < _TOKEN_MIN:
        raise BadRequest(f"file {file}: holds no token; remove it, and a new one is made")
    return token, str(file)


class Guard:
    """Lets through what has the token, and is not of a web page from elsewhere."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and _host_of(origin) not in LOOPBACK:
                refusal = f"Origin: {origin[:200]}: web pages from elsewhere are refused\n"
                answer = PlainTextResponse(refusal, 403, {"Connection": "close"})
                return await answer(scope, receive, send)
            if not hmac.compare_digest(headers.get("authorization", "").encode(), self._wanted):
                answer = PlainTextResponse(
                    "Authorization: use `Bearer TOKEN`, with the token that `outlive mcp --http` named\n",
                    401,
                    {"WWW-Authenticate": "Bearer", "Connection": "close"},
                )
                return await answer(scope, receive, send)
        await self._app(scope, receive, send)
        return None


class Connection(H11Protocol):
    """A connection that is hung up on when it asks nothing, and when it is one too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silence = self.loop.call_later(SILENT_MAX, self._hang_up)
        if len(self.connections) > CONNECTIONS_MAX:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def _hang_up(self) -> None:
        if not self.headers:  # those of the last request
            self.transport.abort()


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None


def listener_of(host: str, port: int) -> socket.socket:
    """Return a socket that takes connections at an address; raises `BadRequest` for one that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise BadRequest(f"--http {host}:{port}: {error.strerror or error}; use another address or port") from None
    # Its connections inherit it, and asyncio sets it only where a socket names its protocol.  Without, an answer's
    # body waits 40 ms for the client to acknowledge its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def server_of(app: ASGIApp, token: str) -> uvicorn.Server:
    """Return a server of `app` for those who have the token."""
    return uvicorn.Server(
        uvicorn.Config(
            Guard(app, token), http=Connection, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
    )


async def serve_http(thread: Thread, host: str, port: int, token: str, announce: Callable[[str], None]) -> None:
    """Serve until the process is ended; `announce` gets the URL once connections are taken."""
    listener = listener_of(host, port)
    bridge = Bridge(thread, standing=False)
    app = bridge.server.streamable_http_app(streamable_http_path=PATH, stateless_http=True, host=host)
    shown = f"[{host}]" if ":" in host else host
    announce(f"http://{shown}:{listener.getsockname()[1]}{PATH}")
    try:
        await server_of(app, token).serve([listener])
    finally:
        await bridge.close()
        listener.close()
