"""Who is let through to the server over HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from starlette.responses import PlainTextResponse

from outlive.common.errors import BadRequest
from outlive.common.paths import Paths
from outlive.scripts.doors import endpoint
from outlive.scripts.doors.endpoint import Guard, listener_of, server_of, token_of

RIGHT = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "secret"}, 401),
        ({"Authorization": "Bearer sécret".encode()}, 401),
        (RIGHT, 200),
        ({**RIGHT, "Origin": "https://example.com"}, 403),
        ({**RIGHT, "Origin": "https://localhost.example.com"}, 403),
        ({**RIGHT, "Origin": "null"}, 403),
        ({**RIGHT, "Origin": "http://[::"}, 403),
        ({**RIGHT, "Origin": "http://localhost:3000"}, 200),
        ({**RIGHT, "Origin": "http://[::1]:3000"}, 200),
    ],
)
async def test_only_who_has_the_token_and_is_no_page_from_elsewhere_is_let_through(
    headers: dict[str, str | bytes], status: int
) -> None:
    transport = httpx2.ASGITransport(app=Guard(PlainTextResponse("inside"), "secret"))
    async with httpx2.AsyncClient(transport=transport, base_url="http://any") as web:
        answer = await web.post("/mcp", headers=headers)
        assert answer.status_code == status
        assert (answer.text == "inside") == (status == 200)


def test_the_token_is_made_once_for_you_alone(tmp_path: Path) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path / "h")})
    token, source = token_of(paths, {})
    assert len(token) >= 40
    assert Path(source).stat().st_mode & 0o777 == 0o600
    assert token_of(paths, {}) == (token, source)
    assert [path.name for path in paths.state.iterdir()] == ["mcp-token"]
    Path(source).write_text("")
    with pytest.raises(BadRequest, match="holds no token; remove it, and a new one is made"):
        token_of(paths, {})


def test_a_token_that_can_be_guessed_is_refused(tmp_path: Path) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)})
    environment = {"OUTLIVE_MCP_TOKEN": "x" * 16}
    assert token_of(paths, environment) == ("x" * 16, "OUTLIVE_MCP_TOKEN")
    assert environment == {}
    with pytest.raises(BadRequest, match="OUTLIVE_MCP_TOKEN: 5 characters; use at least 16, of ASCII"):
        token_of(paths, {"OUTLIVE_MCP_TOKEN": "short"})


def test_a_connection_sends_the_parts_of_an_answer_without_waiting_between_them() -> None:
    with listener_of("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """Serve somebody who says "inside" to who has the token; yield the port."""
    with listener_of("127.0.0.1", 0) as listener:
        server = server_of(PlainTextResponse("inside"), "secret")
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


HEAD = b"GET /mcp HTTP/1.1\r\nHost: any\r\n"


@pytest.mark.parametrize("said", [b"", HEAD])
async def test_who_asks_nothing_is_hung_up_on(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "SILENT_MAX", 0.01)
    async with served() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        assert await reader.read() == b""
        writer.close()


async def test_who_has_not_shown_the_token_is_answered_and_hung_up_on() -> None:
    async with served() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 401")
        writer.close()


async def test_one_connection_too_many_is_hung_up_on_and_the_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "CONNECTIONS_MAX", 2)
    async with served() as port:
        others = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        for reader, writer in others:
            writer.write(HEAD + b"Authorization: Bearer secret\r\n\r\n")
            assert await reader.readuntil(b"inside")
            writer.close()
