"""Every thread and process that the broker knows, and what is done when one of them moves.

Always true
    An event is decided and carried out without an `await` in between.
    What is known of a process is in its entry; an entry leaves the table only as GONE.
    A thread is forgotten only where too many exist, and nothing is left of it that anybody could still want.

Not here
    What becomes of a deposit, or of what a worker says: `processes`.
    Sending descriptors to a worker: many go in one parcel, `threads`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import msgspec

from ..common import ending, kernel
from ..common.config import Config
from ..common.descriptors import Handles
from ..common.errors import HandoffError, LimitReached, OutliveError, PeerError, Unavailable, UnknownThread
from ..common.held import REPEATED_WITHIN, Held
from ..common.messages import Body, Ended, Forget
from ..common.names import check_thread
from ..common.paths import Paths
from ..common.pump import Pump, Pumps
from ..common.rules import Rule, known
from ..common.tree import Feller
from . import custody
from .alarm import Alarm, listening
from .custody import Effect, Event, Holder, State
from .detached import DetachedStore
from .entries import Entry, Thread
from .journal import Journal
from .peers import Peer
from .records import Key, Limits, Record
from .watches import Armed, Match, Watches
from .world import World

# Threads at most: each has a worker when awake.  Then those are forgotten, so many at once, of which nothing is
# left and that nobody has asked for in so many seconds: a call that is repeated must not start anything again, and
# is so for minutes.
THREADS_MAX = 10_000
FORGET_AFTER = 3600.0
FORGET_AT_ONCE = 100
# Seconds until that is tried again when there was none: to look at all of them takes 0.06 s.
FORGET_PAUSE = 1.0


class Holding(ABC):
    """All threads of this broker with their processes: who they are, and what their moves do."""

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
        self._forget_again_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm = Alarm(lambda: self.watches.alarm())
        # What `delivery` hears: a rule came true; the agent was told of an end.
        self.on_match: Callable[[Key, Rule, Match], None] = lambda key, rule, match: None
        self.on_read: Callable[[Key], None] = lambda key: None
        # It lets go of a thread that is to be forgotten, or says that it cannot.
        self.on_forget: Callable[[Thread], bool] = lambda thread: True
        self.watches = Watches(self.came_true, set_alarm=self._alarm.set, listening=listening)
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
        now = time.monotonic()
        if now < self._forget_again_at:
            return False
        before = now - FORGET_AFTER
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
            self._forget_again_at = now + FORGET_PAUSE
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

    def _announce(self, entry: Entry, notice: Ended) -> None:
        outcome = entry.outcome
        self._world.publish(
            "end",
            *entry.key,
            call_id=notice.call_id,
            outcome=outcome.to_wire() if outcome else None,
            output=notice.output,
        )

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


def _starting_pid(entry: Entry) -> int:
    """Return the pid of a process whose spawner has not told it, and may be dead."""
    return entry.transcript.live().pid if entry.state is State.STARTING and entry.transcript else 0
