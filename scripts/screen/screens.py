"""Screens of processes: read from their transcripts, rendered by a process of its own.

Always true
    Nobody is disturbed: what an agent has not read stays unread, and no thread is woken.
    What was rendered once is not rendered again, as long as one `Screens` is used, for the last 16 processes.
    A screen that says `complete` is what a terminal of its size shows for all that the process has printed.

Not here
    What escape sequences mean: the emulators.

A transcript does not say when its terminal was resized, so all that is found at one look is drawn at the size of
that moment; programs that fill the screen draw it anew after a resize.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from ...common.client import Thread
from ...common.errors import BadRequest, Unavailable
from ...common.launch import MARK, PROCESS, ROLE, THREAD
from ...common.messages import Output, ProcessRow
from ...common.outcome import signal_name
from . import renderer
from .emulator import CELLS_MAX
from .renderer import Drawing, Drawn

# Screens that are kept for the next look, a few hundred kilobytes each.
_KEPT = 16
# Seconds that one drawing may take.  The renderer ends itself after fewer, of computing; this is for one that was
# stopped, on a machine that does other things too.
_DEADLINE = 60.0
# Bytes of an answer: every cell with as many marks as the emulators keep.
_ANSWER_MAX = 64 << 20


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """Where the next character goes; row and column count from 0."""

    row: int
    column: int
    visible: bool


class Screen(msgspec.Struct, frozen=True, kw_only=True):
    """What a terminal shows.

    `lines`: one per row, without the blanks at its end.  `offset`: of the output, up to which it is rendered.
    `complete`: whether all of that was there; where some is no longer kept, parts may be missing or out of date.
    `alternate`: a program has the screen for itself, and what was there before comes back at its end.
    """

    thread: str
    process_id: str
    columns: int
    rows: int
    lines: list[str]
    cursor: Cursor
    alternate: bool
    title: str
    offset: int
    complete: bool

    @property
    def text(self) -> str:
        """The lines as one text, without the empty ones at its end."""
        return "\n".join(self.lines).rstrip("\n")


@dataclass
class _Rendered:
    """How far a screen of the renderer's is."""

    offset: int = 0
    complete: bool = True
    started: bool = False


class Screens:
    """Renders screens, in a process that is started when it is first needed; use it in an `async with`."""

    def __init__(self) -> None:
        self._renderer: asyncio.subprocess.Process | None = None
        self._rendered: OrderedDict[str, _Rendered] = OrderedDict()
        self._forget: list[str] = []
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Screens:
        return self

    async def __aexit__(self, *_: object) -> None:
        async with self._turn:
            await self._end()

    async def of(self, thread: Thread, process_id: str) -> Screen:
        """Return the screen of a process that lives or has ended, as it is now.

        Raises `BadRequest` for one without a terminal, or whose terminal has more cells than are rendered;
        `UnknownProcess`, `ExpiredProcess`; `Unavailable` when it cannot be rendered, with the reason.
        """
        async with self._turn:
            await self._start()  # it gets ready while we ask
            columns, rows = await self._size(thread, process_id)
            name = f"{thread.host.paths.run}:{thread.thread_id}/{process_id}"
            return await self._bring_up_to_date(name, thread, process_id, columns, rows)

    async def _size(self, thread: Thread, process_id: str) -> tuple[int, int]:
        row = await _row(thread, process_id)
        if not row.tty:
            raise BadRequest(f"process {process_id} has no terminal; see its output with `outlive logs`")
        if row.columns is None or row.rows is None:
            raise BadRequest(
                f"process {process_id}: its terminal's size is not known, since an older broker held it; see its "
                "output with `outlive logs`, and replace a broker that runs with `outlive broker upgrade`"
            )
        columns, rows = row.columns or 80, row.rows or 24  # as programs do when it is 0
        if columns * rows > CELLS_MAX:
            raise BadRequest(
                f"process {process_id}: a terminal of {columns}x{rows} is not rendered, at most {CELLS_MAX} cells "
                "are; use `outlive resize`"
            )
        return columns, rows

    async def _bring_up_to_date(
        self, name: str, thread: Thread, process_id: str, columns: int, rows: int
    ) -> Screen:
        output = await thread.read_output(process_id, self._at(name).offset)
        if output.written < self._at(name).offset:  # another process than the one we knew
            del self._rendered[name]
            output = await thread.read_output(process_id)
        rendered, end = self._at(name), output.written
        while True:
            for offset, data in _parts(output):
                gap = offset > rendered.offset
                rendered.complete &= not gap
                drawn = await self._draw(name, rendered, columns, rows, data, gap=gap)
                rendered.offset = offset + len(data)
            if rendered.offset >= end or not output.pieces:
                break
            output = await thread.read_output(process_id, rendered.offset)
        picture = drawn.picture
        if picture is None:
            raise Unavailable("no terminal emulator is installed; install `outlive[screen]`")
        return Screen(
            thread=thread.thread_id,
            process_id=process_id,
            columns=columns,
            rows=rows,
            lines=picture.lines,
            cursor=Cursor(row=picture.row, column=picture.column, visible=picture.visible),
            alternate=picture.alternate,
            title=picture.title,
            offset=rendered.offset,
            complete=rendered.complete,
        )

    def _at(self, name: str) -> _Rendered:
        """Return how far a screen is, and keep it longer than the others."""
        rendered = self._rendered.setdefault(name, _Rendered())
        self._rendered.move_to_end(name)
        while len(self._rendered) > _KEPT:
            self._forget.append(self._rendered.popitem(last=False)[0])
        return rendered

    # The renderer.

    async def _start(self) -> None:
        if self._renderer and self._renderer.returncode is None:
            return
        await self._end()
        module = renderer.__name__
        # As all processes of ours: without the marks of one that an agent started, and not at a terminal's mercy.
        environment = {name: value for name, value in os.environb.items() if name not in (THREAD, PROCESS, MARK)}
        environment[ROLE] = module.removeprefix("outlive.").encode()
        self._renderer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", module),  # -P: a `json.py` in the caller's directory must not shadow ours
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    async def _end(self) -> None:
        child, self._renderer = self._renderer, None
        self._rendered.clear()
        self._forget.clear()
        if child is None:
            return
        with suppress(ProcessLookupError):
            child.kill()
        await asyncio.shield(child.wait())
        assert child.stdin is not None
        child.stdin.close()

    async def _draw(
        self, name: str, rendered: _Rendered, columns: int, rows: int, data: bytes, *, gap: bool
    ) -> Drawn:
        drawing = Drawing(
            name=name,
            columns=columns,
            rows=rows,
            data=data,
            start=not rendered.started,
            gap=gap,
            forget=self._forget,
        )
        child = self._renderer
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            async with asyncio.timeout(_DEADLINE):
                drawn = await _exchange(drawing, child.stdin, child.stdout)
        except (OSError, EOFError, msgspec.MsgspecError) as error:  # a TimeoutError is an OSError
            why = await _why(error, child)
            await self._end()
            raise Unavailable(f"the screen cannot be rendered: {why}; see the output with `outlive logs`") from None
        except BaseException:  # cancelled: it may still be at it, and its answer would be taken for the next one
            await self._end()
            raise
        rendered.started, self._forget = True, []
        return drawn


async def _exchange(drawing: Drawing, requests: asyncio.StreamWriter, replies: asyncio.StreamReader) -> Drawn:
    """Send the renderer a frame and return its answer; raises what a broken pipe, or nonsense, raises."""
    frame = msgspec.msgpack.encode(drawing)
    requests.write(len(frame).to_bytes(4, "big") + frame)
    await requests.drain()
    size = int.from_bytes(await replies.readexactly(4), "big")
    if size > _ANSWER_MAX:
        raise msgspec.DecodeError(f"{size} bytes")
    return msgspec.msgpack.decode(await replies.readexactly(size), type=Drawn)


async def _why(error: Exception, child: asyncio.subprocess.Process) -> str:
    if isinstance(error, TimeoutError):
        return f"the renderer has not answered within {_DEADLINE:.0f} s"
    if isinstance(error, msgspec.MsgspecError):
        return f"the renderer answered with nonsense: {error}"
    status = await child.wait()  # it has closed its end of a pipe, so this is near
    return f"the renderer died of {signal_name(-status)}" if status < 0 else f"the renderer ended, status {status}"


async def screen_of(thread: Thread, process_id: str) -> Screen:
    """Return the screen of a process, rendered from the beginning; see `Screens.of`."""
    async with Screens() as screens:
        return await screens.of(thread, process_id)


async def _row(thread: Thread, process_id: str) -> ProcessRow:
    """Return a process's line of `ps`; raises `UnknownProcess`, `ExpiredProcess`."""
    for ended in (False, True):
        for row in await thread.processes(ended=ended):
            if row.process_id == process_id:
                return row
    output = await thread.read_output(process_id)  # which says why there is none
    raise Unavailable(f"process {process_id} has just come or gone, at offset {output.written}; try again")


def _parts(output: Output) -> list[tuple[int, bytes]]:
    """Return the pieces in order; at least one, so that there is something to draw."""
    return sorted(output.pieces) or [(output.next_offset, b"")]
