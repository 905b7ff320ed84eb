"""`wait` as a task of the Model Context Protocol: the extension io.modelcontextprotocol/tasks of 2026-07-28.

A client that supports tasks gets, for a wait that is not over at once, the id of a task, asks how it is
(`tasks/get`) until it is over, and may cancel it.

Always true
    The id of a task says all of it: what is waited for, since when, and a nonce.  A bridge that never heard of it,
    since the one that made it has died, goes on with it.
    Cancelling ends a wait, never a session.  A bridge that was restarted since knows nothing of that, and waits on.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from ...common.errors import OutliveError
from .schema import understood
from .vocabulary import Wait

EXTENSION = "io.modelcontextprotocol/tasks"

# Seconds that a wait may take to be over at once, and that an answer about a task waits for its end.
_AT_ONCE = 0.5
# Milliseconds: how often to ask, and how long a task may be asked for; what it is about is kept as long.
_POLL_MS = 1000
_TTL_MS = 86_400_000
# Tasks that are remembered; one that was forgotten is begun again when it is asked for.
_REMEMBERED = 1000

Context = ServerRequestContext[Any, Any]


class TaskParams(types.RequestParams):
    """Of `tasks/get`, `tasks/update` and `tasks/cancel`."""

    task_id: str


@dataclass(slots=True)
class _Task:
    work: asyncio.Task[types.CallToolResult]
    created: float
    updated: float
    cancelled: bool = False


class Tasks:
    """The waits that are under way.  `run` carries one out, given the arguments of `wait`."""

    def __init__(self, run: Callable[[dict[str, Any]], Coroutine[Any, Any, types.CallToolResult]]) -> None:
        self._run = run
        self._tasks: dict[str, _Task] = {}

    def supported(self, ctx: Context) -> bool:
        """Tell whether the client of a request knows tasks."""
        declared = ctx.session.client_capabilities
        modern = ctx.protocol_version in MODERN_PROTOCOL_VERSIONS
        return modern and declared is not None and EXTENSION in (declared.extensions or {})

    async def start(self, arguments: dict[str, Any]) -> types.CallToolResult | dict[str, Any]:
        """Wait, and return the result if it is there at once, else the task."""
        created = round(time.time(), 3)
        name = _name_of(created, arguments)
        task = self._begin(name, created, arguments)
        try:
            await asyncio.wait({task.work}, timeout=_AT_ONCE)
        except asyncio.CancelledError:  # nobody knows its name
            self._tasks.pop(name, None)
            task.work.cancel()
            raise
        if task.work.done():
            self._tasks.pop(name, None)  # where a thousand others wait, it may have been forgotten
            return task.work.result()
        return {"resultType": "task", **self._state(name, task)}

    async def get(self, ctx: Context, params: TaskParams) -> dict[str, Any]:
        """Answer `tasks/get`."""
        task = self._find(ctx, params.task_id)
        await asyncio.wait({task.work}, timeout=_AT_ONCE)
        return self._state(params.task_id, task)

    async def update(self, ctx: Context, params: TaskParams) -> dict[str, Any]:
        """Answer `tasks/update`: a wait never asks for input, and ignores it."""
        self._find(ctx, params.task_id)
        return {}

    async def cancel(self, ctx: Context, params: TaskParams) -> dict[str, Any]:
        """Answer `tasks/cancel`."""
        task = self._find(ctx, params.task_id)
        if not task.work.done():
            task.cancelled, task.updated = True, time.time()
            task.work.cancel()
        return {}

    def close(self) -> None:
        """Wait for nothing any more."""
        for task in self._tasks.values():
            task.work.cancel()
        self._tasks.clear()

    def _find(self, ctx: Context, name: str) -> _Task:
        if not self.supported(ctx):
            raise MCPError(
                types.MISSING_REQUIRED_CLIENT_CAPABILITY,
                f"tasks need the extension {EXTENSION} among the client's capabilities",
                {"requiredCapabilities": {"extensions": {EXTENSION: {}}}},
            )
        return self._tasks.get(name) or self._begin(name, *_meaning_of(name))

    def _begin(self, name: str, created: float, arguments: dict[str, Any]) -> _Task:
        over = [other for other, task in self._tasks.items() if task.work.done()]
        for other in over[: max(0, len(self._tasks) - _REMEMBERED)]:
            del self._tasks[other]
        given = understood(Wait, arguments)
        left = max(0, given.timeout_ms - round((time.time() - created) * 1000))
        work = asyncio.create_task(self._run({**arguments, "timeout_ms": min(left, given.timeout_ms)}))
        task = self._tasks[name] = _Task(work, created, created)
        work.add_done_callback(lambda _: setattr(task, "updated", time.time()))
        return task

    def _state(self, name: str, task: _Task) -> dict[str, Any]:
        state: dict[str, Any] = {
            "taskId": name,
            "createdAt": _rfc3339(task.created),
            "lastUpdatedAt": _rfc3339(task.updated),
            "ttlMs": _TTL_MS,
            "pollIntervalMs": _POLL_MS,
        }
        if task.cancelled:
            return {**state, "status": "cancelled", "statusMessage": "the wait was cancelled; the sessions live on"}
        if not task.work.done():
            return {**state, "status": "working", "statusMessage": "waiting"}
        if error := task.work.exception():
            told = {"code": types.INTERNAL_ERROR, "message": f"{type(error).__name__}: {error}"}
            return {**state, "status": "failed", "statusMessage": told["message"], "error": told}
        result = task.work.result().model_dump(by_alias=True, mode="json", exclude_none=True)
        return {**state, "status": "completed", "result": result}


def _name_of(created: float, arguments: dict[str, Any]) -> str:
    raw = json.dumps([secrets.token_hex(8), created, arguments], separators=(",", ":"))
    return base64.urlsafe_b64encode(raw.encode()).decode().rstrip("=")


def _meaning_of(name: str) -> tuple[float, dict[str, Any]]:
    """Return since when a task waits, and for what; raises `MCPError` for an id of no task."""
    try:
        raw = json.loads(base64.b64decode(name + "=" * (-len(name) % 4), altchars=b"-_", validate=True))
        _, created, arguments = raw
        created = float(created)
        _rfc3339(created)
        understood(Wait, arguments)
    except (ValueError, TypeError, OverflowError, OSError, RecursionError, OutliveError):
        raise MCPError(types.INVALID_PARAMS, f"taskId: {name[:80]!r}: there is no such task") from None
    return created, arguments


def _rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
