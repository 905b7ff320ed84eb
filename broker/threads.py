"""The `ThreadManager`: every thread, its worker and its processes; does what custody and lifecycle decide.

Always true
    An event is decided and carried out without an `await` in between.
    What is known of a process is in its entry; an entry leaves the table only as GONE.
    Descriptors that are sent are looked up at the moment of sending, never remembered across an `await`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import msgspec

from ..common import ending, kernel, tree
from ..common.channel import DESCRIPTORS_MAX, parcel_rows
from ..common.config import Config
from ..common.descriptors import Handles
from ..common.errors import (
    BadRequest,
    HandoffError,
    LimitReached,
    OutliveError,
    PeerError,
    Unavailable,
    UnknownThread,
)
from ..common.held import Held
from ..common.launch import MARK
from ..common.messages import (
    Begin,
    Body,
    Bye,
    Collected,
    Delta,
    Deltas,
    DetachedProcessSummary,
    Ended,
    Export,
    Forget,
    Import,
    Orphaned,
    ProcessRow,
    ReattachSummary,
    TerminateAll,
    ThreadRow,
    Welcome,
)
from ..common.outcome import By, Outcome
from ..common.paths import Paths, check_thread
from ..common.pump import Pump, Pumps
from ..common.transcript import Transcript
from . import custody, lifecycle
from .archive import Record, ThreadArchive
from .custody import Custody, Effect, Event, Holder, State
from .detached import DetachedStore
from .lifecycle import Life, Phase
from .peers import Peer, WorkerGone

# Seconds for a handoff message to be answered; a worker that is stopped is not robbed, only left alone.
HANDOFF_DEADLINE = 30.0
# Seconds that a worker, told to end everything, has before its processes are ended without it.
TERMINATE_DEADLINE = 10.0
# Seconds after its start that a broker waits for the workers that survived the former one.  They try again at least
# every five (`Link`).
SURVIVORS_DEADLINE = 10.0
# Records that may wait to be written; each may hold a whole transcript.
WRITES_MAX = 64
# Threads at most: each has files, and a worker when awake.
THREADS_MAX = 10_000
_SEND_PAUSE = 0.002

T = TypeVar("T")


class World(Protocol):
    """What the loop does for us."""

    deltas_wanted: bool

    def start_worker(self, thread_id: str, epoch: int) -> tuple[int, int]:
        """Start a worker; return its pid and a pidfd, which stays the loop's.  Raises `OSError`."""

    def kill_worker(self, pid: int) -> None:
        """Kill a worker."""

    def transmit(self, peer: Peer, frame: bytes) -> None:
        """Send a frame; raises `zmq.ZMQError`."""

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        """Tell the subscribers."""

    def descriptors_left(self) -> int:
        """How many descriptors may still be opened before the reserve."""

    def log(self, text: str) -> None:
        """Write to the log."""


class Entry:
    """What the broker knows and holds of one process."""

    __slots__ = (
        "announced",
        "custody",
        "ending",
        "epoch",
        "handles",
        "key",
        "pid",
        "relayed",
        "stream",
        "talks",
        "told",
        "transcript",
        "typists",
        "waiters",
    )

    def __init__(self, key: tuple[str, str], epoch: int) -> None:
        self.key = key
        self.epoch = epoch
        self.custody = Custody()
        self.handles = Handles()
        self.transcript: Transcript | None = None
        self.pid = 0
        # Whether the one end event went out.
        self.announced = False
        # Where the stream of deltas goes on: (next number, offset).
        self.stream: tuple[int, int] | None = None
        # Up to which offset the agent has been answered, by us.
        self.relayed = 0
        # Whether an answer told of its end.
        self.told = False
        # Calls that we answer from our own copies at this moment.
        self.talks = 0
        # Calls that type into it at this moment.
        self.typists = 0
        self.waiters: list[asyncio.Future[None]] = []
        self.ending: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Where it stands."""
        return self.custody.state

    @property
    def call_id(self) -> str:
        """The call that started it."""
        return self.transcript.facts.call_id if self.transcript else ""

    async def changed(self) -> None:
        """Wait for its next move."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        finally:
            with suppress(ValueError):
                self.waiters.remove(waiter)


class Thread:
    """One agent thread: its processes, its archive, its worker."""

    def __init__(self, thread_id: str, archive: ThreadArchive) -> None:
        self.thread_id = thread_id
        self.archive = archive
        self.entries: dict[str, Entry] = {}
        self.life = Life()
        self.epoch = 0
        self.worker_pid: int | None = None
        self.worker: Peer | None = None
        # The epoch whose channel is closed, for good if its worker is dead.
        self.hung_up = 0
        # Workers that are dead while their spawners still hold their channels: a start may come out of these.
        self.former: set[Peer] = set()
        self.failure = ""
        self.waiters: list[asyncio.Future[None]] = []
        # One handoff at a time; and the one that a new worker begins with.
        self.handoff = asyncio.Lock()
        self.taking_back: asyncio.Task[None] | None = None
        # Whether its worker survived a former broker and has not reported yet: its processes are not known before.
        self.expected = False

    def entry_of_call(self, call_id: str) -> Entry | None:
        """Return the process that this call started, if it is still held."""
        for entry in self.entries.values():
            if call_id and entry.call_id == call_id:
                return entry
        return None

    async def changed(self) -> None:
        """Wait for the next step of its life."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        finally:
            with suppress(ValueError):
                self.waiters.remove(waiter)


class ThreadManager:
    """All threads of this broker."""

    def __init__(self, world: World, paths: Paths, config: Config, pumps: Pumps, pump: type[Pump]) -> None:
        self._world = world
        self._paths = paths
        self._config = config
        self.store = DetachedStore(pumps, pump, on_ended=self._held_ended, on_closed=lambda held: None)
        self.threads: dict[str, Thread] = {}
        # How many descriptors of processes are held.
        self.descriptors = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # One thread, so that files are written in order; a new file takes longer than the command it is about.
        self._writer = ThreadPoolExecutor(1, "archive")
        self._writes: set[Future[None]] = set()
        self._survivors_until = asyncio.get_running_loop().time() + SURVIVORS_DEADLINE
        for folder in sorted(paths.threads.iterdir()):
            if folder.is_dir():
                try:
                    self.create(folder.name)
                except OutliveError as error:  # one folder must not keep everybody's broker down
                    world.log(f"{folder} is left alone: {error}")

    # Threads.

    def create(self, thread_id: str) -> Thread:
        """Return a thread, made known if it is new."""
        if thread := self.threads.get(thread_id):
            return thread
        check_thread(thread_id)
        if len(self.threads) >= THREADS_MAX:
            raise LimitReached(
                f"{THREADS_MAX} threads exist; use one of them, or remove some from the state folder"
            )
        try:
            archive = ThreadArchive(
                self._paths.threads / thread_id,
                self._config.ended_keep_hours,
                self._config.ended_keep_count,
                self._write_later,
            )
        except OSError as error:
            raise Unavailable(f"state folder: {error}; make room or rights, then try again") from None
        thread = self.threads[thread_id] = Thread(thread_id, archive)
        return thread

    def _write_later(self, write: Callable[[], None]) -> None:
        if len(self._writes) >= WRITES_MAX:
            wait(self._writes, return_when=FIRST_COMPLETED)
        job = self._writer.submit(self._write, write)
        self._writes.add(job)
        job.add_done_callback(self._writes.discard)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._world.log(f"archive: {error}")

    def get(self, thread_id: str) -> Thread:
        """Return a known thread; raises `UnknownThread`."""
        check_thread(thread_id)
        thread = self.threads.get(thread_id)
        if thread is None:
            raise UnknownThread(f"thread {thread_id} is not known; `outlive exec -t {thread_id} …` creates it")
        return thread

    def live_entries(self) -> list[Entry]:
        """Return every process that has not ended."""
        return [
            entry
            for thread in self.threads.values()
            for entry in thread.entries.values()
            if entry.state is not State.ENDED
        ]

    async def worker(self, thread: Thread) -> Peer:
        """Return the thread's worker, started if need be; raises `Unavailable` when none comes up."""
        self._live(thread, lifecycle.Event.WANTED)
        while True:
            if thread.life.phase is Phase.AWAKE and thread.worker:
                return thread.worker
            if thread.life.phase is Phase.FAILED:
                raise Unavailable(
                    f"thread {thread.thread_id}: its worker does not come up ({thread.failure}); its processes "
                    f"are safe; see {self._paths.log}, then try again"
                )
            if thread.life.phase is Phase.ASLEEP:
                raise Unavailable(f"thread {thread.thread_id}: its worker was sent to bed during the call")
            await thread.changed()

    def expect(self, thread_id: str, epoch: int, pid: int) -> None:
        """Take note of a worker that survived a former broker, and will report."""
        thread = self.create(thread_id)
        thread.epoch, thread.worker_pid = epoch, pid
        thread.life = Life(Phase.STARTING)
        thread.expected = True

    async def survivors_reported(self, thread_id: str | None) -> None:
        """Wait until a thread's worker (`None`: every thread's) that survived a former broker has reported.

        Before, its living processes would be called expired.  A stopped one is not waited for any longer than
        `SURVIVORS_DEADLINE`.
        """
        for thread in list(self.threads.values()):
            if thread.expected and thread_id in (None, thread.thread_id):
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._survivors_until):
                        while thread.expected:
                            await thread.changed()

    def registered(self, peer: Peer) -> Welcome:
        """A worker has said that it is up; return what it is told."""
        thread = self.threads[peer.thread_id]
        if thread.worker and thread.worker is not peer:
            thread.worker.hang_up()
        thread.worker = peer
        thread.expected = False
        thread.hung_up = 0
        self._live(thread, lifecycle.Event.REGISTERED)
        return Welcome.of(thread.archive.ids, deltas=self._world.deltas_wanted)

    def worker_died(self, thread_id: str, epoch: int, how: str) -> None:
        """The kernel says that a thread's worker is dead."""
        thread = self.threads[thread_id]
        if thread.epoch != epoch:
            return
        peer, thread.worker, thread.worker_pid = thread.worker, None, None
        if peer:
            peer.hang_up()
        thread.expected = False
        if peer and peer.channel.fileno() >= 0:
            thread.former.add(peer)
        thread.failure = how
        self._world.publish("worker", thread_id, what="died", epoch=epoch, how=how)
        for entry in list(thread.entries.values()):
            if entry.epoch == epoch and entry.custody.holder is not Holder.BROKER:
                self.move(entry, Event.WORKER_LOST)
                self.settle(entry)  # it may have died before it could say that this one was collected
        if thread.hung_up == epoch:  # its channel closed first, and the spawner had it too
            self._resolve_starts(thread, epoch)
        self._live(thread, lifecycle.Event.DIED)

    def channel_closed(self, peer: Peer) -> None:
        """No more deposits come through it.  A worker that lives will come back with another channel."""
        thread = self.threads.get(peer.thread_id)
        if thread is None:
            return
        if thread.worker is peer:
            thread.worker = None
        thread.former.discard(peer)
        _wake(thread.waiters)
        if thread.epoch == peer.epoch and thread.worker_pid is not None:
            thread.hung_up = peer.epoch
        else:
            self._resolve_starts(thread, peer.epoch)

    def _resolve_starts(self, thread: Thread, epoch: int) -> None:
        """Worker and spawner of this epoch are both gone: what has not started never will."""
        for entry in list(thread.entries.values()):
            if entry.epoch == epoch and entry.state is State.STARTING:
                self._resolve_start(entry)

    def dismiss(self, thread: Thread) -> None:
        """Send the thread's worker to bed."""
        self._live(thread, lifecycle.Event.DISMISSED)

    def _live(self, thread: Thread, event: lifecycle.Event) -> None:
        try:
            thread.life, effects = lifecycle.step(thread.life, event)
        except KeyError:
            self._world.log(f"thread {thread.thread_id}: {event} in {thread.life} ignored")
            return
        for effect in effects:
            self._do_life(thread, effect)
        _wake(thread.waiters)

    def _do_life(self, thread: Thread, effect: lifecycle.Effect) -> None:
        loop = asyncio.get_running_loop()
        if effect is lifecycle.Effect.START_WORKER:
            thread.epoch += 1
            try:
                thread.worker_pid, _ = self._world.start_worker(thread.thread_id, thread.epoch)
            except OSError as error:
                thread.failure = str(error)
                epoch = thread.epoch
                loop.call_soon(self.worker_died, thread.thread_id, epoch, f"could not be started: {error}")
        elif effect is lifecycle.Effect.PAUSE:
            self._timers[thread.thread_id] = loop.call_later(
                thread.life.pause, self._live, thread, lifecycle.Event.PAUSE_OVER
            )
        elif effect is lifecycle.Effect.WELCOME:
            self._world.publish("worker", thread.thread_id, what="up", epoch=thread.epoch, pid=thread.worker_pid)
            thread.taking_back = self.spawn(self._take_back(thread))
        elif effect is lifecycle.Effect.SAY_BYE and thread.worker:
            self.spawn(self._tell(thread.worker, Bye()))
        if thread.life.phase is not Phase.PAUSING and (timer := self._timers.pop(thread.thread_id, None)):
            timer.cancel()

    async def _take_back(self, thread: Thread) -> None:
        with suppress(OutliveError):
            await self._reattach(thread)

    async def _tell(self, peer: Peer, order: Body) -> None:
        with suppress(OutliveError):
            await peer.call(order, self._world.transmit)

    async def handed_over(self, thread: Thread) -> None:
        """Wait for a handoff that is under way."""
        if thread.taking_back:
            await asyncio.wait({thread.taking_back})
        async with thread.handoff:
            pass

    async def started(self, thread: Thread, call_id: str) -> None:
        """Wait while a spawner whose worker is dead may still be about to start something for this call."""
        while any(call_id in peer.starts for peer in thread.former):
            await thread.changed()

    async def gone(self, thread: Thread) -> None:
        """Wait until the worker process that the thread has now is gone; a call may want the next one at once."""
        epoch = thread.epoch
        while thread.worker_pid is not None and thread.epoch == epoch:
            await thread.changed()

    # Handoff: the names of the design.

    async def detach_thread_processes(self, thread_id: str) -> DetachedProcessSummary:
        """Take a thread's processes from its worker; an unknown or sleeping thread is an empty summary.

        Raises `Unavailable` when the worker does not answer: it may still be pumping, so nothing is taken.
        """
        thread = self.threads.get(thread_id)
        if thread is None or thread.worker is None:
            return DetachedProcessSummary.of([])
        return await self._within(thread, self._detach(thread), "gives its processes back")

    async def _detach(self, thread: Thread) -> DetachedProcessSummary:
        async with thread.handoff:
            peer = thread.worker
            if peer is None:
                return DetachedProcessSummary.of([])
            mine = [entry for entry in thread.entries.values() if entry.custody.holder is Holder.WORKER]
            try:
                exported = await self._order(peer, Export())
            except WorkerGone:
                exported = [entry.key[1] for entry in mine]  # its death hands them over
            for process_id in exported:
                entry = thread.entries.get(process_id)
                if entry and entry.custody.holder is Holder.WORKER and entry.epoch == peer.epoch and peer.open:
                    self.move(entry, Event.DETACHED)
                    self._world.publish("detached", thread.thread_id, process_id, call_id=entry.call_id)
        return DetachedProcessSummary.of([str(process_id) for process_id in exported])

    async def _order(self, peer: Peer, order: Body) -> Any:
        """Give a worker an order of a handoff and wait for the answer, however long that takes.

        A worker that got it may act on it at any time, so nobody may walk away before it answers or dies; one
        that gets it too late refuses.
        """
        return await peer.call(order, self._world.transmit, kernel.boottime() + HANDOFF_DEADLINE, patient=True)

    async def _within(self, thread: Thread, handoff: Coroutine[Any, Any, T], what: str) -> T:
        """Wait for a handoff within its deadline; a slow one goes on without its caller."""
        task = self.spawn(handoff)
        done, _ = await asyncio.wait({task}, timeout=HANDOFF_DEADLINE)
        if not done:
            raise Unavailable(
                f"thread {thread.thread_id}: its worker (pid {thread.worker_pid}) is slow or stopped; "
                f"it {what} when it answers"
            )
        result: T = task.result()
        return result

    async def reattach_thread_processes(self, thread: Thread) -> ReattachSummary:
        """Give what is detached to the thread's worker; raises `BadRequest` when there is none."""
        return await self._within(thread, self._reattach(thread), "takes its processes back")

    async def _reattach(self, thread: Thread) -> ReattachSummary:
        async with thread.handoff:
            peer = thread.worker
            if peer is None or thread.life.phase is not Phase.AWAKE:
                raise BadRequest(
                    f"thread {thread.thread_id} has no worker; `outlive resume {thread.thread_id}` starts one, "
                    "which takes its processes back"
                )
            entries = [
                entry
                for entry in thread.entries.values()
                if entry.custody.holder is Holder.BROKER and entry.ending is None
            ]
            if not entries:
                return ReattachSummary.of(0, [])
            for entry in entries:
                entry.epoch = peer.epoch
                self.move(entry, Event.REATTACHED)
            ids = [entry.key[1] for entry in entries]
            try:
                tickets = await self._send_parcels(peer, entries)
                streams = {entry.key[1]: entry.stream for entry in entries if entry.stream}
                summary = await self._order(peer, Import(tickets=tickets, streams=streams))
                skipped = set(summary["skipped_process_ids"])
            except WorkerGone:
                return ReattachSummary.of(0, ids)  # back with us since its death
            except OutliveError as error:
                self._world.log(f"thread {thread.thread_id}: its worker took nothing back: {error}")
                skipped = set(ids)
            for entry in entries:
                process_id = entry.key[1]
                if entry.custody.holder is not Holder.WORKER or entry.epoch != peer.epoch:
                    continue
                if process_id in skipped:
                    self.move(entry, Event.SKIPPED)
                elif entry.state is not State.GONE:
                    self._world.publish("reattached", thread.thread_id, process_id, call_id=entry.call_id)
            return ReattachSummary.of(len(entries) - len(skipped), sorted(skipped))

    async def _send_parcels(self, peer: Peer, entries: list[Entry]) -> list[str]:
        tickets = []
        waiting = list(entries)
        while waiting:
            parcel: dict[tuple[str, str], dict[str, int]] = {}
            room = DESCRIPTORS_MAX
            taken = 0
            for entry in waiting:
                held = entry.handles.held()
                if len(held) > room:
                    break
                taken += 1
                if held and entry.custody.holder is Holder.WORKER:
                    parcel[entry.key] = held
                    room -= len(held)
            ticket = f"{peer.epoch}-{os.urandom(6).hex()}"
            rows, fds = parcel_rows(parcel)
            try:
                peer.channel.send("parcel", fds, ticket=ticket, processes=rows)
            except BlockingIOError:
                await asyncio.sleep(_SEND_PAUSE)
                if not peer.open:
                    raise WorkerGone("the worker died during the handoff") from None
                continue
            except OSError as error:
                raise WorkerGone(f"the worker's channel broke: {error.strerror}") from None
            tickets.append(ticket)
            waiting = waiting[taken:]
        return tickets

    async def clean_detached_thread_processes(self, thread_id: str, by: By = "cleaned") -> DetachedProcessSummary:
        """End a thread's detached processes and drop them; attached ones are left alone."""
        thread = self.threads.get(thread_id)
        if thread is None:
            return DetachedProcessSummary.of([])
        async with thread.handoff:
            entries = [e for e in thread.entries.values() if e.custody.holder is Holder.BROKER]
            await self._end(entries, by)
        return DetachedProcessSummary.of([entry.key[1] for entry in entries])

    async def clean_all_detached_processes(self, by: By = "cleaned") -> DetachedProcessSummary:
        """Do that for every thread."""
        ids: list[str] = []
        for thread_id in list(self.threads):
            ids += (await self.clean_detached_thread_processes(thread_id, by)).process_ids
        return DetachedProcessSummary.of(ids)

    async def _end(self, entries: list[Entry], by: By) -> None:
        """End processes that we hold, and see them gone."""
        for entry in entries:
            if entry.state is State.DETACHED and entry.ending is None and entry.transcript:
                entry.transcript.record_by(by)
                self.move(entry, Event.CLEANED)
        for entry in entries:
            while entry.state is State.DETACHED:
                await entry.changed()
            if entry.state is State.ENDED:
                self.move(entry, Event.CLEANED)

    async def shutdown_thread(self, thread: Thread, *, everything: bool) -> None:
        """End a thread's worker and attached processes; `everything`: detached ones too."""
        while thread.life.phase in (Phase.STARTING, Phase.PAUSING):
            if thread.life.phase is Phase.PAUSING:
                break
            await thread.changed()
        if peer := thread.worker:
            deadline = kernel.boottime() + TERMINATE_DEADLINE
            try:
                await peer.call(TerminateAll(), self._world.transmit, deadline)
                self.dismiss(thread)
            except Unavailable:
                # It is stopped or stuck, and the user wants it gone.
                self._world.log(f"thread {thread.thread_id}: its worker does not end its processes; ending it")
                mine = [e for e in thread.entries.values() if e.custody.holder is Holder.WORKER]
                self.dismiss(thread)
                if thread.worker_pid:
                    self._world.kill_worker(thread.worker_pid)
                await self.gone(thread)
                await self._end(mine, "shutdown")
            except OutliveError:
                self.dismiss(thread)
        else:
            self.dismiss(thread)
        await self.gone(thread)
        if everything:
            await self.clean_detached_thread_processes(thread.thread_id, "shutdown")

    # What workers tell.

    def noticed(self, peer: Peer, notice: Body) -> None:
        """A worker has told something about one of its processes."""
        thread = self.threads[peer.thread_id]
        process_id: str = notice.process_id  # type: ignore[attr-defined]
        entry = thread.entries.get(process_id)
        if entry is None or entry.epoch != peer.epoch:
            return
        if isinstance(notice, Begin):
            argv = [os.fsdecode(word) for word in notice.argv]
            self._world.publish(
                "begin", thread.thread_id, process_id, call_id=notice.call_id, pid=notice.pid, command=argv
            )
        elif isinstance(notice, Delta):
            entry.stream = notice.seq + 1, notice.offset + len(notice.chunk)
            self._world.publish(
                "delta",
                thread.thread_id,
                process_id,
                call_id=notice.call_id,
                n=notice.seq,
                offset=notice.offset,
                chunk=notice.chunk,
            )
        elif isinstance(notice, Ended):
            self.move(entry, Event.ENDED, notice)
            self._expire_ended(thread)
        elif isinstance(notice, Collected):
            self.move(entry, Event.COLLECTED)
        elif isinstance(notice, Orphaned):
            self.orphaned(thread.thread_id, process_id)

    def _announce(self, entry: Entry, notice: Ended) -> None:
        outcome = self.outcome(entry)
        self._world.publish(
            "end",
            *entry.key,
            call_id=notice.call_id,
            outcome=outcome.to_wire() if outcome else None,
            output=notice.output,
        )

    def want_deltas(self, wanted: bool) -> None:
        """Tell every worker whether anybody listens to deltas."""
        for thread in self.threads.values():
            if thread.worker:
                self.spawn(self._tell(thread.worker, Deltas(wanted=wanted)))

    # Deposits.

    def deposited(self, peer: Peer, parcel: dict[tuple[str, str], Handles]) -> None:
        """A worker or its spawner has deposited descriptors; raises `PeerError`, closing what it refuses."""
        refused = []
        for (thread_id, process_id), handles in parcel.items():
            if thread_id != peer.thread_id:
                handles.close()
                refused.append(f"{thread_id}/{process_id} belongs to another thread")
                continue
            try:
                self._deposit(peer, (thread_id, process_id), handles)
            except PeerError as error:
                handles.close()
                refused.append(f"{thread_id}/{process_id}: {error}")
        if refused:
            raise PeerError("; ".join(refused))

    def _deposit(self, peer: Peer, key: tuple[str, str], handles: Handles) -> None:
        thread = self.threads[key[0]]
        entry = thread.entries.get(key[1])
        if entry is None:
            if handles.transcript < 0:
                raise PeerError("deposited without its transcript")
            transcript = Transcript(handles.transcript)
            facts = transcript.facts
            if (facts.thread_id, facts.process_id) != key or facts.boot_id != kernel.boot_id():
                raise PeerError(f"its transcript is of {facts.thread_id}/{facts.process_id}")
            if self._world.descriptors_left() <= 0:
                raise PeerError("no descriptors left to hold it")
            entry = Entry(key, peer.epoch)
            entry.transcript = transcript
            thread.entries[key[1]] = entry
            thread.archive.use(key[1])
        self._adopt(entry, handles)
        if entry.transcript:
            entry.pid = entry.transcript.live().pid
        if entry.state is State.STARTING and entry.handles.pidfd >= 0:
            alive = thread.epoch == peer.epoch and thread.worker_pid is not None
            self._started(entry, Event.STARTED if alive else Event.STARTED_ALONE)

    def _adopt(self, entry: Entry, handles: Handles) -> None:
        before = len(entry.handles)
        entry.handles.adopt(handles)
        self.descriptors += len(entry.handles) - before

    def _started(self, entry: Entry, event: Event) -> None:
        """It runs; if that came too late for its own worker, the next one may be waiting for it."""
        self.move(entry, event)
        thread = self.threads[entry.key[0]]
        if event is Event.STARTED_ALONE and thread.life.phase is Phase.AWAKE:
            thread.taking_back = self.spawn(self._take_back(thread))

    def never_ran(self, thread_id: str, process_id: str) -> None:
        """The spawner says that the program was not executed."""
        thread = self.threads.get(thread_id)
        entry = thread.entries.get(process_id) if thread else None
        if entry and entry.state is State.STARTING:
            self.move(entry, Event.NEVER_RAN)

    def orphaned(self, thread_id: str, process_id: str) -> None:
        """The spawner died while it was starting this process."""
        entry = self.threads[thread_id].entries.get(process_id)
        if entry and entry.state is State.STARTING:
            self._resolve_start(entry)

    def _resolve_start(self, entry: Entry) -> None:
        """Nobody will finish this start: find out by the mark in the header what became of it."""
        transcript = entry.transcript
        live = transcript.live() if transcript else None
        if transcript is None or live is None or not live.started:
            self.move(entry, Event.NEVER_RAN)
            return
        pidfd = _find(live.pid, transcript.facts.mark)
        if pidfd is None:
            self.move(entry, Event.VANISHED)
        else:
            self._adopt(entry, Handles({"pidfd": pidfd}))
            entry.pid = live.pid
            self._started(entry, Event.STARTED_ALONE)

    # Processes.

    def move(self, entry: Entry, event: Event, notice: Ended | None = None) -> None:
        """Decide and do; a word that comes too late is logged and dropped."""
        try:
            former = entry.custody.holder
            entry.custody, effects = custody.step(entry.custody, event)
        except KeyError:
            self._world.log(f"process {entry.key}: {event} in {entry.custody} ignored")
            return
        for effect in effects:
            self._do(entry, effect, former, notice)
        if entry.state is State.GONE:
            thread = self.threads[entry.key[0]]
            if thread.entries.get(entry.key[1]) is entry:
                del thread.entries[entry.key[1]]
        _wake(entry.waiters)

    def _do(self, entry: Entry, effect: Effect, former: Holder, notice: Ended | None) -> None:
        thread_id, process_id = entry.key
        thread = self.threads[thread_id]
        if effect is Effect.START_PUMP:
            self._start_pump(entry)
        elif effect is Effect.STOP_PUMP:
            if (handles := self.store.remove(entry.key)) is not None:
                entry.handles = handles
        elif effect is Effect.RECORD_LOST and entry.transcript:
            ending.lost(entry.handles.pidfd, entry.transcript)
        elif effect is Effect.ANNOUNCE and notice and not entry.announced:
            entry.announced = True
            if notice.announce:
                self._announce(entry, notice)
        elif effect is Effect.END_TREE:
            self._end_tree(entry)
        elif effect is Effect.FORGET_AT_WORKER:
            if former is Holder.WORKER and thread.worker and thread.worker.epoch == entry.epoch:
                self.spawn(self._tell(thread.worker, Forget(process_ids=[process_id])))
        elif effect is Effect.ARCHIVE and entry.transcript:
            thread.archive.keep(msgspec.to_builtins(self.row(entry)), entry.transcript)
        elif effect is Effect.CLOSE_HANDLES:
            self.descriptors -= len(entry.handles)
            entry.handles.close()

    def _start_pump(self, entry: Entry) -> None:
        try:
            # The store owns them while it pumps; we look at them through its `Held`.
            self.store.insert(entry.key, entry.handles)
        except (HandoffError, PeerError, OSError) as error:
            self._world.log(f"process {entry.key}: not pumped: {error}")

    def _end_tree(self, entry: Entry) -> None:
        assert entry.transcript is not None
        start = tree.root(entry.transcript.facts.mark, entry.handles.pidfd)

        async def end() -> None:
            await asyncio.to_thread(tree.end, start)

        entry.ending = self.spawn(end())

    def _held_ended(self, held: Held) -> None:
        entry = self.threads[held.key[0]].entries.get(held.process_id)
        if entry is None:
            return
        if entry.state is State.DETACHED:
            self.move(entry, Event.ENDED)
            self._expire_ended(self.threads[held.key[0]])
        else:
            _wake(entry.waiters)

    def settle(self, entry: Entry) -> None:
        """Let a process go that we hold, if its end and all its output were in answers."""
        if entry.state is not State.ENDED or entry.custody.holder is not Holder.BROKER or entry.transcript is None:
            return
        if entry.told and not entry.talks and entry.transcript.live().delivered >= entry.transcript.written:
            self.move(entry, Event.COLLECTED)

    def _expire_ended(self, thread: Thread) -> None:
        """Too many ended processes, or too old ones, that nobody collects must not hold descriptors for ever."""
        ended = [entry for entry in thread.entries.values() if entry.state is State.ENDED]
        oldest = time.time_ns() - int(self._config.ended_keep_hours * 3600e9)
        excess = len(ended) - self._config.ended_keep_count
        for number, entry in enumerate(ended):
            too_old = entry.transcript is not None and entry.transcript.live().ended_at_ns < oldest
            if number < excess or too_old:
                self.move(entry, Event.EXPIRED)

    def outcome(self, entry: Entry) -> Outcome | None:
        """Return how a process ended, once that is known."""
        return entry.transcript.live().outcome if entry.transcript else None

    def row(self, entry: Entry) -> ProcessRow:
        """Return its line of `ps`."""
        transcript = entry.transcript
        assert transcript is not None
        facts, live = transcript.facts, transcript.live()
        thread = self.threads[facts.thread_id]
        ended = entry.state in (State.ENDED, State.GONE)
        return ProcessRow(
            thread=facts.thread_id,
            process_id=facts.process_id,
            call_id=facts.call_id,
            pid=live.pid or None,
            state="ended" if ended else entry.state.value,  # type: ignore[arg-type]
            worker_pid=thread.worker_pid if entry.state is State.ATTACHED else None,
            command=[os.fsdecode(word) for word in facts.argv],
            cwd=os.fsdecode(facts.cwd),
            tty=facts.tty,
            started_at=rfc3339(facts.started_at_ns),
            bytes_written=transcript.written,
            bytes_delivered=live.delivered,
            outcome=live.outcome.to_wire() if live.outcome and ended else None,
        )

    def thread_row(self, thread: Thread) -> ThreadRow:
        """Return its line of `threads`."""
        states = [entry.state for entry in thread.entries.values()]
        phase = thread.life.phase
        asleep = phase is Phase.ASLEEP
        return ThreadRow(
            thread=thread.thread_id,
            state="failed" if phase is Phase.FAILED else "asleep" if asleep else "awake",
            worker_pid=thread.worker_pid,
            epoch=thread.epoch,
            attached=states.count(State.ATTACHED) + states.count(State.STARTING),
            detached=states.count(State.DETACHED),
            ended=states.count(State.ENDED) + len(thread.archive),
        )

    def find(self, thread_id: str, process_id: str) -> Entry | Record:
        """Return a process, held or archived; raises `UnknownThread`, `UnknownProcess`, `ExpiredProcess`."""
        thread = self.get(thread_id)
        entry = thread.entries.get(process_id)
        if entry is None and thread.expected and process_id not in thread.archive:
            raise Unavailable(
                f"thread {thread_id}: its worker (pid {thread.worker_pid}) survived the former broker and has not "
                "reported yet, so its processes are not known; try again"
            )
        return entry if entry is not None else thread.archive.get(process_id)

    def entry_by_pid(self, pid: int) -> Entry | None:
        """Return the process that runs as `pid`: for an adopted orphan that has ended."""
        return next((entry for entry in self.entries() if entry.pid == pid), None)

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run `work` beside everything else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def entries(self) -> Iterator[Entry]:
        """Yield every held process."""
        for thread in self.threads.values():
            yield from list(thread.entries.values())

    def close(self) -> None:
        """Close every descriptor."""
        for task in self._tasks:
            task.cancel()
        for timer in self._timers.values():
            timer.cancel()
        for entry in list(self.entries()):
            if (handles := self.store.remove(entry.key)) is not None:
                entry.handles = handles
            entry.handles.close()
        self.store.close()
        self._writer.shutdown()


def rfc3339(nanoseconds: int) -> str:
    """Return a time as RFC 3339 UTC, to the millisecond."""
    moment = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _find(pid: int, mark: str) -> int | None:
    """Return a pidfd of the process `pid` if it carries the mark, so that a recycled pid is not taken for it."""
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return None
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        if MARK + b"=" + mark.encode() in file.read().split(b"\0"):
            return pidfd
    os.close(pidfd)
    return None


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
