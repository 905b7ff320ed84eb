"""The Python API: `outlive.connect()`, a `Host`, its `Thread`s; what the command line can do.

    async with outlive.connect() as host:
        build = await host.thread("build")
        shell = await build.exec_command("bash -i", tty=True)
        reply = await build.write_stdin(shell.process_id, "make test\\n", yield_time_ms=2_500)
        await build.detach()

Always true
    A call that is repeated, by us or by its caller with the same `call_id`, starts nothing twice while its process
    is held or the broker that saw it end keeps its record.
    A lost broker is found, or started, again, and what was asked is asked again.  Input is repeated under its
    `write_id`, which types it once.  Not repeated, since twice may be more than once, are signals that a program
    counts.

Not here
    How a broker is reached: `connection`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

import msgpack
import msgspec
import zmq

from . import kernel, messages, wire
from .connection import Connection, NotSent, open_connection, until_readable
from .errors import BadRequest, Interrupted, Unavailable
from .messages import (
    CHARS_MAX,
    OFFSET_MAX,
    Body,
    Clean,
    CreateThread,
    Detach,
    DetachedProcessSummary,
    Down,
    DropWake,
    ExecCommand,
    Kill,
    ListProcesses,
    ListThreads,
    ListWakes,
    Output,
    ProcessRow,
    ReadOutput,
    Reattach,
    ReattachSummary,
    RecentEvents,
    Resize,
    Resume,
    RetryWake,
    RuleRow,
    Shutdown,
    Start,
    Status,
    Stop,
    ThreadRow,
    Upgrade,
    Wait,
    WaitRow,
    Watch,
    WriteStdin,
    outcome_from_wire,
)
from .names import SocketPath
from .outcome import Outcome, signal_number
from .paths import Paths
from .program import Program, WakeRow
from .response import Response
from .rules import rules_of

# Seconds beyond its own waiting that a call may take: a worker may have to be started first.
MARGIN = 60.0
# Milliseconds that one request of `follow` waits; asking again is cheap, but a wake-up.
FOLLOW_MS = 3_600_000
# Ended processes, or wakes, in one answer: most lines take some 500 bytes, few some thousand.
ROWS_AT_ONCE = 500

# Signals that do the same whether they come once or twice: KILL, CONT, STOP.  A second INT or TERM makes many
# programs give up their cleaning up, and others count USR1.
_REPEATABLE = {9, 18, 19}

T = TypeVar("T")


def connect(paths: Paths | None = None, *, start: bool = True) -> Host:
    """Return the host to use in an `async with`; `start=False` forbids starting a broker.

    Raises (on entering) `Unavailable` when there is no broker and none may be or could be started.
    """
    return Host(paths or Paths.from_environment(), start=start)


class Host:
    """A user's outlive on this machine: the broker, started when it is needed."""

    def __init__(self, paths: Paths, *, start: bool = True) -> None:
        self.paths = paths
        self._start = start
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Host:
        try:
            await self._connected()
        except BaseException:
            self._context.destroy(0)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection:
            self._connection.close()
        self._context.destroy(0)

    # Threads and processes.

    async def thread(self, thread_id: str) -> Thread:
        """Return a thread, made known if it is new; raises `BadRequest` for a name that cannot be one."""
        await self.call(CreateThread(thread=thread_id), ThreadRow)
        return Thread(self, thread_id)

    async def threads(self) -> list[ThreadRow]:
        """Return all threads, sorted by name."""
        return await self.call(ListThreads(), list[ThreadRow])

    async def processes(self, *, ended: bool = False) -> list[ProcessRow]:
        """Return the live processes of all threads; `ended`: the ended ones too, until they expire.

        They are sorted by thread, the ended ones first, and the oldest of both first.
        """
        return await self.list_processes(None, ended=ended)

    async def list_processes(self, thread_id: str | None, *, ended: bool) -> list[ProcessRow]:
        """Do that, for one thread if one is given; ask for no more at once than an answer can hold."""
        rows: dict[tuple[str, str], ProcessRow] = {}
        after = None
        while True:
            question = ListProcesses(thread=thread_id, ended=ended, at_most=ROWS_AT_ONCE, after=after)
            answer = await self.call(question, list[ProcessRow])
            page = {(row.thread, row.process_id): row for row in answer}
            rows |= page  # one that ended meanwhile comes twice
            # An older broker gives all of them, whatever is asked.
            if sum(row.state == "ended" for row in answer) < ROWS_AT_ONCE or after in page:
                return sorted(rows.values(), key=lambda row: (row.thread, row.state != "ended", row.started_at))
            after = [*page][-1]

    async def wakes(self, *, all: bool = False) -> list[WakeRow]:
        """Return what threads are to be woken for, and dead letters, oldest first; `all`: what is over too."""
        return await self.list_wakes(None, all=all)

    async def list_wakes(self, thread_id: str | None, *, all: bool) -> list[WakeRow]:
        """Do that, for one thread if one is given; ask for no more at once than an answer can hold."""
        rows: list[WakeRow] = []
        last = 0
        while True:
            question = ListWakes(thread=thread_id, all=all, at_most=ROWS_AT_ONCE, after=last)
            answer = await self.call(question, list[WakeRow])
            page = [row for row in answer if row.number > last]  # an older broker gives all of them again
            if not page:
                return rows
            rows += page
            last = rows[-1].number

    async def retry_wake(self, number: int) -> WakeRow:
        """Have a dead letter delivered once more, or what was not since the agent had read it; return it.

        Raises `BadRequest` for one that is not known, or in a state where that makes no sense.
        """
        return await self.call(RetryWake(number=number), WakeRow)

    async def drop_wake(self, number: int) -> WakeRow:
        """Have a wake not delivered, whatever becomes of it; return it.  Raises `BadRequest` as above."""
        return await self.call(DropWake(number=number), WakeRow)

    async def status(self) -> dict[str, Any]:
        """Return what the broker says about itself: version, pid, how many threads and processes, pump."""
        return await self.call(Status(), dict[str, Any])

    async def shutdown(self) -> list[ThreadRow]:
        """End every thread's worker and all processes, detached ones too."""
        return await self.call(Shutdown(all=True), list[ThreadRow], None)

    async def down(self, *, force: bool = False) -> dict[str, Any]:
        """End the broker, see it and its keeper gone, and return as `ended` what that ended.

        Raises `BadRequest`, naming them, while processes live; `force` ends them.
        """
        while True:
            live = sorted(f"{row.thread}/{row.process_id}" for row in await self.processes())
            status = await self.status()
            with ExitStack() as pidfds:
                try:
                    pidfd, *keeper = [
                        _pidfd(pid, pidfds) for pid in (status["broker_pid"], status["keeper_pid"]) if pid
                    ]
                except ProcessLookupError:  # killed in this moment
                    continue
                try:
                    answer = await self.call(Down(force=force), dict[str, Any], None, repeat=False)
                except Interrupted:
                    if not await until_readable(pidfd, MARGIN):
                        raise
                    if await self._is_back():  # it was killed, and has been started again
                        continue
                    # Its end has reached us before its answer; then the end is the answer.
                    answer = {"ended": live}
                for ending in (pidfd, *keeper):
                    await until_readable(ending, MARGIN)
            return answer

    async def upgrade(self) -> dict[str, Any]:
        """Have the installed program take over from the running broker and keeper; return the new `status`.

        No process and no worker is touched.  Raises `Unavailable`, saying why, when the new one does not come up:
        then the old one serves on.
        """
        before = (await self.status())["broker_pid"]
        try:
            await self.call(Upgrade(), type(None), repeat=False)
        except Interrupted:
            status = await self.status()
            if status["broker_pid"] != before:
                return status
            raise Unavailable(
                f"the new broker did not come up, and the old one goes on: {status['upgrade_failed']}"
            ) from None
        raise AssertionError("an upgrade is answered only by an error")

    async def recent_events(self) -> list[dict[str, Any]]:
        """Return the last events, oldest first, deltas left out."""
        return await self.call(RecentEvents(), list[dict[str, Any]])

    async def events(self, *, deltas: bool = False, recent: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Yield events as they happen, see `broker.events`; `deltas`: output too; `recent`: the last ones first.

        `seq` counts all events of one broker: a jump means that this subscriber was too slow, or leaves deltas out.
        When a broker was killed and comes back by itself, it goes on with that one's events, from the first on
        (`broker` with `what: up`), whose `seq` starts again from 1; deltas in between are missed.  Ends when the
        broker does and none comes back.
        """
        connection = await self._connected()
        while True:
            async with aclosing(self._events_of(connection, deltas=deltas, recent=recent)) as events:
                async for event in events:
                    yield event
            if not await self._is_back():
                return
            connection, recent = await self._connected(), True

    async def _events_of(
        self, connection: Connection, *, deltas: bool, recent: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of one broker, until it is lost."""
        arrived: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        socket = wire.new_socket(self._context, zmq.SUB)
        # Subscriptions travel.  The broker sends this one back when it has taken it in, and so those before it:
        # no event of now falls between the recent ones and the coming ones.
        ready = messages.READY_TOPIC + secrets.token_hex(8).encode()
        for topic in (b"event", *[b"delta"][: int(deltas)], ready):
            socket.setsockopt(zmq.SUBSCRIBE, topic)

        def receive(frames: list[bytes]) -> None:
            arrived.put_nowait(
                None if frames[0] == ready else msgpack.unpackb(frames[-1], unicode_errors="surrogateescape")
            )

        with SocketPath(self.paths.events) as address:
            socket.connect(f"ipc://{address}")
            port = wire.Port(socket, receive)
            lost = asyncio.create_task(connection.lost.wait())
            # Until it is ready, what happens is among the recent ones.
            last = sys.maxsize if recent else 0
            try:
                while True:
                    coming = asyncio.create_task(arrived.get())
                    await asyncio.wait({coming, lost}, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        coming.cancel()
                        return
                    event = coming.result()
                    if event is not None:
                        if event["seq"] > last:
                            yield event
                    elif recent:
                        try:  # of this broker, whose numbers these are
                            reply = await connection.ask(RecentEvents(), None)
                        except ConnectionError:
                            return
                        last = 0
                        for event in wire.result_of(reply, list[dict[str, Any]]):
                            last = event["seq"]
                            yield event
            finally:
                lost.cancel()
                port.close()

    # Calls.

    async def call(
        self,
        body: Body,
        wanted: type[T],
        seconds: float | None = MARGIN,
        *,
        repeat: bool = True,
    ) -> T:
        """Send a request and return its result; raises the error it was answered with.

        `seconds`: how long the answer may take; `None`: for ever.  `repeat`: ask again when the broker was lost in
        between, which must do nothing twice.  Raises `Unavailable` when no answer came or no broker can be had;
        without `repeat`, `Interrupted` where the request may have been carried out.
        """
        while True:
            connection = await self._connected()
            try:
                reply = await connection.ask(body, seconds)
            except NotSent:
                continue
            except ConnectionError:
                if not repeat:
                    raise Interrupted(
                        "the broker was lost during the call; whether it was done is not known"
                    ) from None
                continue
            except TimeoutError:
                silence = f"no answer within {seconds:.0f} s; see {self.paths.log}"
                if not repeat:
                    raise Interrupted(f"{silence}; whether it was done is not known") from None
                raise Unavailable(silence) from None
            except zmq.ZMQError as error:
                raise Unavailable(f"the request could not be sent: {error}") from None
            return wire.result_of(reply, wanted)

    async def _connected(self, *, start: bool = True) -> Connection:
        async with self._connecting:
            if self._connection is None or self._connection.lost.is_set():
                if self._connection:
                    self._connection.close()
                self._connection = await open_connection(self.paths, self._context, start=start and self._start)
            return self._connection

    async def _is_back(self) -> bool:
        """Tell whether there is a broker again, or comes up in a moment, that we have not started."""
        try:
            await self._connected(start=False)
        except Unavailable:
            return False
        return True


def _pidfd(pid: int, until: ExitStack) -> int:
    """Return a pidfd that is closed with `until`."""
    pidfd = os.pidfd_open(pid)
    until.callback(os.close, pidfd)
    return pidfd


class Thread:
    """One agent thread; its processes outlive its workers."""

    def __init__(self, host: Host, thread_id: str) -> None:
        self.host = host
        self.thread_id = thread_id

    def _new_id(self, *call: object) -> str:
        """Return the id of a call that was given none; what it is about is for those who count their calls."""
        return secrets.token_hex(8)

    async def exec_command(
        self,
        cmd: str | Sequence[str | bytes],
        *,
        workdir: str | os.PathLike[str] | None = None,
        tty: bool = False,
        size: tuple[int, int] = (80, 24),
        yield_time_ms: int = 10_000,
        max_output_tokens: int = 10_000,
        shell: str | None = None,
        login: bool = True,
        env: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        call_id: str | None = None,
        wake_on: Sequence[object] = (),
    ) -> Response:
        """Start a command and return what it printed until its end or for `yield_time_ms`.

        `cmd`: text is a shell command line (run by `shell`, else the caller's, as a `login` shell), a list an
        argv.  `workdir`: default the caller's directory.  `size`: columns and rows of the terminal.
        `yield_time_ms`: clamped to 250–30000.  `max_output_tokens`: of 4 bytes; what is longer keeps head and tail.
        `env`: added to the `environment`, which is by default the caller's.  `call_id`: the same id again returns
        the same process and starts nothing; made up when not given.
        `wake_on`: what wakes the thread, besides what it does by itself: rules, see `rules`, such as `"exit"` or
        `{"output": "error:"}`; whatever they are, the end of the process wakes it while one of them is open.
        Raises `SpawnError` with its stage when the program never ran, `LimitReached`, `BadRequest`.
        """
        here = os.getcwd()
        columns, rows = size
        body = ExecCommand(
            thread=self.thread_id,
            cmd=cmd if isinstance(cmd, str) else [os.fsencode(word) for word in cmd],
            workdir=os.fsencode(os.path.join(here, workdir) if workdir is not None else here),
            environment=dict(os.environb) if environment is None else _encoded(environment),
            overrides=_encoded(env or {}),
            call_id=call_id or self._new_id("exec", cmd, workdir),
            shell=None if shell is None else os.fsencode(shell),
            login=login,
            tty=tty,
            columns=columns,
            rows=rows,
            yield_time_ms=yield_time_ms,
            max_output_tokens=max_output_tokens,
            wake_on=[str(rule) for rule in rules_of(wake_on)],
        )
        return await self.host.call(body, Response, yield_time_ms / 1000 + MARGIN)

    async def write_stdin(
        self,
        process_id: str,
        chars: str | bytes = "",
        *,
        yield_time_ms: int = 250,
        max_output_tokens: int = 10_000,
        resume: bool = True,
        write_id: str | None = None,
    ) -> Response:
        """Type `chars` into a process and return what it printed since the last call.

        `yield_time_ms`: how long to wait for output, clamped to 250–30000 (an empty `chars`: 5000–300000).
        `max_output_tokens`: as in `exec_command`.
        `resume=False`: a sleeping thread is not woken for it; the broker types.
        `write_id`: the same id again, by whomever, types nothing more, and is answered with the output since the
        first time: a caller that died may be repeated.  Known for the last 100 calls of a process, and for the last
        8 of one that has ended; made up when not given.
        Raises `StdinClosed` for a process started without a terminal, `UnknownProcess` for an id this thread
        never had, `Unavailable`, which names the write id, when no answer came: repeat the call with that.  An
        ended process answers with its outcome and what was left to read.
        """
        raw = chars.encode("utf-8", "surrogateescape") if isinstance(chars, str) else chars
        if len(raw) > CHARS_MAX:
            raise BadRequest(f"chars: {len(raw)} bytes; at most {CHARS_MAX} are typed in one call")
        body = WriteStdin(
            thread=self.thread_id,
            process_id=process_id,
            chars=raw,
            yield_time_ms=yield_time_ms,
            max_output_tokens=max_output_tokens,
            write_id=write_id or self._new_id("write", process_id, chars),
            resume=resume,
        )
        seconds = max(yield_time_ms / 1000, 5) + MARGIN
        try:
            return await self.host.call(body, Response, seconds)
        except Unavailable as error:
            raise Unavailable(f"{error}; write id {body.write_id!r}: repeated with it, it counts once") from None

    async def read_output(self, process_id: str, offset: int = 0, *, wait_ms: int = 0) -> Output:
        """Return what is kept of the output from `offset` on, up to 1 MiB, without delivering it.

        `wait_ms`: wait that many milliseconds for something after `offset`.  Raises `UnknownProcess`, or
        `ExpiredProcess` for one whose record is no longer kept.
        """
        body = ReadOutput(thread=self.thread_id, process_id=process_id, offset=offset, wait_ms=wait_ms)
        return await self.host.call(body, Output, wait_ms / 1000 + MARGIN)

    async def follow(self, process_id: str, offset: int = 0) -> AsyncIterator[Output]:
        """Yield the kept output from `offset` on, and what comes, without delivering it; ends with the process.

        The last one says `ended`, with the outcome.
        """
        while True:
            output = await self.read_output(process_id, offset, wait_ms=FOLLOW_MS)
            offset = output.next_offset
            if output.ended and offset >= output.written:
                yield output
                return
            if output.pieces or output.gaps:
                yield output

    async def output(self, process_id: str) -> bytes:
        """Return all kept output, without what was dropped between head and tail."""
        pieces, offset = [], 0
        while True:
            output = await self.read_output(process_id, offset)
            pieces += [data for _, data in output.pieces]
            offset = output.next_offset
            if offset >= output.written:
                return b"".join(pieces)

    async def processes(self, *, ended: bool = False) -> list[ProcessRow]:
        """Return the thread's live processes; `ended`: the ended ones too, until they expire."""
        return await self.host.list_processes(self.thread_id, ended=ended)

    async def wait(self, process_id: str, timeout: float | None = None) -> Outcome:
        """Wait for a process's end and return its outcome; raises `TimeoutError` after `timeout` seconds.

        What has ended answers also within no time: `timeout=0` asks whether it has.  Raises `UnknownProcess`, or
        `ExpiredProcess` for one whose record is no longer kept.
        """
        if timeout is not None:
            now = await self.read_output(process_id, OFFSET_MAX)
            if now.ended and (known := outcome_from_wire(now.outcome)):
                return known
        body = Wait(thread=self.thread_id, process_id=process_id)
        async with asyncio.timeout(timeout):
            answer = await self.host.call(body, dict[str, Any], None)
        outcome = outcome_from_wire(answer["outcome"])
        assert outcome is not None
        return outcome

    async def wait_until(
        self, process_id: str, *rules: object, timeout: float | None = None, since: int = 0
    ) -> WaitRow:
        """Wait until one of these rules is true of a process, or it has ended, without waking its thread.

        The rules are those of `wake_on`; output counts from byte `since` on, silence and deadline from now.  Raises
        `TimeoutError` after `timeout` seconds, `UnknownProcess`, `ExpiredProcess`, `BadRequest`.
        """
        body = Wait(
            thread=self.thread_id,
            process_id=process_id,
            rules=[str(rule) for rule in rules_of(rules)],
            asked_at=kernel.boottime(),
            since=since,
        )
        async with asyncio.timeout(timeout):
            return await self.host.call(body, WaitRow, None)

    async def watch(self, process_id: str, *rules: object, watch_id: str | None = None) -> list[RuleRow]:
        """Have the thread woken when one of these rules is true of a process, which may run, or have ended.

        The rules are those of `wake_on`.  One that is open already stays as it is, one that came true is set anew:
        silence and deadline count from now, output from where it matched before.  The same `watch_id` again sets
        nothing anew.  Raises `BadRequest`, `LimitReached`, `UnknownProcess`, `ExpiredProcess`.
        """
        body = Watch(
            thread=self.thread_id,
            process_id=process_id,
            rules=[str(rule) for rule in rules_of(rules)],
            watch_id=watch_id or self._new_id("watch", process_id, *rules),
        )
        return await self.host.call(body, list[RuleRow])

    async def kill(
        self,
        *process_ids: str,
        signal: int | str = "TERM",
        foreground: bool = False,
        after: float | None = None,
    ) -> list[dict[str, Any]]:
        """Signal the whole tree of processes, or only their `foreground` groups; return a row for each of them.

        `signal`: a number, or a name such as TERM or SIGTERM.  `after`: KILL what still lives after so many
        seconds, and answer when it is gone; else nothing escalates.  A row's `signalled` says how many processes
        got it: 0 for what had ended.  Raises `BadRequest` for `foreground` without a terminal, `Interrupted` when
        the broker was lost and the signal may have been sent; only with `after`, or one that changes nothing when
        it comes twice, is it sent again.
        """
        try:
            number = signal_number(str(signal))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        body = Kill(
            thread=self.thread_id,
            process_ids=list(process_ids),
            signal=number,
            foreground=foreground,
            after_s=after,
        )
        repeat = after is not None or number in _REPEATABLE
        return await self.host.call(body, list[dict[str, Any]], (after or 0) + MARGIN, repeat=repeat)

    async def resize(self, process_id: str, columns: int, rows: int) -> dict[str, Any]:
        """Set the size of a process's terminal, in characters; return its size then.

        Raises `BadRequest` for a process that has ended, or has no terminal.
        """
        body = Resize(thread=self.thread_id, process_id=process_id, columns=columns, rows=rows)
        return await self.host.call(body, dict[str, Any])

    async def start(
        self,
        program: str | Sequence[str | bytes],
        *,
        workdir: str | os.PathLike[str] | None = None,
        even_read: bool = False,
    ) -> ThreadRow:
        """Give the thread a program and wake it; its former program, if it has one, makes room.

        `program`: text is a function, `MODULE:FUNCTION` or `FILE.py:FUNCTION`, called with a `Session` and a
        `Wake`; a list is a command.  `workdir`: where it is looked for and runs; default: the caller's directory.
        `even_read`: wake it also for ends that the agent has learned by itself.
        Returns once the program is loaded and written down.  Raises `BadRequest`, saying what is wrong with it, or
        that the former one runs at this moment.
        """
        here = os.getcwd()
        body = Start(
            thread=self.thread_id,
            program=Program(
                function=program if isinstance(program, str) else "",
                argv=[] if isinstance(program, str) else [os.fsencode(word) for word in program],
                workdir=os.fsencode(os.path.join(here, workdir) if workdir is not None else here),
                path=os.environb.get(b"PATH", os.fsencode(os.defpath)),
                even_read=even_read,
            ),
            call_id=secrets.token_hex(8),
        )
        return await self.host.call(body, ThreadRow, 2 * MARGIN)

    async def stop(self) -> ThreadRow:
        """Take the thread's program away, and what it would have been woken for; its processes run on.

        One that runs is ended.  Without a program nothing happens.
        """
        return await self.host.call(Stop(thread=self.thread_id), ThreadRow)

    async def wakes(self, *, all: bool = False) -> list[WakeRow]:
        """Return what the thread is to be woken for, and its dead letters; `all`: what is over too."""
        return await self.host.list_wakes(self.thread_id, all=all)

    async def detach(self, *, keep_worker: bool = False) -> DetachedProcessSummary:
        """Hand the thread's processes to the broker; answers when its worker has gone to bed, unless `keep_worker`.

        Returns what the broker holds then; nothing for a thread that is not known.  Raises `Unavailable` when the
        worker does not answer.
        """
        return await self.host.call(Detach(thread=self.thread_id, keep_worker=keep_worker), DetachedProcessSummary)

    async def resume(self) -> ThreadRow:
        """Start the thread's worker, if none is up, and see it take back what is detached.

        Raises `UnknownThread`, or `Unavailable` when the worker does not come up.
        """
        return await self.host.call(Resume(thread=self.thread_id), ThreadRow)

    async def reattach(self) -> ReattachSummary:
        """Give what is detached to the worker that is up; raises `BadRequest` when there is none."""
        return await self.host.call(Reattach(thread=self.thread_id), ReattachSummary)

    async def clean(self) -> DetachedProcessSummary:
        """End the thread's detached processes; attached ones are left alone.

        Returns which; where the broker was lost in between, only those that were still there afterwards.
        """
        return await self.host.call(Clean(thread=self.thread_id), DetachedProcessSummary, None)

    async def shutdown(self, *, all: bool = False) -> ThreadRow:
        """End the thread's worker and attached processes; `all`: its detached ones too."""
        body = Shutdown(thread=self.thread_id, all=all)
        return (await self.host.call(body, list[ThreadRow], None))[0]


def _encoded(environment: Mapping[str, str]) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}


def to_builtins(value: Any) -> Any:
    """Return plain lists and dicts of what a method returned, as `--json` prints them.

    Bytes become text; what is no UTF-8, there or in a file name, becomes replacement characters.
    """
    if isinstance(value, Outcome):
        return value.to_wire()
    return _textual(msgspec.to_builtins(value, builtin_types=(bytes,)))


def _textual(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_textual(name): _textual(content) for name, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_textual(item) for item in value]
    return value
