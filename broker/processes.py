"""What becomes of deposits, of what workers say, and of what a former broker left: each is an event of custody.

Always true
    A start is over once: by its spawner's word, or by what its header and /proc say when nobody can give it.
    Who marked its header has run: it is found, or reported lost, and never started again.

Not here
    What an event does: `holding`.
"""

from __future__ import annotations

import asyncio
import os
import select
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from ..common import kernel
from ..common.config import Config
from ..common.descriptors import Handles
from ..common.errors import OutliveError, PeerError
from ..common.inlet import Inlet
from ..common.launch import MARK
from ..common.messages import Body, Collected, Delta, Ended, Matched, Orphaned
from ..common.outcome import Outcome
from ..common.paths import Paths
from ..common.pump import Pump, Pumps
from ..common.transcript import Transcript
from . import findings
from .custody import Event, Holder, State
from .entries import Entry, Thread, brief
from .findings import EVENTS, VERDICTS, Leaseholder, Verdict
from .holding import Holding
from .lifecycle import Phase
from .peers import Peer
from .world import World

# Ends of adopted processes that are remembered until their descriptors are found.
ORPHANS_MAX = 4096
# Seconds that a keeper may take to tell how a process ended that it has adopted; it takes milliseconds.
KEEPERS_WORD = 1.0
# Milliseconds that the kernel may take to execute a program: microseconds, unless it comes from a slow disk.
_EXECUTES_WITHIN = 50


class Processes(Holding):
    """What is told of processes, and found of them, and what that makes of them."""

    def __init__(self, world: World, paths: Paths, config: Config, pumps: Pumps, pump: type[Pump]) -> None:
        super().__init__(world, paths, config, pumps, pump)
        # How processes that a keeper adopted ended: pid → (start time, wait status), the latest first.
        self._orphans: dict[int, list[tuple[int, int]]] = {}

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

    # Starts.

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


def _line(entry: Entry, thread: Thread) -> dict[str, Any] | None:
    """Return a process's line of `ps`; `None` when its header makes no sense any more."""
    try:
        row: dict[str, Any] = msgspec.to_builtins(entry.row(thread.worker_pid))
    except (PeerError, OSError):
        return None
    return row


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
