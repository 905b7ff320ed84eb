"""What each client request does.

Requests that a worker carries out are sent there, and sent again to the next worker when it dies, if doing so
cannot do anything twice: `exec_command` counts once by its call id, `write_stdin` by its write id, which the
process's inlet knows, and reading repeats nothing.  So a call that was under way when a worker died is finished by
the next one.  What the broker holds it answers for by itself.  Only `exec_command`, `resume` and `write_stdin`
(unless told not to) wake a sleeping thread.

Each method does the request of its name, which `common.messages` describes.  Not here: `Watch` and `Wait`, see
`watching`; and `RecentEvents`, which the loop answers, since it remembers them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import msgspec

from .. import __version__
from ..common import kernel, messages, tree
from ..common.descriptors import ROLES
from ..common.errors import (
    BadRequest,
    ExpiredProcess,
    LimitReached,
    OutliveError,
    Unavailable,
    UnknownProcess,
)
from ..common.held import Held, exec_yield, piece_of, write_yield
from ..common.messages import (
    Body,
    DetachedProcessSummary,
    Output,
    ReadOutput,
    ReattachSummary,
    ThreadRow,
    WriteStdin,
)
from ..common.names import check_process
from ..common.outcome import signal_name
from ..common.program import ProcessSummary, WakeRow
from . import inventory
from .custody import Holder, State
from .delivery import Delivery
from .entries import Entry, Thread, brief
from .lifecycle import Phase
from .peers import WorkerGone
from .records import Key, Record, rfc3339
from .threads import ThreadManager
from .watching import Watching
from .world import World

# Signals that are meant to end a process, so that its end is the caller's doing.
_ENDING = {1, 2, 3, 6, 9, 15}
# Seconds that a killed tree has to be gone before `kill --after` answers without it.
_KILLED_WITHIN = 5.0
# Characters of all command lines, folders and rules in one list: with up to four bytes each, half of what an answer
# can hold.
_WORDS_MAX = 1 << 19
# Requests that need not know what the workers of a former broker report.
_AT_ONCE = messages.Status, messages.CreateThread, messages.Upgrade
# Requests that start or wake a worker, which is then not put to bed.
_USES_WORKER = messages.ExecCommand, WriteStdin, messages.Resume


class Operations:
    """All client requests, by their type."""

    def __init__(
        self, world: World, threads: ThreadManager, delivery: Delivery, mode: str, stop: Callable[[], None]
    ) -> None:
        self._world = world
        self._threads = threads
        self._delivery = delivery
        self._mode = mode
        self._stop = stop
        self._started = time.time_ns()
        watching = Watching(world, threads)
        self._by_type: dict[type[Body], Callable[[Any, float | None], Awaitable[Any]]] = {
            messages.ExecCommand: self.exec_command,
            messages.WriteStdin: self.write_stdin,
            messages.ReadOutput: self.read_output,
            messages.ListProcesses: self.list_processes,
            messages.ListThreads: self.list_threads,
            messages.CreateThread: self.create_thread,
            messages.Watch: watching.watch,
            messages.Wait: watching.wait,
            messages.Kill: self.kill,
            messages.Resize: self.resize,
            messages.Detach: self.detach,
            messages.Resume: self.resume,
            messages.Reattach: self.reattach,
            messages.Clean: self.clean,
            messages.Shutdown: self.shutdown,
            messages.Start: self.start,
            messages.Stop: self.stop_program,
            messages.ListWakes: self.list_wakes,
            messages.Inventory: self.inventory,
            messages.RetryWake: self.retry_wake,
            messages.DropWake: self.drop_wake,
            messages.Status: self.status,
            messages.Upgrade: self.upgrade,
            messages.Down: self.down,
        }

    async def carry_out(self, body: Body, deadline: float | None) -> Any:
        """Do what a client asks, and return the result."""
        if not isinstance(body, _AT_ONCE):
            await self._threads.survivors_reported(getattr(body, "thread", None))
        work = self._by_type[type(body)]
        if not isinstance(body, _USES_WORKER):
            return await work(body, deadline)
        thread = self._threads.create if isinstance(body, messages.ExecCommand) else self._threads.get
        with self._delivery.busy(thread(body.thread)):
            return await work(body, deadline)

    # The two tools.

    async def exec_command(self, call: messages.ExecCommand, deadline: float | None) -> Any:
        thread = self._threads.create(call.thread)
        if self._world.descriptors_left() < len(ROLES):
            raise LimitReached(
                "the broker holds as many descriptors as it may (limit on open files); end some processes, or "
                "raise the limit and restart the broker"
            )
        while True:
            await self._threads.started(thread, call.call_id)
            if archived := thread.journal.calls.get(call.call_id):
                answer = thread.journal.get(archived).answer(call.max_output_tokens, 0)
                self._threads.on_read((call.thread, archived))
                return answer
            peer = await self._threads.worker(thread)
            await self._threads.handed_over(thread)
            # From here to the call nothing is awaited: while we waited, the worker before this one may have died
            # with the start under way, and its process may have been collected.
            if self._threads.may_start(thread, call.call_id) or call.call_id in thread.journal.calls:
                continue
            entry = thread.entry_of_call(call.call_id)
            if entry and entry.custody.holder is Holder.NOBODY and entry.epoch != peer.epoch:
                # Its worker died, its spawner may still be at it; starting it again would be a second process.
                await entry.changed()
                continue
            if entry and entry.custody.holder is Holder.BROKER:
                started = time.monotonic()
                with self._talk(entry) as held:
                    await held.until_ended(started + exec_yield(call.yield_time_ms))
                    response = held.answer(started, call.max_output_tokens, since=0)
                    self._told(entry, response.outcome)
                return response
            peer.starts.add(call.call_id)
            try:
                result = await peer.call(call, self._world.transmit, deadline)
            except WorkerGone:
                continue
            except Unavailable:
                raise  # it may still start it
            except OutliveError as error:
                peer.starts.discard(call.call_id)
                if isinstance(error, ExpiredProcess) and call.call_id in thread.journal.calls:
                    continue  # collected a moment ago
                raise
            peer.starts.discard(call.call_id)
            self._relayed(thread, result)
            return result

    async def write_stdin(self, call: WriteStdin, deadline: float | None) -> Any:
        call = msgspec.structs.replace(call, write_id=call.write_id or secrets.token_hex(8))
        until = time.monotonic() + write_yield(call.yield_time_ms, call.chars)
        asked = False
        while True:
            found = self._find(call.thread, call.process_id)
            thread = self._threads.get(call.thread)
            if isinstance(found, Record):
                self._threads.on_read((call.thread, call.process_id))
                return found.answer_write(call)
            if call.resume:
                try:
                    await self._threads.worker(thread)
                except Unavailable:
                    if not asked:
                        raise
                    # What a worker that died had accepted, whoever holds the process now types and answers for.
            await self._threads.handed_over(thread)
            peer = thread.worker
            left = max(0, int((until - time.monotonic()) * 1000))
            call = msgspec.structs.replace(call, yield_time_ms=left if asked else call.yield_time_ms)
            if found.custody.holder is Holder.BROKER:
                with self._talk(found) as held:
                    yield_s = write_yield(call.yield_time_ms, call.chars)
                    answer = await held.converse(call.chars, yield_s, call.max_output_tokens, call.write_id)
                    self._told(found, answer.outcome)
                return answer
            if found.custody.holder is Holder.NOBODY and found.state is not State.GONE:
                await found.changed()
                continue
            if peer is None:  # it is coming back, or about to be found dead
                await thread.changed()
                continue
            asked = True
            try:
                result = await peer.call(call, self._world.transmit, deadline)
            except WorkerGone:
                await self._threads.death_proved(thread, peer)  # until then it may still be typing
                continue
            except UnknownProcess:
                if call.process_id in thread.journal:  # collected by another call a moment ago
                    continue
                raise
            self._relayed(thread, result)
            return result

    @contextmanager
    def _talk(self, entry: Entry) -> Iterator[Held]:
        """Lend what we hold of a process to a call; afterwards it may be collected."""
        held = self._held(entry)
        entry.talks += 1
        try:
            yield held
        finally:
            entry.talks -= 1
            # After the reply has been sent: reading what is kept takes its time.
            asyncio.get_running_loop().call_soon(self._threads.settle, entry)

    def _relayed(self, thread: Thread, result: Any) -> None:
        if entry := thread.entries.get(result["process_id"]):
            self._told(entry, result["outcome"])

    def _told(self, entry: Entry, outcome: Any) -> None:
        entry.told = entry.told or outcome is not None
        if entry.told:
            self._threads.on_read(entry.key)

    # Looking.

    async def read_output(self, call: ReadOutput, deadline: float | None) -> Any:
        while True:
            found = self._find(call.thread, call.process_id)
            if isinstance(found, Record):
                return found.piece(call.offset, call.limit)
            piece = self._read(found, call)
            if piece.pieces or piece.gaps or piece.ended or not call.wait_ms:
                return piece
            thread = self._threads.get(call.thread)
            await self._threads.handed_over(thread)
            peer = thread.worker
            if found.custody.holder is Holder.BROKER:
                held = self._held(found)
                await held.until_output(call.offset, time.monotonic() + call.wait_ms / 1000)
                return self._read(found, call)
            if found.custody.holder is Holder.NOBODY and found.state is not State.GONE:
                await found.changed()
                continue
            if peer is None:
                await thread.changed()
                continue
            try:
                return await peer.call(call, self._world.transmit, deadline)
            except WorkerGone:
                continue
            except UnknownProcess:
                return self._read(found, call)

    def _read(self, entry: Entry, call: ReadOutput) -> Output:
        found = self._find(*entry.key)  # it may have gone into the journal meanwhile
        if isinstance(found, Record):
            return found.piece(call.offset, call.limit)
        assert found.transcript is not None
        return piece_of(found.transcript, call.offset, call.limit, ended=found.state is State.ENDED)

    def _held(self, entry: Entry) -> Held:
        held = self._threads.store.get(entry.key)
        if held is None:
            raise Unavailable(
                f"process {entry.key[1]} is not being drained, see the log; its worker may be stopped"
            )
        return held

    async def list_processes(self, call: messages.ListProcesses, deadline: float | None) -> list[dict[str, Any]]:
        if call.thread is not None:
            threads = [self._threads.get(call.thread)]
        else:  # which asks for none of them
            threads = [thread for _, thread in sorted(self._threads.threads.items())]
        rows = {
            entry.key: msgspec.structs.asdict(entry.row(thread.worker_pid))
            for thread in threads
            for entry in thread.entries.values()
            if call.after is None and entry.transcript and (call.ended or entry.state is not State.ENDED)
        }
        ended = self._ended(threads, call.after) if call.ended else iter(())
        for number, (key, row) in enumerate(islice(ended, call.at_most)):
            rows[key] = row
            if number % 50 == 49:
                await asyncio.sleep(0)  # let others have their turn
        return _fitting([*rows.values()])

    def _ended(self, threads: list[Thread], after: Key | None) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Yield the lines of what has ended, by thread, oldest first; `after`: of what follows it."""
        last_thread, last_process = after or ("", "")
        for thread in threads:
            if thread.thread_id >= last_thread:
                last = last_process if thread.thread_id == last_thread else ""
                for row in thread.journal.rows(last):
                    yield (thread.thread_id, row["process_id"]), row

    async def list_threads(self, call: messages.ListThreads, deadline: float | None) -> list[ThreadRow]:
        return [self._delivery.row(thread) for _, thread in sorted(self._threads.threads.items())]

    async def status(self, call: messages.Status, deadline: float | None) -> dict[str, Any]:
        states = [entry.state for entry in self._threads.entries()]
        phases = [thread.life.phase for thread in self._threads.threads.values()]
        return {
            "version": __version__,
            "protocol": messages.VERSION,
            "broker_pid": os.getpid(),
            "keeper_pid": self._world.keeper_pid,
            "threads": {
                "awake": sum(phase not in (Phase.ASLEEP, Phase.FAILED) for phase in phases),
                "asleep": phases.count(Phase.ASLEEP),
                "failed": phases.count(Phase.FAILED),
            },
            "processes": {
                state.value: states.count(state)
                for state in (State.STARTING, State.ATTACHED, State.DETACHED, State.ENDED)
            },
            "transcript_mode": self._mode,
            "descriptors_left": self._world.descriptors_left(),
            "started_at": rfc3339(self._started),
            "journal_trouble": self._threads.journal.trouble or None,
            "upgrade_failed": self._world.upgrade_failed or None,
        }

    async def upgrade(self, call: messages.Upgrade, deadline: float | None) -> None:
        raise Unavailable(f"the new broker did not come up, and this one goes on: {await self._world.upgrade()}")

    # Acting on processes.

    async def kill(self, call: messages.Kill, deadline: float | None) -> list[dict[str, Any]]:
        entries = [self._find(call.thread, process_id) for process_id in dict.fromkeys(call.process_ids)]
        live = [entry for entry in entries if isinstance(entry, Entry) and entry.state is not State.ENDED]
        signalled = await self._signal(live, call)
        if call.after_s is not None:
            await asyncio.gather(*(self._escalate(entry, call.after_s) for entry in live))
        return [
            {
                "thread": call.thread,
                "process_id": process_id,
                "signal": call.signal,
                "signalled": signalled.get(process_id, 0),
            }
            for process_id in dict.fromkeys(call.process_ids)
        ]

    async def _signal(self, entries: list[Entry], call: messages.Kill) -> dict[str, int]:
        """Signal these, all trees after one search; return how many processes of each."""
        for entry in entries:
            while entry.state is State.STARTING:
                await entry.changed()
        roots: dict[str, tree.Root] = {}
        signalled: dict[str, int] = {}
        for entry in entries:
            process_id, transcript = entry.key[1], entry.transcript
            if transcript is None or entry.state in (State.ENDED, State.GONE):
                continue
            if call.signal in _ENDING:
                transcript.record_by("caller")
            if not call.foreground:
                roots[process_id] = tree.root(transcript.facts.mark, entry.handles.pidfd)
                continue
            if not transcript.facts.tty:
                raise BadRequest(
                    f"process {process_id} has no terminal, so no foreground group; signal its tree instead"
                )
            try:
                kernel.signal_foreground(entry.handles.terminal, call.signal)
            except OSError as error:
                raise BadRequest(
                    f"process {process_id}: its foreground group took no {signal_name(call.signal)}: {error}"
                ) from None
            signalled[process_id] = 1
        if roots:
            reached = await asyncio.to_thread(tree.send, call.signal, *roots.values())
            signalled |= zip(roots, reached, strict=True)
        return signalled

    async def _escalate(self, entry: Entry, after_s: float) -> None:
        if await self._ended_within(entry, after_s) or entry.transcript is None:
            return
        entry.transcript.record_by("caller")
        await self._threads.feller.fell(entry.transcript.facts.mark, entry.handles)
        await self._ended_within(entry, _KILLED_WITHIN)

    async def _ended_within(self, entry: Entry, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while entry.state not in (State.ENDED, State.GONE):
                    await entry.changed()
        except TimeoutError:
            return False
        return True

    async def resize(self, call: messages.Resize, deadline: float | None) -> dict[str, Any]:
        found = self._find(call.thread, call.process_id)
        if isinstance(found, Record) or found.state is State.ENDED:
            raise BadRequest(f"process {call.process_id} has ended; it has no terminal any more")
        transcript = found.transcript
        if transcript is None or not transcript.facts.tty or found.handles.terminal < 0:
            raise BadRequest(f"process {call.process_id} has no terminal; rerun the command with --tty")
        kernel.set_window_size(found.handles.terminal, call.columns, call.rows)
        columns, rows = kernel.window_size(found.handles.terminal)
        return {"thread": call.thread, "process_id": call.process_id, "columns": columns, "rows": rows}

    # Acting on threads.

    async def create_thread(self, call: messages.CreateThread, deadline: float | None) -> ThreadRow:
        return self._delivery.row(self._threads.create(call.thread))

    async def detach(self, call: messages.Detach, deadline: float | None) -> DetachedProcessSummary:
        thread = self._threads.threads.get(call.thread)
        if thread is None:
            return DetachedProcessSummary.of([])
        if call.keep_worker:
            await self._threads.detach_thread_processes(call.thread)
        else:
            await self._delivery.rested(thread)
            await self._threads.put_to_bed(thread)
        held = [e.key[1] for e in thread.entries.values() if e.custody.holder is Holder.BROKER]
        return DetachedProcessSummary.of(held)

    async def resume(self, call: messages.Resume, deadline: float | None) -> ThreadRow:
        thread = self._threads.get(call.thread)
        while True:
            peer = await self._threads.worker(thread)
            await self._threads.handed_over(thread)
            try:
                # One that was killed a moment ago may not be dead yet: name only a worker that answers.
                await peer.call(messages.Deltas(wanted=self._world.deltas_wanted), self._world.transmit, deadline)
            except WorkerGone:
                await self._threads.death_proved(thread, peer)
                continue
            return self._delivery.row(thread)

    async def reattach(self, call: messages.Reattach, deadline: float | None) -> ReattachSummary:
        return await self._threads.reattach_thread_processes(self._threads.get(call.thread))

    async def clean(self, call: messages.Clean, deadline: float | None) -> DetachedProcessSummary:
        self._threads.get(call.thread)
        return await self._threads.clean_detached_thread_processes(call.thread)

    async def shutdown(self, call: messages.Shutdown, deadline: float | None) -> list[ThreadRow]:
        if call.thread is not None:
            threads, everything = [self._threads.get(call.thread)], call.all
        else:
            threads, everything = list(self._threads.threads.values()), True
        await asyncio.gather(*(self._shut_down(thread, everything=everything) for thread in threads))
        return [self._delivery.row(thread) for thread in threads]

    async def _shut_down(self, thread: Thread, *, everything: bool) -> None:
        await self._delivery.stop(thread.thread_id)  # what is ended here is nothing to be woken for
        await self._threads.shutdown_thread(thread, everything=everything)

    # Programs and wakes.

    async def start(self, call: messages.Start, deadline: float | None) -> ThreadRow:
        return await self._delivery.start(call)

    async def stop_program(self, call: messages.Stop, deadline: float | None) -> ThreadRow:
        return await self._delivery.stop(call.thread)

    async def list_wakes(self, call: messages.ListWakes, deadline: float | None) -> list[WakeRow]:
        if call.thread is not None:
            self._threads.get(call.thread)
        return self._delivery.rows(call.thread, everything=call.all, after=call.after, at_most=call.at_most)

    async def inventory(self, call: messages.Inventory, deadline: float | None) -> list[ProcessSummary]:
        return inventory.of(self._threads.get(call.thread))

    async def retry_wake(self, call: messages.RetryWake, deadline: float | None) -> WakeRow:
        return (await self._delivery.retry(call.number)).row()

    async def drop_wake(self, call: messages.DropWake, deadline: float | None) -> WakeRow:
        return (await self._delivery.drop(call.number)).row()

    async def down(self, call: messages.Down, deadline: float | None) -> dict[str, Any]:
        live = [f"{thread}/{process_id}" for thread, process_id in (e.key for e in self._threads.live_entries())]
        if live and not call.force:
            named = ", ".join(sorted(live)[:20]) + (" …" if len(live) > 20 else "")
            raise BadRequest(f"{len(live)} processes live: {named}; end them, or use `outlive down --force`")
        self._delivery.close()  # programs stay, and find at the next start what has come true
        threads = list(self._threads.threads.values())
        await asyncio.gather(*(self._threads.shutdown_thread(thread, everything=True) for thread in threads))
        self._stop()
        return {"ended": sorted(live)}

    def _find(self, thread_id: str, process_id: str) -> Entry | Record:
        return self._threads.find(thread_id, check_process(process_id))


def _fitting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines of `ps`, cut where together they are more than an answer can hold."""
    if sum(len(word) + 1 for row in rows for word in _words(row)) <= _WORDS_MAX:
        return rows
    most = _WORDS_MAX // len(rows) // 2
    return [_cut(row, most) if sum(map(len, _words(row))) > most else row for row in rows]


def _words(row: dict[str, Any]) -> list[str]:
    return [*row["command"], row["cwd"], *row.get("wake_on", ())]


def _cut(row: dict[str, Any], most: int) -> dict[str, Any]:
    command = brief(row["command"], most)
    (cwd,) = brief([row["cwd"]], most // 2)
    return {**row, "command": command, "cwd": cwd, "wake_on": brief(row.get("wake_on", []), most // 2)}
