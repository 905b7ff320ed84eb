"""Clients of the Model Context Protocol for the tests: the official one, over standard input and output, and HTTP.

`mode` is the client's: `auto` speaks the newest revision, `legacy` the one before.
"""

from __future__ import annotations

import asyncio
import json
import os
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent

OUTLIVE = str(Path(sysconfig.get_path("scripts")) / "outlive")
TOKEN = "a token that nobody guesses"
NEWEST, BEFORE = "2026-07-28", "2025-11-25"
MODES = {NEWEST: "auto", BEFORE: "legacy"}


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a bridge."""
    return {**os.environ, "OUTLIVE_HOME": str(home), "HOME": str(home), "SHELL": "/bin/sh"}


def over_stdio(home: Path, *words: str, mode: str = "auto", **settings: Any) -> Client:
    """Return a client that starts a bridge of its own."""
    server = StdioServerParameters(
        command=OUTLIVE, args=["mcp", *words], env=environment(home), cwd=settings.pop("cwd", None)
    )
    return Client(server, mode=mode, **settings)


class Endpoint:
    """A bridge that serves over HTTP, and may be killed and started again at the same address."""

    def __init__(self, home: Path, thread: str) -> None:
        self._home, self._thread = home, thread
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self) -> None:
        """Start it, and wait until it takes connections."""
        address = self.url.removeprefix("http://").removesuffix("/mcp") or "127.0.0.1:0"
        self._process = await asyncio.create_subprocess_exec(
            *(OUTLIVE, "mcp", "--json", "-t", self._thread, "--http", address),
            stdout=asyncio.subprocess.PIPE,
            env={**environment(self._home), "OUTLIVE_MCP_TOKEN": TOKEN},
        )
        assert self._process.stdout is not None
        self.url = json.loads(await self._process.stdout.readline())["url"]

    async def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()

    @asynccontextmanager
    async def client(self, mode: str = "auto", **settings: Any) -> AsyncIterator[Client]:
        """Give a client that is connected to it."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
            transport = streamable_http_client(self.url, http_client=http)
            async with Client(transport, mode=mode, **settings) as client:
                yield client


@asynccontextmanager
async def an_endpoint(home: Path, thread: str) -> AsyncIterator[Endpoint]:
    """Give a bridge over HTTP, ended afterwards."""
    endpoint = Endpoint(home, thread)
    await endpoint.start()
    try:
        yield endpoint
    finally:
        await endpoint.kill()


@asynccontextmanager
async def connected(home: Path, transport: str, revision: str, thread: str = "agent") -> AsyncIterator[Client]:
    """Give a client that is connected over `stdio` or `http`, and speaks this revision."""
    if transport == "stdio":
        async with over_stdio(home, "-t", thread, mode=MODES[revision]) as client:
            assert client.protocol_version == revision
            yield client
        return
    async with an_endpoint(home, thread) as endpoint, endpoint.client(MODES[revision]) as client:
        assert client.protocol_version == revision
        yield client


def text_of(result: CallToolResult) -> str:
    """Return what a model sees of a result."""
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def called(client: Client, name: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool that has to succeed, and return its structured result."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error, text_of(result)
    structured = result.structured_content
    assert isinstance(structured, dict)
    return structured


async def refused(client: Client, name: str, **arguments: Any) -> str:
    """Call a tool that has to refuse, and return what it says."""
    result = await client.call_tool(name, arguments)
    assert result.is_error, text_of(result)
    return text_of(result)
