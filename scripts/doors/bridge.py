"""`outlive mcp`: the tools as a server of the Model Context Protocol, a thin bridge to the broker.

Always true
    The bridge has nothing that its death could lose: sessions are the broker's, the id of a task says what it is,
    and a bridge that is started again finds all of it.
    No call is silent for longer than `SILENCE_MAX`: what takes longer answers with what there is, or sends progress
    to a client that asked for it.  A call that is cancelled ends no session; a line that is no message is answered.
    It is there at once: the broker is looked for, and started, by the first call that needs it.

Not here
    The tools: `catalogue`.  Over HTTP: `endpoint`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import mcp_types as types
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from ... import __version__
from ...common.client import Thread
from ...common.errors import OutliveError
from ..screen import Screens
from .catalogue import TOOLS, Terms, call
from .tasks import EXTENSION, TaskParams, Tasks
from .transcripts import Transcripts

# Seconds that a call may be silent; many clients give one up after 60.
SILENCE_MAX = 45.0
# Seconds that a call without progress may wait by itself: it has to be over before that.
LONGEST = 40.0
# Seconds between two notices of progress.
PROGRESS_PAUSE = 2.0

INSTRUCTIONS = """\
Runs shell commands in sessions that outlive everybody: this server, the client, the conversation. A session keeps
its session_id, its output and its exit code; when you come back, list_sessions names what is there. Start with
exec_command. What still runs when it answers has a session_id: type into it or poll it with write_stdin, wait for
its end with wait, read its output again with read_output, see a full-screen program with screen, end it with
terminate_session. Nothing is ever run twice, and nothing ends because you did not look after it.
"""

Context = ServerRequestContext[Any, Any]


class Bridge:
    """The tools and transcripts of one thread.

    `standing`: whether there is one connection that lasts, so that a client before 2026-07-28 can be sent notices.
    """

    def __init__(self, thread: Thread, *, standing: bool = True) -> None:
        self._thread = thread
        self._tasks = Tasks(lambda arguments: self._result("wait", arguments, None))
        self._transcripts = transcripts = Transcripts(thread)
        self._screens = Screens()
        self.server: Server[Any] = Server(
            "outlive",
            version=__version__,
            title="outlive",
            description="Shell sessions that outlive their agents",
            instructions=INSTRUCTIONS,
            get_tool_input_schema=lambda name: None,
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,  # type: ignore[arg-type]  # a task is no result of the core protocol
            on_list_resources=transcripts.list,
            on_list_resource_templates=transcripts.templates,
            on_read_resource=transcripts.read,
            on_subscribe_resource=transcripts.subscribe if standing else None,
            on_unsubscribe_resource=transcripts.unsubscribe if standing else None,
            on_subscriptions_listen=transcripts.listen,
        )
        self.server.middleware.append(_bounded)
        self.server.extensions[EXTENSION] = {}
        for method, handler in (
            ("tasks/get", self._tasks.get),
            ("tasks/update", self._tasks.update),
            ("tasks/cancel", self._tasks.cancel),
        ):
            self.server.add_request_handler(method, TaskParams, handler)

    async def close(self) -> None:
        """Wait for nothing, and follow nothing, any more."""
        self._tasks.close()
        self._transcripts.close()
        await self._screens.__aexit__()

    async def _list_tools(self, ctx: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[types.Tool.model_validate(tool.to_builtins()) for tool in TOOLS.values()]
        )

    async def _call_tool(
        self, ctx: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult | dict[str, Any]:
        if params.name not in TOOLS:
            raise MCPError(
                types.INVALID_PARAMS,
                f"tool {params.name[:80]!r}: there is none of this name; use {', '.join(TOOLS)}",
            )
        arguments = params.arguments or {}
        if params.name == "wait" and self._tasks.supported(ctx):
            try:
                return await self._tasks.start(arguments)
            except OutliveError as error:
                return _failed(str(error))
        meta = (ctx.params or {}).get("_meta") or {}
        if meta.get("progressToken") is None:
            try:
                async with asyncio.timeout(SILENCE_MAX):
                    return await self._result(params.name, arguments, LONGEST)
            except TimeoutError:
                return _failed(f"{_silence(params.name)}; what it has done, list_sessions shows")
        return await self._with_progress(ctx, params.name, arguments)

    async def _with_progress(self, ctx: Context, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Run a tool for as long as its arguments say, and let the client know that it is still at it."""
        began = time.monotonic()
        work = asyncio.create_task(self._result(name, arguments, None))
        try:
            while not (await asyncio.wait({work}, timeout=PROGRESS_PAUSE))[0]:
                passed = round(time.monotonic() - began, 1)
                await ctx.session.report_progress(passed, None, f"{name}: waiting for {passed:g} s")
            return work.result()
        finally:
            work.cancel()

    async def _result(self, name: str, arguments: dict[str, Any], longest: float | None) -> types.CallToolResult:
        """Run a tool; what goes wrong is told to the model."""
        try:
            answer = await call(self._thread, name, arguments, Terms(longest, self._screens.of))
        except (OutliveError, OSError) as error:
            return _failed(str(error) or type(error).__name__)
        return types.CallToolResult(
            content=[types.TextContent(text=answer.text())], structured_content=answer.structured()
        )


async def _bounded(ctx: Context, call_next: CallNext) -> HandlerResult:
    """Have no other request be silent for longer than a call may: it is answered with an error."""
    if ctx.method in ("tools/call", "subscriptions/listen"):
        return await call_next(ctx)
    try:
        async with asyncio.timeout(SILENCE_MAX):
            return await call_next(ctx)
    except TimeoutError:
        raise MCPError(types.INTERNAL_ERROR, _silence(ctx.method)) from None


def _silence(what: str) -> str:
    return f"{what}: no answer within {SILENCE_MAX:g} s; `outlive doctor` in a shell says what is wrong"


def _failed(text: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=text)], is_error=True)


async def serve_stdio(thread: Thread) -> None:
    """Serve on standard input and output until the client closes them."""
    bridge = Bridge(thread)

    async def answer(message: types.JSONRPCError) -> None:
        await outgoing.send(SessionMessage(message))

    try:
        lines: Any = _messages(answer)  # of a file it takes no more
        async with stdio_server(stdin=lines) as (incoming, outgoing):
            await bridge.server.run(incoming, outgoing, bridge.server.create_initialization_options())
    finally:
        await bridge.close()


async def _messages(answer: Callable[[types.JSONRPCError], Awaitable[None]]) -> AsyncIterator[str]:
    """Yield the lines of standard input that are messages.

    The others are answered here.  The SDK's server drops them in silence, and there is one that models do bring
    about: half of a character that takes two, cut off somewhere, which clients send as `\\ud83d`.
    """
    async with await anyio.open_file(0, encoding="utf-8", errors="replace", closefd=False) as lines:
        async for line in lines:
            try:
                types.jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValidationError as error:
                if line.strip():
                    await answer(_not_understood(line, error))
            else:
                yield line


def _not_understood(line: str, error: ValidationError) -> types.JSONRPCError:
    wrong = error.errors(include_url=False, include_input=False)[0]
    no_json = wrong["type"] == "json_invalid"
    text = wrong["msg"] if no_json else "this is no message of JSON-RPC 2.0"
    if no_json and "\\ud" in line.lower():
        text += "; half a character, such as `\\ud83d` alone, is no text: leave it out"
    try:
        given = json.loads(line)["id"]
        number = given if type(given) is int or (isinstance(given, str) and given.isprintable()) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        number = None
    code = types.PARSE_ERROR if no_json else types.INVALID_REQUEST
    return types.JSONRPCError(jsonrpc="2.0", id=number, error=types.ErrorData(code=code, message=text))
