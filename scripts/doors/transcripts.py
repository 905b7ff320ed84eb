"""Transcripts as resources of the Model Context Protocol: `outlive://THREAD/ID`, the output of one session.

A client that has subscribed to one is told when there is more of it, at most once a second, and at its end.  Since
2026-07-28 a subscription is a request of its own (`subscriptions/listen`); before, it is a state of the connection,
which only standard input and output have here.

Always true
    Reading takes nothing from what the agent is still to get.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, ResourcesListChanged, ResourceUpdated
from mcp.shared.exceptions import MCPError

from ...common.client import FOLLOW_MS, Thread, to_builtins
from ...common.errors import ExpiredProcess, OutliveError, UnknownProcess, UnknownThread
from ...common.messages import OFFSET_MAX
from ...common.names import check_process
from .catalogue import gap_text, in_order

# Seconds between two notices about one transcript: a flood is no reason for a flood of them.
UPDATE_PAUSE = 1.0
# Seconds that a client may wait until it is told that it listens, as long as for a call.
_BEGUN_WITHIN = 40.0
_MIME = "text/plain"

Context = ServerRequestContext[Any, Any]


class Transcripts:
    """The transcripts of one thread."""

    def __init__(self, thread: Thread) -> None:
        self._thread = thread
        self._root = f"outlive://{thread.thread_id}/"
        self._followers: dict[str, asyncio.Task[None]] = {}

    async def list(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListResourcesResult:
        """Answer `resources/list`: all sessions, also those that have ended."""
        try:
            rows = await self._thread.processes(ended=True)
        except UnknownThread:
            rows = []
        return types.ListResourcesResult(
            resources=[
                types.Resource(
                    uri=self._root + row.process_id,
                    name=f"session {row.process_id}",
                    title=str(to_builtins(shlex.join(row.command)))[:200],
                    description=f"The output of session {row.process_id}, {row.state}.",
                    mime_type=_MIME,
                    size=row.bytes_written,
                )
                for row in rows
            ]
        )

    async def templates(
        self, ctx: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        """Answer `resources/templates/list`."""
        template = types.ResourceTemplate(
            uri_template=self._root + "{session_id}",
            name="output",
            title="Output of a session",
            description="All that is kept of the output of a session; what is not is marked where it was.",
            mime_type=_MIME,
        )
        return types.ListResourceTemplatesResult(resource_templates=[template])

    async def read(self, ctx: Context, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        """Answer `resources/read`."""
        process_id, parts, offset = self._process_of(params.uri), list[bytes](), 0
        with _told(params.uri):
            end = (await self._thread.read_output(process_id, OFFSET_MAX)).written  # it may never stop growing
            while True:
                output = await self._thread.read_output(process_id, offset)
                for at, part in in_order(output):
                    parts.append(part if isinstance(part, bytes) else gap_text(at, part).encode())
                if output.next_offset >= end or output.next_offset == offset:
                    break
                offset = output.next_offset
        text = b"".join(parts).decode("utf-8", "replace")
        contents = types.TextResourceContents(uri=params.uri, mime_type=_MIME, text=text)
        return types.ReadResourceResult(contents=[contents])

    async def listen(
        self, ctx: Context, params: types.SubscriptionsListenRequestParams
    ) -> types.SubscriptionsListenResult:
        """Answer `subscriptions/listen`, for as long as the client listens."""
        bus = InMemorySubscriptionBus()
        wanted = params.notifications
        # From before the client is told that it listens: what it reads then, and what comes after, is all there is.
        ends: dict[str, int] = {}
        try:
            async with asyncio.timeout(_BEGUN_WITHIN):
                for uri in wanted.resource_subscriptions or ():
                    # What is no session has no news.
                    with _told(uri), suppress(MCPError, UnknownProcess, UnknownThread, ExpiredProcess):
                        ends[uri] = (await self._thread.read_output(self._process_of(uri), OFFSET_MAX)).written
        except TimeoutError:
            raise MCPError(types.INTERNAL_ERROR, f"no answer within {_BEGUN_WITHIN:g} s; listen again") from None
        following = [
            asyncio.create_task(self._follow(uri, end, lambda uri: bus.publish(ResourceUpdated(uri))))
            for uri, end in ends.items()
        ]
        if wanted.resources_list_changed:
            following.append(asyncio.create_task(self._follow_list(bus)))
        try:
            return await ListenHandler(bus)(ctx, params)
        finally:
            for task in following:
                task.cancel()

    async def subscribe(self, ctx: Context, params: types.SubscribeRequestParams) -> types.EmptyResult:
        """Answer `resources/subscribe`, of clients before 2026-07-28."""
        with _told(params.uri):
            output = await self._thread.read_output(self._process_of(params.uri), OFFSET_MAX)
        self._forget(params.uri)
        follower = asyncio.create_task(self._follow(params.uri, output.written, ctx.session.send_resource_updated))
        self._followers[params.uri] = follower
        return types.EmptyResult()

    async def unsubscribe(self, ctx: Context, params: types.UnsubscribeRequestParams) -> types.EmptyResult:
        """Answer `resources/unsubscribe`."""
        self._forget(params.uri)
        return types.EmptyResult()

    def close(self) -> None:
        """Follow nothing any more."""
        for uri in list(self._followers):
            self._forget(uri)

    def _forget(self, uri: str) -> None:
        if follower := self._followers.pop(uri, None):
            follower.cancel()

    async def _follow(self, uri: str, end: int, tell: Callable[[str], Awaitable[None]]) -> None:
        """Tell whenever there is more of a transcript than `end`, until it is complete."""
        process_id = self._process_of(uri)
        with suppress(OutliveError):
            while True:
                output = await self._thread.read_output(process_id, end, wait_ms=FOLLOW_MS)
                if output.written > end or output.ended:
                    await tell(uri)
                if output.ended and output.next_offset >= output.written:
                    return
                end = output.written
                await asyncio.sleep(UPDATE_PAUSE)

    async def _follow_list(self, bus: InMemorySubscriptionBus) -> None:
        """Tell whenever a session of this thread begins or ends."""
        with suppress(OutliveError):
            async for event in self._events():
                if event["thread"] == self._thread.thread_id and event["event"] in ("begin", "end"):
                    await bus.publish(ResourcesListChanged())

    def _events(self) -> AsyncIterator[dict[str, Any]]:
        return self._thread.host.events()

    def _process_of(self, uri: str) -> str:
        root, process_id = uri[: len(self._root)], uri[len(self._root) :]
        if root == self._root:
            with suppress(OutliveError):
                return check_process(process_id)
        raise MCPError(types.INVALID_PARAMS, f"uri: {uri[:200]!r}: use {self._root}ID, with the id of a session")


class _told:
    """Turns errors of ours into those of the protocol."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OutliveError):
            raise MCPError(types.INVALID_PARAMS, f"uri: {self._uri[:200]!r}: {error}") from None
