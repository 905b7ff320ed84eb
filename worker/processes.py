"""The `ProcessManager`: a thread's processes while its worker is awake.

`exec_command` and `write_stdin` are the two tools as models know them; export and import are the two halves of a
handoff.  Every process is a `Held` (pumped here) with a `Watch` (what is told about it).

Always true
    A call id starts at most one process, also when the call comes again while the first is under way.
    An id that was ever used in this thread is not given out again.
    A process leaves the manager by exactly one of: collected, exported, ended by us, forgotten when told to.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..common import kernel, launch, rules
from ..common.config import Config
from ..common.descriptors import ROLES, Handles
from ..common.errors import (
    ExpiredProcess,
    HandoffError,
    LimitReached,
    PeerError,
    SpawnError,
    UnknownProcess,
)
from ..common.held import REPEATED_WITHIN, Held, exec_yield, write_yield
from ..common.messages import (
    AddedRule,
    Body,
    Collected,
    ExecCommand,
    Matched,
    Output,
    ReadOutput,
    WriteStdin,
)
from ..common.outcome import By
from ..common.pump import Pump, Pumps
from ..common.response import Response
from ..common.transcript import Facts, Lease
from ..common.tree import Feller
from . import pruning
from .commands import command_line, environment_of
from .ids import Ids
from .nursery import Nursery, Order
from .watchers import Watch

# Descriptors kept free: libzmq aborts the process when it meets EMFILE.
RESERVE = 64
# Calls remembered after their process was collected.  A repetition may be on its way before the broker has heard of
# that; what comes later, the broker answers from its journal.
CALLS_REMEMBERED = 10_000


@dataclass(slots=True)
class Managed:
    """A process of this manager, held and watched."""

    held: Held
    watch: Watch


@dataclass(slots=True)
class _Start:
    """A process that is being started, until it is in our hands."""

    process_id: str
    managed: asyncio.Future[Managed]


class ProcessManager:
    """The processes of one thread session.  `send` tells the broker; it never blocks."""

    def __init__(
        self,
        thread_id: str,
        epoch: int,
        nursery: Nursery,
        pumps: Pumps,
        pump: type[Pump],
        send: Callable[[Body], None],
        config: Config,
    ) -> None:
        self.thread_id = thread_id
        self.ids = Ids(config.seed)
        self._lease = Lease.mine(epoch)
        self._nursery = nursery
        self._pumps = pumps
        self._pump = pump
        self._send = send
        self._config = config
        self._processes: dict[str, Managed] = {}
        self._going: dict[str, Managed] = {}
        # What is being started, by call id.
        self._starts: dict[str, _Start] = {}
        self._calls: dict[str, str] = {}
        # Call ids of collected processes, oldest first.
        self._collected: dict[str, None] = {}
        self._talking: Counter[str] = Counter()
        self._answered: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._feller = Feller()
        self._deltas = False

    @property
    def process_ids(self) -> list[str]:
        """The processes held here, sorted as strings."""
        return sorted(self._processes)

    @property
    def starting(self) -> list[str]:
        """The ids of the processes that are being started, sorted as strings."""
        return sorted(start.process_id for start in self._starts.values())

    def held(self, process_id: str) -> Held:
        """Return one process; raises `UnknownProcess`."""
        return self._managed(process_id).held

    # The two tools.

    async def exec_command(self, call: ExecCommand) -> Response:
        """Start a command and return what it printed until its end or for `yield_time_ms`.

        The same `call_id` again returns the same process, with its output from the beginning.
        Raises `SpawnError` when the program never ran, `BadRequest` for a command that cannot be one,
        `LimitReached` where a limit forbids another process, `ExpiredProcess` when the call's process is collected.
        """
        started = time.monotonic()
        warnings: list[str] = []
        if call.call_id in self._collected:
            raise ExpiredProcess(f"call {call.call_id} was answered before, and its process has been collected")
        known = self._calls.get(call.call_id)
        under_way = self._starts.get(call.call_id)
        process_id = known or (under_way.process_id if under_way else self.ids.next())
        # From here on, so that a process is not let go between its start and all that waited for it.
        with self._talk(process_id):
            if known:
                managed = self._managed(process_id)
            elif under_way:
                managed = await asyncio.shield(under_way.managed)
            else:
                managed = await self._start_once(call, process_id, warnings)
            await managed.held.until_ended(started + exec_yield(call.yield_time_ms))
            since = 0 if known or under_way else None
            response = managed.held.answer(started, call.max_output_tokens, since=since, warnings=warnings)
        self._answered.add(process_id)
        return response

    async def write_stdin(self, call: WriteStdin) -> Response:
        """Type into a process, or poll it, and return what it printed since the last call.

        The same `write_id` again types nothing more, also when the first try was a former worker's.
        Raises `UnknownProcess` for an id that is not here, `StdinClosed` without a terminal.
        """
        held = self.held(call.process_id)
        with self._talk(call.process_id):
            yield_s = write_yield(call.yield_time_ms, call.chars)
            response = await held.converse(call.chars, yield_s, call.max_output_tokens, call.write_id)
        self._answered.add(call.process_id)
        return response

    async def read_output(self, call: ReadOutput) -> Output:
        """Return a piece of a transcript without delivering it; waits up to `wait_ms` for more."""
        held = self.held(call.process_id)
        with self._talk(call.process_id):
            await held.until_output(call.offset, time.monotonic() + call.wait_ms / 1000)
            return held.piece(call.offset, call.limit)

    def settle(self, heard: Callable[[], bool] = lambda: True) -> None:
        """Drop the processes whose end and all output were in answers that have been sent.

        `heard` tells whether there is a broker to hear them; else they are kept for the repetitions.
        """
        told = []
        for process_id in self._answered:
            managed = self._processes.get(process_id)
            if managed is None or not managed.held.ended or self._talking[process_id]:
                continue
            if managed.held.transcript.live().delivered >= managed.held.pump.written:
                told.append(managed)
        self._answered.clear()
        if told and heard():
            for managed in told:
                self._drop(managed)

    # Handoff.

    async def export_processes(self, wanted: Callable[[], bool] = lambda: True) -> list[str]:
        """Stop pumping everything and return the ids, now the broker's; calls under way answer first.

        `wanted` tells whether the broker that asked is still there once no start is under way: else nothing is
        given, since nobody would take it.  Their ids are unknown here afterwards, their streams have stopped.
        """
        await self._started()
        if not wanted():
            return []
        for task in self._tasks:
            task.cancel()
        managed = [*self._processes.values(), *self._going.values()]
        exported = sorted(one.held.process_id for one in managed)
        self._processes.clear()
        self._going.clear()
        for one in managed:
            one.watch.output(one.held.pump.written)
            one.watch.abort()
            one.held.hurry()
        # Whoever was hurried still reads from these handles.
        while any(self._talking[process_id] for process_id in exported):
            await asyncio.sleep(0)
        for one in managed:
            one.held.release().close()
        self._calls.clear()
        return exported

    def import_processes(
        self,
        parcel: dict[tuple[str, str], Handles],
        streams: dict[str, tuple[int, int]] | None = None,
        added: dict[str, list[AddedRule]] | None = None,
    ) -> list[str]:
        """Take processes over and pump them; return the ids that were refused, their handles closed.

        `streams`, `added`: as in the message, `added` being its `rules`.  On a collision the attached process wins,
        and the detached one stays the broker's.
        """
        refused = []
        for (thread_id, process_id), handles in parcel.items():
            if thread_id != self.thread_id or process_id in self._processes:
                handles.close()
                refused.append(process_id)
                continue
            try:
                held = self._hold(handles)
                if held.key != (thread_id, process_id):
                    raise PeerError(f"parcel calls {held.key} {(thread_id, process_id)}")
                seq, offset = (streams or {}).get(process_id, (0, None))
                self._adopt(held, seq, offset, added=(added or {}).get(process_id, ()))
            except (HandoffError, PeerError, OSError):
                handles.close()
                refused.append(process_id)
        return refused

    # Ending.

    async def terminate_all_processes(self, by: By = "shutdown") -> list[str]:
        """End every process and its tree, without end events; return their ids."""
        await self._started()
        ids = self.process_ids
        ends = [self._end(process_id, by) for process_id in ids]
        if ends:
            await asyncio.wait(ends)
        return ids

    def forget(self, process_ids: list[str]) -> None:
        """Drop processes that the broker has dealt with."""
        for process_id in process_ids:
            if managed := self._processes.pop(process_id, None):
                managed.watch.abort()
                self._let_go(managed)

    def want_deltas(self, wanted: bool) -> None:
        """Send output deltas from here on, or stop."""
        self._deltas = wanted
        for managed in self._processes.values():
            if not wanted:
                managed.watch.offset = None
            elif managed.watch.offset is None:
                managed.watch.offset = managed.held.pump.written

    def tell_of_ends(self) -> None:
        """Tell a new broker, which cannot know, of the ended processes that nobody has collected."""
        for managed in list(self._processes.values()):
            if managed.held.ended:
                self._ended(managed.held)

    def deposits(self) -> dict[tuple[str, str], dict[str, int]]:
        """Return all descriptors, on loan, for a broker that has none of them."""
        held = [managed.held for managed in (*self._processes.values(), *self._going.values())]
        return {one.key: one.handles.held() for one in held}

    def close(self) -> None:
        """Let everything go; the broker has its own copies."""
        for task in self._tasks:
            task.cancel()
        for managed in (*self._processes.values(), *self._going.values()):
            managed.watch.abort()
            managed.held.release().close()
        self._processes.clear()
        self._going.clear()

    # Starting.

    async def _started(self) -> None:
        """Wait until no start is under way."""
        while self._starts:
            await asyncio.wait([start.managed for start in self._starts.values()])

    async def _start_once(self, call: ExecCommand, process_id: str, warnings: list[str]) -> Managed:
        start: asyncio.Future[Managed] = asyncio.get_running_loop().create_future()
        start.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._starts[call.call_id] = _Start(process_id, start)
        try:
            order = self._order(call, process_id)
            self._make_room(warnings)
            handles = await self._nursery.start(order)
            try:
                managed = self._adopt(self._hold(handles, order.facts), 0, 0 if self._deltas else None)
            except BaseException:
                handles.close()
                raise
        except BaseException as error:
            start.set_exception(error if isinstance(error, Exception) else SpawnError("the worker is ending"))
            raise
        else:
            start.set_result(managed)
        finally:
            del self._starts[call.call_id]
        self._warn(warnings)
        return managed

    def _order(self, call: ExecCommand, process_id: str) -> Order:
        mark = secrets.token_hex(16)
        facts = Facts(
            thread_id=self.thread_id,
            process_id=process_id,
            call_id=call.call_id,
            mark=mark,
            argv=tuple(command_line(call)),
            cwd=call.workdir,
            tty=call.tty,
            columns=call.columns,
            rows=call.rows,
            started_at_ns=time.time_ns(),
            boot_id=kernel.boot_id(),
            wake_on=tuple(str(rule) for rule in rules.parse_all(call.wake_on)),
        )
        return Order(facts, environment_of(call, facts), self._lease)

    def _make_room(self, warnings: list[str]) -> None:
        limit = self._config.max_processes
        room = (launch.descriptor_limit() - RESERVE) // len(ROLES)
        if len(self._processes) + len(self._going) + len(self._starts) > room:
            raise LimitReached(
                f"thread {self.thread_id}: {len(self._processes)} processes leave no descriptors for another "
                f"(limit {launch.descriptor_limit()}); end some, or raise the limit on open files"
            )
        # One that lives has to be enough, though a handoff may have brought more: each was wanted.
        victim_lived = False
        while len(self._processes) + len(self._starts) > limit and not victim_lived:
            spare_live = self._config.when_full == "refuse"
            victim = pruning.choose(
                (
                    pruning.Candidate(process_id, managed.held.last_used, managed.held.ended)
                    for process_id, managed in self._processes.items()
                    if not self._talking[process_id] or managed.held.ended
                ),
                spare_live=spare_live,
            )
            if victim is None:
                raise LimitReached(
                    f"thread {self.thread_id}: it holds {len(self._processes)} processes, max_processes is "
                    f"{limit}, and none may be ended to make room; end one, or raise max_processes"
                )
            managed = self._processes[victim]
            if managed.held.ended:
                self._drop(managed)
            else:
                victim_lived = True
                self._end(victim, "pruned")
                warnings.append(f"process {victim} was ended to make room: this thread may hold {limit} processes")

    def _warn(self, warnings: list[str]) -> None:
        count = len(self._processes)
        if count >= self._config.warn_at:
            warnings.append(
                f"{count} processes are open; at {self._config.max_processes} the least recently used are "
                "ended: reuse or end some"
            )

    # Holding.

    def _managed(self, process_id: str) -> Managed:
        managed = self._processes.get(process_id)
        if managed is None:
            raise UnknownProcess(f"process {process_id} is not known in thread {self.thread_id}; see `outlive ps`")
        return managed

    def _hold(self, handles: Handles, facts: Facts | None = None) -> Held:
        return Held(
            handles,
            self._pumps,
            self._pump,
            facts=facts,
            on_ended=self._ended,
            on_output=self._output,
            on_found=lambda held: self._send(Matched(process_id=held.process_id)),
        )

    def _adopt(self, held: Held, seq: int, offset: int | None, added: Sequence[AddedRule] = ()) -> Managed:
        facts = held.transcript.facts
        if self._deltas and offset is None:
            offset = held.pump.written
        watch = Watch(held.transcript, self._send, seq=seq, offset=offset)
        managed = Managed(held, watch)
        self.ids.use([held.process_id])
        self._processes[held.process_id] = managed
        self._calls[facts.call_id] = held.process_id
        # Collected, and here again: the broker died before it had recorded that.
        self._collected.pop(facts.call_id, None)
        try:
            held.begin(self._lease, added)
        except BaseException:
            del self._processes[held.process_id]
            self._calls.pop(facts.call_id, None)
            raise
        return managed

    def _output(self, held: Held) -> None:
        if self._deltas and (managed := self._processes.get(held.process_id)):
            managed.watch.output(held.pump.written)

    def _ended(self, held: Held) -> None:
        managed = self._processes.get(held.process_id) or self._going.get(held.process_id)
        if managed:
            managed.watch.ended(held.pump.written)
            if held.transcript.live().told:  # to whom, a broker knew that has died
                asyncio.get_running_loop().call_later(REPEATED_WITHIN, self._settle_told, held.process_id)

    def _settle_told(self, process_id: str) -> None:
        self._answered.add(process_id)
        self.settle()

    @contextmanager
    def _talk(self, process_id: str) -> Iterator[None]:
        """Let nothing of a process go meanwhile."""
        self._talking[process_id] += 1
        try:
            yield
        finally:
            self._talking[process_id] -= 1
            if not self._talking[process_id]:
                del self._talking[process_id]

    def _drop(self, managed: Managed) -> None:
        process_id = managed.held.process_id
        self._processes.pop(process_id, None)
        self._going.pop(process_id, None)
        self._send(Collected(process_id=process_id))
        self._collected[managed.held.transcript.facts.call_id] = None
        if len(self._collected) > CALLS_REMEMBERED:
            del self._collected[next(iter(self._collected))]
        self._let_go(managed)

    def _let_go(self, managed: Managed) -> None:
        held = managed.held
        self._calls.pop(held.transcript.facts.call_id, None)
        if not self._talking[held.process_id]:
            held.release().close()
            return
        held.hurry()  # whoever talks about it still reads from its descriptors
        self._beside(self._release_when_quiet(held))

    async def _release_when_quiet(self, held: Held) -> None:
        while self._talking[held.process_id]:
            await asyncio.sleep(0)
        held.release().close()

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _end(self, process_id: str, by: By) -> asyncio.Task[None]:
        """Take a process out and end its tree; its end is reported to the broker, and to nobody else."""
        managed = self._processes.pop(process_id)
        self._going[process_id] = managed
        managed.watch.abort()
        managed.held.hurry()
        managed.held.transcript.record_by(by)
        return self._beside(self._see_off(managed))

    async def _see_off(self, managed: Managed) -> None:
        held = managed.held
        await self._feller.fell(held.transcript.facts.mark, held.handles)
        while not await held.until_ended():
            await asyncio.sleep(0.01)
        while self._talking[held.process_id]:
            await asyncio.sleep(0)
        self._drop(managed)
