"""Every process that the broker knows: takes deposits and notices from workers, and does what custody decides.

Always true
    An event is decided and carried out without an `await` in between.
    What is known of a process is in its entry; an entry leaves the table only as GONE.

Not here
    Sending descriptors to a worker: many go in one parcel, `threads`.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, Protocol

import msgspec

from ..common import ending, kernel
from ..common.config import Config
from ..common.descriptors import Handles
from ..common.errors import HandoffError, LimitReached, OutliveError, PeerError, Unavailable, UnknownThread
from ..common.held import REPEATED_WITHIN, Held
from ..common.inlet import Inlet
from ..common.launch import MARK
from ..common.messages import Body, Collected, Delta, Ended, Forget, Matched, Orphaned
from ..common.names import check_thread
from ..common.outcome import Outcome
from ..common.paths import Paths
from ..common.pump import Pump, Pumps
from ..common.rules import Rule, known
from ..common.transcript import Transcript
from ..common.tree import Feller
from . import custody, findings
from .alarm import Alarm, listening
from .custody import Effect, Event, Holder, State
from .detached import DetachedStore
from .entries import Entry, Thread, brief
from .findings import EVENTS, VERDICTS, Leaseholder, Verdict
from .journal import Journal
from .lifecycle import Phase
from .peers import Peer
from .records import Key, Limits, Record
from .watches import Armed, Match, Watches

# Threads at most: each has a worker when awake.  Then those are forgotten, so many at once, of which nothing is
# left and that nobody has asked for in so many seconds: a call that is repeated must not start anything again, and
# is so for minutes.
THREADS_MAX = 10_000
FORGET_AFTER = 3600.0
FORGET_AT_ONCE = 100
# Ends of adopted processes that are remembered until their descriptors are found.
ORPHANS_MAX = 4096
# Seconds that a keeper may take to tell how a process ended that it has adopted; it takes milliseconds.
KEEPERS_WORD = 1.0
# Milliseconds that the kernel may take to execute a program: microseconds, unless it comes from a slow disk.
_EXECUTES_WITHIN = 50


class World(Protocol):
    """What the loop does for us."""

    # Why the last upgrade did not come up; empty for one that did.
    upgrade_failed: str

    @property
    def deltas_wanted(self) -> bool:
        """Whether somebody wants output as it comes."""

    @property
    def keeper_pid(self) -> int | None:
        """The keeper's pid, if there is one."""

    async def upgrade(self) -> str:
        """Have the installed program take over; return why it did not come up."""

    def start_worker(self, thread_id: str, epoch: int) -> int:
        """Start a worker and return its pid; raises `OSError`."""

    def kill_worker(self, pid: int) -> None:
        """Kill a worker."""

    def notice_deaths(self) -> None:
        """Tell `worker_died` now of the workers that are dead by now."""

    def transmit(self, peer: Peer, frame: bytes) -> None:
        """Send a frame; raises `zmq.ZMQError`."""

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        """Tell the subscribers."""

    def descriptors_left(self) -> int:
        """How many descriptors may still be opened before the reserve."""

    def keep(self, mark: str, fds: Sequence[int]) -> None:
        """Have the keeper keep descriptors of the process with this mark."""

    def unkeep(self, mark: str) -> None:
        """Have it close them."""

    async def hear_keeper(self) -> bool:
        """Take in what the keeper was told before now; tell whether we have."""

    def epoch_is_over(self, thread_id: str, epoch: int) -> bool:
        """Tell whether worker and spawners of this epoch are all dead."""

    def log(self, text: str) -> None:
        """Write to the log."""


class Processes(ABC):
    """All processes of this broker, by thread."""

    def __init__(self, world: World, paths: Paths, config: Config, pumps: Pumps, pump: type[Pump]) -> None:
        self._world = world
        self._paths = paths
        self._config = config
        self.feller = Feller()
        self.store = DetachedStore(
            pumps, pump, self.feller, on_ended=self._held_ended, on_found=lambda held: self.watches.look(held.key)
        )
        self.threads: dict[str, Thread] = {}
        # How many descriptors of processes are held.
        self.descriptors = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm = Alarm(lambda: self.watches.alarm())
        # What `delivery` hears: a rule came true; the agent was told of an end.
        self.on_match: Callable[[Key, Rule, Match], None] = lambda key, rule, match: None
        self.on_read: Callable[[Key], None] = lambda key: None
        # It lets go of a thread that is to be forgotten, or says that it cannot.
        self.on_forget: Callable[[Thread], bool] = lambda thread: True
        self.watches = Watches(self.came_true, set_alarm=self._alarm.set, listening=listening)
        # How processes that a keeper adopted ended: pid → (start time, wait status), the latest first.
        self._orphans: dict[int, list[tuple[int, int]]] = {}
        limits = Limits(config.ended_keep_hours * 3600, config.ended_keep_count, config.journal_max_mb << 20)
        self.journal = Journal(paths.journal, limits, kernel.boot_id(), world.log)
        for thread_id in self.journal.thread_ids:
            try:
                self.create(thread_id)
            except OutliveError as error:  # one name must not keep everybody's broker down
                world.log(f"journal: {error}; left alone")

    @abstractmethod
    def take_back(self, thread: Thread) -> None:
        """Give what the broker holds of a thread to its worker, which is up: soon, and one handoff at a time."""

    def came_true(self, key: tuple[str, str], rule: Rule, match: Match) -> None:
        """A rule of a process has come true, or with `Exit` it has ended while one was open."""
        self.on_match(key, rule, match)
        if entry := self.threads[key[0]].entries.get(key[1]):
            entry.tell()

    def create(self, thread_id: str) -> Thread:
        """Return a thread, made known if it is new."""
        if thread := self.threads.get(thread_id):
            thread.asked_for = time.monotonic()
            return thread
        check_thread(thread_id)
        if len(self.threads) >= THREADS_MAX and not self._forget_some():
            raise LimitReached(
                f"{THREADS_MAX} threads exist; use one of them, or wait: one of which nothing is left, no process, "
                f"record, program or wake, is forgotten {FORGET_AFTER / 3600:.0f} h after its last use"
            )
        thread = self.threads[thread_id] = Thread(thread_id, self.journal.thread(thread_id))
        return thread

    def _forget_some(self) -> bool:
        """Forget threads of which nothing is left, and that were longest not asked for; tell whether any was."""
        before = time.monotonic() - FORGET_AFTER
        quiet = [thread for thread in self.threads.values() if thread.asked_for < before and thread.is_quiet]
        quiet.sort(key=lambda thread: thread.asked_for)
        over = (
            thread_id
            for thread_id in self.journal.empty(thread.thread_id for thread in quiet)
            if self._world.epoch_is_over(thread_id, self.threads[thread_id].epoch)
            and self.on_forget(self.threads[thread_id])
        )
        gone = [*islice(over, FORGET_AT_ONCE)]
        if not gone or not self.journal.forget(gone):
            return False
        for thread_id in gone:
            del self.threads[thread_id]
        self._world.log(f"{len(gone)} threads of which nothing was left are forgotten, {gone[0]} and others")
        return True

    def get(self, thread_id: str) -> Thread:
        """Return a known thread; raises `UnknownThread`."""
        check_thread(thread_id)
        thread = self.threads.get(thread_id)
        if thread is None:
            raise UnknownThread(f"thread {thread_id} is not known; `outlive exec -t {thread_id} …` creates it")
        thread.asked_for = time.monotonic()
        return thread

    def entries(self) -> Iterator[Entry]:
        """Yield every held process."""
        for thread in self.threads.values():
            yield from list(thread.entries.values())

    def live_entries(self) -> list[Entry]:
        """Return every process that has not ended."""
        return [
            entry
            for thread in self.threads.values()
            for entry in thread.entries.values()
            if entry.state is not State.ENDED
        ]

    def find(self, thread_id: str, process_id: str) -> Entry | Record:
        """Return a process, held or recorded; raises `UnknownThread`, `UnknownProcess`, `ExpiredProcess`."""
        thread = self.get(thread_id)
        entry = thread.entries.get(process_id)
        if entry is None and thread.expected and process_id not in thread.journal:
            raise Unavailable(
                f"thread {thread_id}: its worker (pid {thread.worker_pid}) survived the former broker and has not "
                "reported yet, so its processes are not known; try again"
            )
        return entry if entry is not None else thread.journal.get(process_id)

    def entry_by_pid(self, pid: int) -> Entry | None:
        """Return the process that runs as `pid`: for an adopted orphan that has ended."""
        return next((entry for entry in self.entries() if pid in (entry.pid, _starting_pid(entry))), None)

    # What workers tell.

    def noticed(self, peer: Peer, notice: Body) -> None:
        """A worker has told something about one of its processes."""
        thread = self.threads[peer.thread_id]
        process_id: str = notice.process_id  # type: ignore[attr-defined]
        entry = thread.entries.get(process_id)
        if entry is None or entry.epoch != peer.epoch:
            return
        if isinstance(notice, Delta):
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
        elif isinstance(notice, Matched):
            self.watches.look(entry.key)
        elif isinstance(notice, Ended):
            self.move(entry, Event.ENDED, notice)
            self._expire_ended(thread)
        elif isinstance(notice, Collected):
            outcome = entry.outcome
            if outcome and outcome.by in (None, "caller"):  # else the worker let it go without an answer
                self.on_read(entry.key)
            self.move(entry, Event.COLLECTED)
        elif isinstance(notice, Orphaned):
            self.orphaned(thread.thread_id, process_id)

    def _publish_begin(self, entry: Entry) -> None:
        assert entry.transcript is not None
        facts = entry.transcript.facts
        argv = brief([os.fsdecode(word) for word in facts.argv])
        self._world.publish("begin", *entry.key, call_id=facts.call_id, pid=entry.pid, command=argv)

    def _announce(self, entry: Entry, notice: Ended) -> None:
        outcome = entry.outcome
        self._world.publish(
            "end",
            *entry.key,
            call_id=notice.call_id,
            outcome=outcome.to_wire() if outcome else None,
            output=notice.output,
        )

    # Deposits.

    def deposited(self, peer: Peer, parcel: dict[tuple[str, str], Handles], *, kept: bool) -> None:
        """A worker or its spawner has deposited descriptors; raises `PeerError`, closing what it refuses.

        `kept`: the keeper has them, or gets them from the spawner once the process runs.
        """
        refused = []
        for (thread_id, process_id), handles in parcel.items():
            if thread_id != peer.thread_id:
                handles.close()
                refused.append(f"{thread_id}/{process_id} belongs to another thread")
                continue
            try:
                self._deposit(peer, (thread_id, process_id), handles, kept=kept)
            except PeerError as error:
                handles.close()
                refused.append(f"{thread_id}/{process_id}: {error}")
        if refused:
            raise PeerError("; ".join(refused))

    def _deposit(self, peer: Peer, key: tuple[str, str], handles: Handles, *, kept: bool) -> None:
        thread = self.threads[key[0]]
        entry = thread.entries.get(key[1])
        new = entry is None
        if entry is None:
            if handles.transcript < 0:
                raise PeerError("deposited without its transcript")
            transcript = Transcript(handles.transcript)
            facts = transcript.facts
            if (facts.thread_id, facts.process_id) != key or facts.boot_id != kernel.boot_id():
                raise PeerError(f"its transcript is of {facts.thread_id}/{facts.process_id}")
            if handles.inlet >= 0:
                Inlet(handles.inlet, facts.mark)
            if self._world.descriptors_left() <= 0:
                raise PeerError("no descriptors left to hold it")
            entry = self._enter(thread, key, peer.epoch, transcript)
        self._adopt(entry, handles, kept=kept)
        if entry.transcript:
            entry.pid = entry.transcript.live().pid
        if entry.state is State.STARTING and entry.handles.pidfd >= 0:
            alive = thread.epoch == peer.epoch and thread.worker_pid is not None
            self._started(entry, Event.STARTED if alive else Event.STARTED_ALONE)
            if not new:  # else it runs for longer, and a former broker has said so
                self._publish_begin(entry)

    def _enter(self, thread: Thread, key: tuple[str, str], epoch: int, transcript: Transcript) -> Entry:
        entry = Entry(key, epoch)
        entry.transcript = transcript
        thread.entries[key[1]] = entry
        thread.journal.use(key[1], transcript.facts.call_id, partial(_line, entry, thread))
        return entry

    def _adopt(self, entry: Entry, handles: Handles, *, kept: bool) -> None:
        new = [fd for role, fd in handles.held().items() if getattr(entry.handles, role) < 0]
        entry.handles.adopt(handles)
        self.descriptors += len(new)
        if new and not kept and entry.transcript:
            # All of it: of what came before, a spawner that died may have promised more than it could keep.
            self._world.keep(entry.transcript.facts.mark, [*entry.handles.held().values()])

    # What a former broker left.

    def found(self, handles: Handles, *, kept: bool) -> None:
        """Take up a process of a former broker, as if it had been deposited now; closes what cannot be served."""
        transcript = Transcript(handles.transcript)
        facts = transcript.facts
        key = facts.thread_id, facts.process_id
        try:
            thread = self.create(facts.thread_id)
        except OutliveError as error:
            self._world.log(f"process {key} is left to the keeper: {error}")
            handles.close()
            return
        entry = thread.entries.get(facts.process_id)
        if entry is None and facts.process_id in thread.journal:
            handles.close()  # its record was written, and then there was no time to have it closed
            self._world.unkeep(facts.mark)
            return
        lease = transcript.live().lease
        epoch = lease.epoch if lease else 0
        thread.epoch = max(thread.epoch, epoch)
        if entry is None:
            entry = self._enter(thread, key, epoch, transcript)
        elif not kernel.is_same_file(entry.handles.transcript, handles.transcript):
            # An id is never given out twice, so one of them is a forgery or worse; the first one has been served.
            self._world.log(f"process {key}: another one of this name was found, of mark {facts.mark}; closed")
            handles.close()
            return
        self._adopt(entry, handles, kept=kept)
        if entry.state is State.STARTING:
            self._judge(entry)

    def lose_missing(self) -> None:
        """What was alive by the journal, and is held by nobody who can still come, is lost."""
        for thread_id, process_id in list(self.journal.living()):
            thread = self.threads[thread_id]
            if process_id not in thread.entries and not thread.expected and not thread.unfinished:
                self.journal.lose(thread_id, process_id, "the broker and its keeper died")

    def _judge(self, entry: Entry) -> None:
        """Decide about a found process by the table, and do it."""
        transcript = entry.transcript
        assert transcript is not None
        self._recall(transcript)
        live = transcript.live()
        entry.pid = live.pid
        holder = Leaseholder.NOBODY
        if live.lease and not live.lease.holder_is_dead():
            holder = Leaseholder.ALIVE
        elif live.lease and live.lease.epoch and not self._world.epoch_is_over(entry.key[0], live.lease.epoch):
            holder = Leaseholder.UNFINISHED
        verdict = VERDICTS[findings.progress(entry.handles, transcript), holder]
        if verdict is Verdict.LOOK:
            self._resolve_start(entry)
        elif verdict is Verdict.MOVE:
            self._started(entry, EVENTS[holder])

    def orphan_ended(self, pid: int, start: int, status: int) -> None:
        """A keeper tells how a process ended that it had adopted: the only one who knows, on an older Linux."""
        entry = self.entry_by_pid(pid)
        if entry and entry.transcript and _is_of(entry.transcript, start):
            entry.transcript.record_outcome(Outcome.from_status(status, entry.transcript.live().by))
        elif entry is None:
            self._orphans.setdefault(pid, []).insert(0, (start, status))
            if len(self._orphans) > ORPHANS_MAX:
                del self._orphans[next(iter(self._orphans))]

    def _recall(self, transcript: Transcript) -> None:
        """Record how a found process ended, if a keeper told us before."""
        for start, status in self._orphans.get(transcript.live().pid, ()):
            if _is_of(transcript, start):
                transcript.record_outcome(Outcome.from_status(status, transcript.live().by))
                return

    def _started(self, entry: Entry, event: Event) -> None:
        """It runs; if that came too late for its own worker, the next one may be waiting for it."""
        self.move(entry, event)
        thread = self.threads[entry.key[0]]
        if event is Event.STARTED_ALONE and thread.life.phase is Phase.AWAKE:
            self.take_back(thread)

    def never_ran(self, thread_id: str, process_id: str) -> None:
        """The spawner says that the program was not executed."""
        thread = self.threads.get(thread_id)
        entry = thread.entries.get(process_id) if thread else None
        if entry and entry.state is State.STARTING:
            self.move(entry, Event.NEVER_RAN)

    def orphaned(self, thread_id: str, process_id: str) -> None:
        """The spawner died while it was starting this process, and the worker never got it."""
        thread = self.threads[thread_id]
        entry = thread.entries.get(process_id)
        if entry is None or entry.transcript is None or entry.custody.holder is Holder.BROKER:
            return
        # Leased to the worker from its birth, and the worker lives; but it does not pump what it does not have.
        entry.transcript.release_lease()
        if entry.state is State.STARTING:
            self._resolve_start(entry)
        else:  # only the word to the worker was missing: without it the same call would start it again
            self.move(entry, Event.DETACHED)
            self.take_back(thread)

    def _resolve_late(self, entry: Entry) -> None:
        if self.threads[entry.key[0]].entries.get(entry.key[1]) is entry and entry.state is State.STARTING:
            self._resolve_start(entry, waited=True)

    def _resolve_start(self, entry: Entry, *, waited: bool = False) -> None:
        """Nobody will finish this start: find out by the mark in the header what became of it.

        `waited`: for the keeper's word on how it ended.
        """
        transcript = entry.transcript
        live = transcript.live() if transcript else None
        if transcript is None or live is None or not live.started:
            self.move(entry, Event.NEVER_RAN)
            return
        pidfd = _find(live.pid, transcript)
        self._recall(transcript)
        if pidfd is None and transcript.live().outcome is None:
            if self._world.keeper_pid is not None and not waited:
                asyncio.get_running_loop().call_later(KEEPERS_WORD, self._resolve_late, entry)
                return
            self.move(entry, Event.VANISHED)
            return
        if pidfd is not None:
            self._adopt(entry, Handles({"pidfd": pidfd}), kept=False)
        entry.pid = live.pid
        self._started(entry, Event.STARTED_ALONE)

    # Moves.

    def move(self, entry: Entry, event: Event, notice: Ended | None = None) -> None:
        """Decide and do; a word that comes too late is logged and dropped."""
        if self.threads[entry.key[0]].entries.get(entry.key[1]) is not entry:
            return  # it is gone, or its successor's
        before = entry.state
        try:
            former = entry.custody.holder
            entry.custody, effects = custody.step(entry.custody, event)
        except KeyError:
            self._world.log(f"process {entry.key}: {event} in {entry.custody} ignored")
            return
        if event is Event.NEVER_RAN:
            self.threads[entry.key[0]].journal.never_ran(entry.key[1])
        elif before is State.STARTING and entry.state is not before and entry.transcript:
            self.watches.arm(entry.key, entry.transcript, self._added(entry.key))
        for effect in effects:
            self._do(entry, effect, former, notice)
        self._watch(entry, before)
        if entry.state is State.GONE:
            thread = self.threads[entry.key[0]]
            if thread.entries.get(entry.key[1]) is entry:
                del thread.entries[entry.key[1]]
        entry.tell()

    def _added(self, key: tuple[str, str]) -> list[Armed]:
        """Return the rules that were added to a process, as the journal has them."""
        lines = self.journal.rulebook.of(key)
        return [
            Armed(rule, line.number, line.set_at, line.generation, line.slot, line.since, told=True)
            for line, rule in zip(lines, known(line.rule for line in lines), strict=True)
            if rule is not None
        ]

    def _watch(self, entry: Entry, before: State) -> None:
        """Have what moved watched; who held it until now may not have told what it had found."""
        if entry.state is State.GONE:
            self.watches.drop(entry.key)
            self.journal.rulebook.drop(entry.key)
            return
        if entry.state is State.ENDED and before is not State.ENDED:
            self.watches.ended(entry.key, entry.outcome)
            if entry.told:  # the answer was quicker
                self.on_read(entry.key)
        else:
            self.watches.look(entry.key)

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
            row = msgspec.to_builtins(entry.row(thread.worker_pid))
            thread.journal.keep(row, entry.transcript, entry.last_calls())
        elif effect is Effect.CLOSE_HANDLES:
            self.descriptors -= len(entry.handles)
            if entry.transcript:
                # After the record was written: a broker that dies in between must find either.
                mark = entry.transcript.facts.mark
                thread.journal.then(process_id, lambda _: self._world.unkeep(mark))
            entry.handles.close()

    def _start_pump(self, entry: Entry) -> None:
        try:
            # The store owns them while it pumps; we look at them through its `Held`.
            self.store.insert(entry.key, entry.handles, self.watches.to_look_for(entry.key))
        except (HandoffError, PeerError, OSError) as error:
            self._world.log(f"process {entry.key}: not pumped: {error}")

    def _end_tree(self, entry: Entry) -> None:
        assert entry.transcript is not None
        entry.ending = self.spawn(self.feller.fell(entry.transcript.facts.mark, entry.handles))

    def _held_ended(self, held: Held) -> None:
        entry = self.threads[held.key[0]].entries.get(held.process_id)
        if entry is None:
            return
        if entry.state is State.DETACHED:
            self.move(entry, Event.ENDED)
            self._expire_ended(self.threads[held.key[0]])
        else:
            entry.tell()
        if held.transcript.live().told:
            # To whom, a broker knew that has died; or a worker had it when the time for repetitions was over.
            asyncio.get_running_loop().call_later(0 if entry.told else REPEATED_WITHIN, self._settle_told, entry)

    def _settle_told(self, entry: Entry) -> None:
        entry.told = True
        self.settle(entry)

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

    # Beside everything else.

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run `work` beside everything else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _tell(self, peer: Peer, order: Body) -> None:
        with suppress(OutliveError):
            await peer.call(order, self._world.transmit)

    def relinquish(self) -> dict[tuple[str, str], Handles]:
        """Stop pumping and writing, and return the handles of every process, now the caller's."""
        for task in self._tasks:
            task.cancel()
        left = {}
        for entry in list(self.entries()):
            left[entry.key] = self.store.remove(entry.key) or entry.handles
            entry.handles = Handles()
        for thread in self.threads.values():
            thread.entries.clear()  # a timer that is still to come finds nothing to decide about
        self.watches.close()
        self.store.close()
        self.journal.close()
        return left


def _line(entry: Entry, thread: Thread) -> dict[str, Any] | None:
    """Return a process's line of `ps`; `None` when its header makes no sense any more."""
    try:
        row: dict[str, Any] = msgspec.to_builtins(entry.row(thread.worker_pid))
    except (PeerError, OSError):
        return None
    return row


def _starting_pid(entry: Entry) -> int:
    """Return the pid of a process whose spawner has not told it, and may be dead."""
    return entry.transcript.live().pid if entry.state is State.STARTING and entry.transcript else 0


def _is_of(transcript: Transcript, start: int) -> bool:
    """Tell whether the process that started at `start`, in clock ticks since boot, as the transcript's pid is its.

    It had started when it marked the header; whoever had the pid later started after that.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    return start <= transcript.marked_at() * ticks // 1_000_000_000


def _find(pid: int, transcript: Transcript) -> int | None:
    """Return a pidfd of the process `pid` if it is the transcript's, so that a recycled pid is not taken for it.

    It carries the mark in its environment; before it has executed its program, it holds the transcript.  While the
    kernel executes the program it has neither, and an empty environment, for a moment.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return None
    mark = MARK + b"=" + transcript.facts.mark.encode()
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    for _ in range(_EXECUTES_WITHIN):
        environment = b""
        with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
        if mark in environment.split(b"\0") or _holds(pid, transcript.fd):
            return pidfd
        if environment or ended.poll(1):  # somebody else's, or too late
            break
    os.close(pidfd)
    return None


def _holds(pid: int, file: int) -> bool:
    """Tell whether a process has a file open that we have open, too."""
    wanted = os.fstat(file)
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                    return True
    return False
