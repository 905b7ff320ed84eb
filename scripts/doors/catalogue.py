"""The tools of an agent: what each is called, what it takes, what it does, and how all that is told to a model.

    exec_command, write_stdin                the two that models know from elsewhere
    list_sessions, read_output, screen       look, and take nothing away
    wait                                     until a session has ended, or something is true of it
    terminate_session

`TOOLS` are offered by every door; `call` runs one of them.  A process is called a session here.

Always true
    A call is sent under an id of its own and repeated under it, so that it counts once whoever dies meanwhile.
    A mistake is an `OutliveError` whose text a model can act on: it names field, value and remedy.
    Nothing here waits longer than it was allowed to, as far as waiting is its own doing.

Not here
    Protocols; who is told what a call may not do: `bridge`, `commands`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from msgspec import UNSET, structs

from ...common.client import Thread, to_builtins
from ...common.errors import (
    BadRequest,
    ExpiredProcess,
    OutliveError,
    Unavailable,
    UnknownProcess,
    UnknownThread,
)
from ...common.messages import OFFSET_MAX, Output, ProcessRow, WaitRow
from ...common.response import BYTES_PER_TOKEN, whole_characters
from ...common.rules import rules_of
from . import vocabulary
from .schema import schema_of, understood
from .vocabulary import Answer, Arguments, of_outcome

if TYPE_CHECKING:
    from ..screen import Screen

T = TypeVar("T")

# What errors for people name, and what it is called here.
_IN_OUR_WORDS = {"`outlive logs`": "read_output", "`outlive ps`": "list_sessions"}
# What would fill a model's memory: ended sessions in a list, and characters of a command there, since models write
# whole files in one.
ENDED_LISTED = 100
_COMMAND_SHOWN = 500
# Seconds that a wait takes at least: what is true already needs a moment to be said.
_LOOK = 0.25
# Seconds beyond its grace that a session which was killed may take to be gone.
_GONE_WITHIN = 5.0


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool.

    `read_only`: it changes nothing.  `destructive`: it may end or change what is there.  `idempotent`: again is the
    same as once.  `run` gets the thread, the arguments, and the terms of the call.
    """

    title: str
    description: str
    arguments: type[Arguments]
    answer: type[Answer]
    run: Callable[[Thread, Any, Terms], Awaitable[Answer]]
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.run.__name__

    def to_builtins(self) -> dict[str, Any]:
        """Return the tool as MCP lists it."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "inputSchema": schema_of(self.arguments),
            "outputSchema": schema_of(self.answer),
            "annotations": {
                "title": self.title,
                "readOnlyHint": self.read_only,
                "destructiveHint": self.destructive,
                "idempotentHint": self.idempotent,
                "openWorldHint": not self.read_only,
            },
        }


async def _look_once(thread: Thread, process_id: str) -> Screen:
    from ..screen import screen_of

    return await screen_of(thread, process_id)


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a tool is called.

    `longest`: seconds that it may wait, whatever the arguments say; default: as long as they say.  `look`: renders
    a screen; who calls for long has one that renders only what is new.
    """

    longest: float | None = None
    look: Callable[[Thread, str], Awaitable[Screen]] = _look_once


async def call(thread: Thread, name: str, arguments: object, terms: Terms = Terms()) -> Answer:
    """Run a tool.

    Raises `BadRequest` for an unknown tool and wrong arguments, and what the client raises.
    """
    tool = tool_of(name)
    given = understood(tool.arguments, arguments)
    try:
        return await tool.run(thread, given, terms)
    except (UnknownProcess, UnknownThread, ExpiredProcess) as error:
        raise type(error)(_unknown(thread, given, error)) from None
    except OutliveError as error:
        text = str(error)
        for theirs, ours in _IN_OUR_WORDS.items():
            text = text.replace(theirs, ours)
        raise type(error)(text) from None


def tool_of(name: str) -> Tool:
    """Return a tool; raises `BadRequest` for a name that none has."""
    if name not in TOOLS:
        raise BadRequest(f"tool {name[:80]!r}: there is none of this name; use {', '.join(TOOLS)}")
    return TOOLS[name]


def _unknown(thread: Thread, given: Arguments, error: Exception) -> str:
    one = getattr(given, "session_id", None)
    if one is None:
        asked = ", ".join(map(str, getattr(given, "session_ids", ())))
        return (
            f"session_ids: {asked}: not all of them are sessions of thread {thread.thread_id}, or kept any more; "
            "list_sessions with all=true names those there are"
        )
    if isinstance(error, ExpiredProcess):
        return f"session_id: {one}: it ended long ago; its outcome and its output are no longer kept"
    return (
        f"session_id: {one}: thread {thread.thread_id} has no such session; list_sessions with all=true names "
        "those there are"
    )


async def _insisted(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try once more, under the same id, where nobody answered: whoever was missing may be back."""
    try:
        return await attempt()
    except Unavailable:
        return await attempt()


async def exec_command(thread: Thread, given: vocabulary.ExecCommand, terms: Terms) -> vocabulary.Reply:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise BadRequest(
            "workdir: the folder that this runs in is gone, and what is relative to it; start it in another one"
        ) from None
    call_id = secrets.token_hex(8)
    try:
        response = await _insisted(
            lambda: thread.exec_command(
                given.cmd,
                workdir=given.workdir or None,
                tty=given.tty,
                yield_time_ms=_within(given.yield_time_ms, terms.longest),
                max_output_tokens=given.max_output_tokens,
                shell=given.shell or None,
                login=given.login,
                call_id=call_id,
            )
        )
    except Unavailable as error:
        raise Unavailable(f"{error}; whether it was started, list_sessions with all=true shows") from None
    return vocabulary.Reply.of(response, given.max_output_tokens)


async def write_stdin(thread: Thread, given: vocabulary.WriteStdin, terms: Terms) -> vocabulary.Reply:
    write_id = secrets.token_hex(8)
    try:
        response = await _insisted(
            lambda: thread.write_stdin(
                str(given.session_id),
                given.chars,
                yield_time_ms=_within(given.yield_time_ms, terms.longest),
                max_output_tokens=given.max_output_tokens,
                write_id=write_id,
            )
        )
    except Unavailable as error:
        why = str(error).partition("; write id")[0]  # of which a model can make no use
        raise Unavailable(f"{why}; whether it was typed, read_output shows") from None
    return vocabulary.Reply.of(response, given.max_output_tokens)


def _within(milliseconds: int, longest: float | None) -> int:
    return milliseconds if longest is None else min(milliseconds, int(longest * 1000))


async def list_sessions(thread: Thread, given: vocabulary.ListSessions, terms: Terms) -> vocabulary.Sessions:
    try:
        rows = await thread.processes(ended=given.all)
    except UnknownThread:  # nothing was started yet
        rows = []
    earlier = max(0, sum(row.state == "ended" for row in rows) - ENDED_LISTED)  # the first of the list
    return vocabulary.Sessions(sessions=[_row(row) for row in rows[earlier:]], earlier=earlier or UNSET)


def _row(row: ProcessRow) -> vocabulary.SessionRow:
    command = str(to_builtins(shlex.join(row.command)))
    return vocabulary.SessionRow(
        session_id=int(row.process_id),
        state="ended" if row.state == "ended" else "running",
        command=command if len(command) <= _COMMAND_SHOWN else command[:_COMMAND_SHOWN] + "…",
        workdir=str(to_builtins(row.cwd)),
        tty=row.tty,
        started_at=row.started_at,
        bytes_written=row.bytes_written,
        bytes_unread=row.bytes_written - row.bytes_delivered,
        **of_outcome(row.outcome),
    )


async def read_output(thread: Thread, given: vocabulary.ReadOutput, terms: Terms) -> vocabulary.Piece:
    process_id, room = str(given.session_id), given.max_output_tokens * BYTES_PER_TOKEN
    start = given.cursor
    if given.tail is not UNSET:
        start = max(0, (await thread.read_output(process_id, OFFSET_MAX)).written - room)
    output = await thread.read_output(process_id, start)
    if given.tail is not UNSET:
        start, output = _last_lines(output, start, given.tail)
    return _piece(given.session_id, start, output, room)


def _last_lines(output: Output, start: int, count: int) -> tuple[int, Output]:
    """Return where the last `count` lines of an output begin, and the output from there on."""
    start = _beginning_of_last(output, start, count)
    pieces = [(max(at, start), data[max(0, start - at) :]) for at, data in output.pieces]
    return start, structs.replace(
        output,
        pieces=[(at, data) for at, data in pieces if data],
        gaps=[gap for gap in output.gaps if gap[1] > start],
    )


def _beginning_of_last(output: Output, start: int, count: int) -> int:
    last = True
    for at, data in reversed(output.pieces):
        end = len(data) - 1 if last and data.endswith(b"\n") else len(data)
        last = False
        while (end := data.rfind(b"\n", 0, end)) >= 0:
            count -= 1
            if not count:
                return at + end + 1
    return start


def in_order(output: Output) -> list[tuple[int, bytes | int]]:
    """Return pieces (offset, bytes) and gaps (offset, end) in their order."""
    return sorted([*output.pieces, *output.gaps], key=lambda one: one[0])


def gap_text(start: int, end: int) -> str:
    """Return what stands for bytes that are not kept."""
    return f"\n[bytes {start} to {end} are not kept]\n"


def _piece(session_id: int, start: int, output: Output, room: int) -> vocabulary.Piece:
    """Return up to `room` bytes of an output, whole characters, with its gaps named in their places."""
    parts: list[str] = []
    gaps: list[vocabulary.Gap] = []
    at = start
    for offset, part in in_order(output):
        if isinstance(part, int):
            gaps.append(vocabulary.Gap(offset, part))
            parts.append(gap_text(offset, part))
            at = part
            continue
        data = part[:room]
        final = output.ended and offset + len(data) == output.written
        data = data if final else data[: whole_characters(data)] or data[: 0 if len(part) <= room else room]
        parts.append(data.decode("utf-8", "replace"))
        at, room = offset + len(data), room - len(data)
        if len(data) < len(part) or not room:
            break
    ended = output.outcome is not None
    return vocabulary.Piece(
        session_id=session_id,
        state="ended" if ended else "running",
        cursor=start,
        next_cursor=at,
        bytes_written=output.written,
        gaps=gaps,
        output="".join(parts),
        **of_outcome(output.outcome),
    )


async def wait(thread: Thread, given: vocabulary.Wait, terms: Terms) -> vocabulary.Waited:
    named = {"output": given.match, "silence": given.silence, "port": given.port}
    rules = rules_of({kind: value} for kind, value in named.items() if value is not UNSET)
    seconds = given.timeout_ms / 1000
    if (longest := terms.longest) is not None:
        if given.silence is not UNSET and given.silence >= longest:
            raise BadRequest(
                f"silence: {given.silence:g}: the answer has to come within {longest:g} s here, so that so long a "
                f"silence cannot be seen; use less than {longest:g}"
            )
        seconds = min(seconds, longest)
    ids = list(dict.fromkeys(given.session_ids))
    waits = {one: asyncio.create_task(thread.wait_until(str(one), *rules, since=given.cursor)) for one in ids}
    try:
        when = asyncio.FIRST_COMPLETED if given.any else asyncio.FIRST_EXCEPTION
        done, _ = await asyncio.wait(waits.values(), timeout=max(seconds, _LOOK), return_when=when)
        for one, task in waits.items():
            # The answer about one that has ended may be on its way: it is not called running.
            if not (given.any and done) and not task.done():
                if (await thread.read_output(str(one), OFFSET_MAX)).ended:
                    await task
        rows = {one: task.result() for one, task in waits.items() if task.done()}
        if any(row.offset is not None and row.offset < given.cursor for row in rows.values()):
            raise Unavailable(
                f"cursor: {given.cursor}: the broker is an older one, which knows of none; replace it with "
                "`outlive broker upgrade` in a shell, which ends nothing, or leave cursor out"
            )
    finally:
        for task in waits.values():
            task.cancel()
        await asyncio.gather(*waits.values(), return_exceptions=True)
    return vocabulary.Waited(
        sessions=[_awaited(one, rows.get(one)) for one in ids],
        timed_out=not rows if given.any else len(rows) < len(ids),
    )


_CAME_TRUE: dict[str, Literal["exit", "match", "silence", "port"]] = {
    "exit": "exit",
    "output": "match",
    "silence": "silence",
    "port": "port",
}


def _awaited(session_id: int, row: WaitRow | None) -> vocabulary.Awaited:
    if row is None:
        return vocabulary.Awaited(session_id=session_id)
    kind = (row.rule or "").partition("=")[0]
    return vocabulary.Awaited(
        session_id=session_id,
        came_true=_CAME_TRUE.get(kind, UNSET),
        matched=UNSET if row.text is None else row.text.decode("utf-8", "replace"),
        offset=UNSET if row.offset is None else row.offset,
        **of_outcome(row.outcome),
    )


async def terminate_session(
    thread: Thread, given: vocabulary.TerminateSession, terms: Terms
) -> vocabulary.Terminated:
    process_id = str(given.session_id)
    await thread.kill(process_id, after=given.grace_s)
    try:
        outcome = await thread.wait(process_id, _GONE_WITHIN)
    except TimeoutError:  # what even SIGKILL does not end, such as a process in a dead network mount
        return vocabulary.Terminated(session_id=given.session_id, state="running")
    return vocabulary.Terminated(session_id=given.session_id, state="ended", **of_outcome(outcome.to_wire()))


async def screen(thread: Thread, given: vocabulary.Screen, terms: Terms) -> vocabulary.ScreenAnswer:
    found = await terms.look(thread, str(given.session_id))
    return vocabulary.ScreenAnswer(
        session_id=given.session_id,
        columns=found.columns,
        rows=found.rows,
        cursor=vocabulary.Cursor(row=found.cursor.row, column=found.cursor.column, visible=found.cursor.visible),
        complete=found.complete,
        lines=found.lines,
    )


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "Run a command",
            "Start a shell command, and return what it prints until it ends, or for yield_time_ms (10 s). If it "
            "still runs then, the answer has a session_id: go on with write_stdin (type, or with empty chars get "
            "what it has printed since), wait (until it ends or says something), read_output or terminate_session. "
            "Without a session_id it has ended, and exit_code says how. Start servers, watchers and long builds "
            "right here, without `&` or nohup: a session outlives this call, this server, and you. Use tty=true "
            "for what you want to type into, such as a REPL.",
            vocabulary.ExecCommand,
            vocabulary.Reply,
            exec_command,
            destructive=True,
        ),
        Tool(
            "Type into a session, or poll it",
            "Type chars into a session that was started with tty=true, and return what it printed since the last "
            "answer. End a line with a line feed. With empty chars: only wait for more output, at most "
            "yield_time_ms, of a session of any kind; its end is answered at once. An answer with exit_code and "
            "without session_id means that it has ended, for good: typing and polling again change nothing.",
            vocabulary.WriteStdin,
            vocabulary.Reply,
            write_stdin,
            destructive=True,
        ),
        Tool(
            "List sessions",
            "List the sessions of this project that run, also those that were started before this server or this "
            "conversation began; with all=true also those that have ended. Do this first when you come back.",
            vocabulary.ListSessions,
            vocabulary.Sessions,
            list_sessions,
            read_only=True,
        ),
        Tool(
            "Read a session's output",
            "Read the output of a session, running or ended, from its beginning, from a cursor, or its last lines "
            "(tail), without taking anything from what write_stdin returns. Go on with the next_cursor of the "
            "answer. Of a very long output the middle is not kept; gaps says which bytes.",
            vocabulary.ReadOutput,
            vocabulary.Piece,
            read_output,
            read_only=True,
        ),
        Tool(
            "Wait for sessions",
            "Wait until sessions have ended; or, if given, until the output matches an expression, nothing was "
            "printed for some seconds, or a TCP port is listened on, whichever is first; the end of a session ends "
            "its wait, too. Better than polling, and it reads no output: get that with write_stdin or read_output. "
            "When it times out, nothing has happened to the sessions: wait again.",
            vocabulary.Wait,
            vocabulary.Waited,
            wait,
            read_only=True,
        ),
        Tool(
            "End a session",
            "End a session and everything it started: ask it to (SIGTERM), and end it by force after grace_s "
            "seconds. One that has ended is left as it is. To interrupt only what runs on a terminal, type Ctrl-C "
            "instead: write_stdin with chars \\u0003.",
            vocabulary.TerminateSession,
            vocabulary.Terminated,
            terminate_session,
            destructive=True,
            idempotent=True,
        ),
        Tool(
            "See a session's screen",
            "See the terminal of a session that was started with tty=true as a person would: lines of text, and "
            "the cursor. For full-screen programs such as editors, pagers and top, whose output is hard to read.",
            vocabulary.Screen,
            vocabulary.ScreenAnswer,
            screen,
            read_only=True,
        ),
    )
}
