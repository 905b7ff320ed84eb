"""The journal: what must survive a reboot.  Threads, their epochs, the ids they used, what became of them.

A process is recorded as alive at its deposit, as ended when it has gone, or as lost when nobody can know more.
What was said here is known here at once; it is written a moment later, by the batch, in a thread of its own.  Of
several words about a process only the last is written, so that of a short command only its end is.

    alive      deposited, and not known to have ended.  Of another boot: lost at once, `rebooted`.
    ended      answers with its outcome and what is kept of its output, until it expires
    lost       the same, with nothing but the reason.  It may be found after all: then it is alive again.
    expired    was too old or too much (`records.Shelf`), or never ran; only its id is known, for ever

Always true
    An id that is known here is never given out again; a call that is known here is never carried out again.
    Whoever asked to be told is told in the loop: True, once what it said was committed; False, when that failed.
    What could not be written stays in memory, as much as `UNWRITTEN_MAX` allows, and is tried again.
    No trouble with the disk reaches a caller: `trouble` says what it is.

Not here
    What the file looks like, what may be wrong with it, what a commit promises: `database`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ..common.errors import ExpiredProcess, Unavailable, UnknownProcess
from ..common.transcript import Transcript
from .database import FORGET, ROWS_AT_ONCE, Change, Database, Unusable
from .outbox import Outbox
from .records import Key, Limits, Record, Shelf
from .rulebook import Rulebook

# Seconds until records are written: a commit takes about as long as the short command it is about, and the next one
# should not have to share the processor with it.
WRITE_DELAY = 0.05
# Changes that wait for a moment: more are written at once.
WRITES_MAX = 64
# Changes without output that wait for a disk that does not take them; beyond, an id may be forgotten.
FAILED_MAX = 100_000
# Bytes that may wait in memory to be written.  One transcript has 1.25 MiB at most.
UNWRITTEN_MAX = 64 << 20
# Seconds that we all wait for a disk that is too slow for what ends, before something is not kept.
SLOW_DISK_DEADLINE = 2.0
# Seconds until what could not be written is tried again.
RETRY = 10.0
# Calls of a thread that are remembered, also when their processes have expired: what comes again is answered, not
# started again.
CALLS_REMEMBERED = 10_000

Look = Callable[[], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Batch:
    """What is being written."""

    future: Future[tuple[list[Change], str]]
    epochs: dict[str, int]
    changes: list[Change]


class Journal:
    """The journal of one broker.  `trouble` says what is wrong with it; empty when nothing is."""

    def __init__(self, path: Path, limits: Limits, boot_id: str, log: Callable[[str], None]) -> None:
        """Read what the former broker has written; whatever is wrong with that, we start."""
        self._boot_id = boot_id
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._database = Database(path, log)
        self._failure = ""
        self._shelf = Shelf(limits)
        self._threads: dict[str, ThreadJournal] = {}
        # Who is alive; `None` for those that only a former broker knew.
        self._living: dict[Key, Change | None] = {}
        # All that is not committed; of that, what the next batch takes, and what has failed before.
        self._changes: dict[Key, Change] = {}
        self._next: dict[Key, Change] = {}
        self._failed: dict[Key, Change] = {}
        # The same of threads' epochs.
        self._epochs: dict[str, int] = {}
        self._failed_epochs: dict[str, int] = {}
        self._batch: Batch | None = None
        # Bytes of `_changes`.
        self._unwritten = 0
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        # One thread, so that what is written stays in order.
        self._writer = ThreadPoolExecutor(1, "journal")
        # Programs and wakes: what they say is written at once, together with what was said here before.
        self.outbox = Outbox(self._read, lambda: self._write_soon(0.0), limits.seconds)
        # What was added to processes, likewise.
        self.rulebook = Rulebook(lambda: self._write_soon(0.0))
        self._parts = self.outbox, self.rulebook
        # Lines of `ps` of processes of which nothing is left, until somebody listens.
        self._losses: list[dict[str, Any]] = []
        self._on_lost = self._losses.append
        contents = self._database.contents
        self.outbox.load(contents.programs, contents.wakes, contents.last)
        self.rulebook.load(contents.watches)
        if self._database.number:  # what could be saved is not in the next file
            for part in self._parts:
                part.rewrite()
        for thread_id, epoch in contents.threads.items():
            self._threads[thread_id] = ThreadJournal(self, thread_id, epoch, known=True)
        for key, at, size in contents.kept:
            self._shelf.add(key, at, size)
        for key, boot in contents.living.items():
            self._living[key] = None
            if boot != boot_id:
                self.lose(*key, "rebooted")
        for key in self.rulebook.keys:
            # It had gone when the former broker died; of a damaged file, who lives is not known.
            if key not in self._living and not self._database.number:
                self.rulebook.drop(key)
        self.expire()

    @property
    def trouble(self) -> str:
        """What is wrong, for people."""
        return "; ".join(dict.fromkeys(filter(None, (self._database.trouble, self._failure))))

    @property
    def thread_ids(self) -> list[str]:
        """Every thread that was ever used."""
        return sorted(self._threads)

    def thread(self, thread_id: str) -> ThreadJournal:
        """Return a thread's part, made known if it is new."""
        thread = self._threads.get(thread_id)
        if thread is None:
            thread = self._threads[thread_id] = ThreadJournal(self, thread_id, 0, known=False)
            self.reached(thread_id, 0)
        return thread

    def living(self) -> list[Key]:
        """Return all that are recorded as alive: (thread, process id)."""
        return list(self._living)

    def lose(self, thread_id: str, process_id: str, reason: str) -> None:
        """Nothing is left of a process that was alive, and nobody can know more than `reason`."""
        self.thread(thread_id).lose(process_id, reason)

    def listen(self, on_lost: Callable[[dict[str, Any]], None]) -> None:
        """Have `on_lost` called with the line of `ps` of each process that was lost by now, or will be.

        `wake_on` in it are its rules, also those that were added, each with the generation of its setting.
        """
        losses, self._losses = self._losses, []
        self._on_lost = on_lost
        for row in losses:
            on_lost(row)

    # What the threads' parts say, and ask.

    def lost(self, row: dict[str, Any]) -> None:
        """Nothing is left of the process with this line of `ps`, which says why; its rules are told with it."""
        added = [(line.rule, line.generation) for line in self.rulebook.of((row["thread"], row["process_id"]))]
        self._on_lost({**row, "wake_on": [*((rule, 0) for rule in row.get("wake_on", ())), *added]})

    def reached(self, thread_id: str, epoch: int) -> None:
        """A thread has come to this epoch."""
        self._failed_epochs.pop(thread_id, None)
        self._epochs[thread_id] = epoch
        self._write_soon()

    def put(self, change: Change) -> None:
        """Take note of what became of a process, in the place of what was said before."""
        key = change.key
        if former := self._changes.get(key):
            self._unwritten -= _weight(former)
            if key in self._next:  # else the batch that has it tells, or has told
                change.then = former.then + change.then
        self._failed.pop(key, None)
        self._changes[key] = self._next[key] = change
        self._unwritten += _weight(change)
        self._living.pop(key, None)
        self._shelf.remove(key)
        if change.state == "alive":
            change.boot_id = self._boot_id
            self._living[key] = change
        elif change.record:
            change.archived_at = time.time()
            self._shelf.add(key, change.archived_at, change.record.size)
            if self._unwritten > UNWRITTEN_MAX:
                self._shed()
        self._write_soon()

    def then(self, key: Key, tell: Callable[[bool], None]) -> None:
        """Have `tell` called once what was said of a process is committed, or that has failed."""
        change = self._changes.get(key)
        if change and key not in self._failed:
            change.then.append(tell)
        else:
            self._loop.call_soon(tell, change is None)

    def expire(self) -> None:
        """Let go of what is too old or too much."""
        for thread_id, process_id in self._shelf.expire(time.time()):
            self.thread(thread_id).expired(process_id)

    def empty(self, thread_ids: Iterable[str]) -> Iterator[str]:
        """Yield those threads of which no process is alive or kept, no program and no wake."""
        self.expire()
        full = {key[0] for key in chain(self._living, self._changes)}
        for thread_id in thread_ids:
            if thread_id not in full and not self._shelf.ids(thread_id) and self.outbox.is_empty(thread_id):
                yield thread_id

    def forget(self, thread_ids: Sequence[str]) -> bool:
        """Make empty threads unknown, with the ids they have used; waits for the disk.

        `False`: that cannot be written.
        """
        self.flush()
        statements = [(statement, (thread_id,)) for thread_id in thread_ids for statement in FORGET]
        try:
            _, reason = self._writer.submit(self._database.commit, {}, [], statements).result()
        except Unusable as error:
            self._begin_anew(error)
            return False
        if reason:
            return False
        for thread_id in thread_ids:
            del self._threads[thread_id]
            self._shelf.forget(thread_id)
        return True

    def kept(self, thread_id: str) -> Collection[str]:
        """Return the ids of a thread's ended processes that answer, oldest first."""
        return self._shelf.ids(thread_id)

    def is_kept(self, key: Key) -> bool:
        """Tell whether this is one of them."""
        return key in self._shelf

    def known(self, thread_id: str) -> list[str]:
        """Return the ids of a thread's processes that are alive or kept."""
        return [key[1] for key in self._living if key[0] == thread_id] + list(self._shelf.ids(thread_id))

    def is_alive(self, key: Key) -> bool:
        """Tell whether it is recorded as alive."""
        return key in self._living

    def is_met(self, key: Key) -> bool:
        """Tell whether it is alive, and was deposited with this broker."""
        return self._living.get(key) is not None

    def record(self, key: Key) -> Record | None:
        """Return what is kept of a process; `None` when that is nothing, or cannot be read, and so has expired."""
        if key not in self._shelf:
            return None
        if change := self._changes.get(key):
            return change.record
        try:
            record = self._database.record(key)
        except Unusable as error:
            self._begin_anew(error)
            return None
        if record is None:
            self.thread(key[0]).expired(key[1])
        return record

    def rows(self, thread_id: str, process_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the lines of `ps` of some of a thread's processes, without those that cannot be read."""
        found: dict[str, dict[str, Any] | None] = {}
        for process_id in process_ids:
            if change := self._changes.get((thread_id, process_id)):
                found[process_id] = change.record.row if change.record else _look(change)
        try:
            written = [process_id for process_id in process_ids if process_id not in found]
            found.update(self._database.rows(thread_id, written))
        except Unusable as error:
            self._begin_anew(error)
        return {process_id: row for process_id, row in found.items() if row}

    def used(self, thread_id: str) -> list[tuple[str, str | None, str]]:
        """Return what was written of a thread's processes: id, call id, state; in the order of use."""
        for _ in range(2):
            try:
                return self._database.used(thread_id)
            except Unusable as error:  # what could be saved of the ids is in the next file
                self._begin_anew(error)
        return []

    def _read(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            return self._database.read(query, values)
        except Unusable as error:
            self._begin_anew(error)
            return []

    # Writing.

    def _write_soon(self, delay: float = WRITE_DELAY) -> None:
        if self._batch:
            return  # its end begins the next
        if len(self._next) >= WRITES_MAX:
            self._write()
        elif self._timer is None or not delay:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_later(delay, self._write)

    def _write(self) -> None:
        """Give what there is to the writer."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._batch or not self._is_waiting():
            return
        for change in self._next.values():
            if change.state == "alive":
                change.row = _look(change)
        epochs, changes = self._epochs, list(self._next.values())
        self._epochs, self._next = {}, {}
        statements = [statement for part in self._parts for statement in part.take()]
        future = self._writer.submit(self._database.commit, epochs, changes, statements)
        self._batch = Batch(future, epochs, changes)
        future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(self._through, future))

    def _is_waiting(self) -> bool:
        return bool(self._next or self._epochs or self._is_urgent())

    def _is_urgent(self) -> bool:
        return any(part.waiting for part in self._parts)

    def _through(self, future: Future[tuple[list[Change], str]]) -> None:
        """A batch is through: tell whoever wants to know, and begin the next."""
        batch = self._batch
        if batch is None or batch.future is not future:
            return  # somebody could not wait for the loop
        self._batch = None
        damage = None
        try:
            failed, reason = future.result()
        except Unusable as error:
            failed, reason, damage = batch.changes, str(error), error
        if reason:
            self._failed_epochs.update((name, at) for name, at in batch.epochs.items() if name not in self._epochs)
        wanting = set(failed)
        for change in batch.changes:
            if self._changes.get(change.key) is not change:
                continue
            if change in wanting and (change.state != "expired" or len(self._failed) < FAILED_MAX):
                self._failed[change.key] = change
            else:
                del self._changes[change.key]
                self._unwritten -= _weight(change)
        if damage:
            self._begin_anew(damage)
        else:
            self._note(reason)
        for change in batch.changes:
            then, change.then = change.then, []
            for tell in then:
                tell(change not in wanting)
        for part in self._parts:
            part.through(written=not reason)
        if self._is_waiting():
            self._write_soon(0.0 if self._is_urgent() else WRITE_DELAY)

    def _note(self, reason: str) -> None:
        """Say once that writing fails, and once that it works again."""
        if reason:
            if not self._failure and reason != self._database.trouble:
                self._log(
                    f"journal: cannot be written: {reason}; what ends is kept in memory and written when it can be"
                )
            self._failure = reason
        elif self._failure and not self._is_failing():
            self._log("journal: everything is written again")
            self._failure = ""
        if self._failure and self._retry is None:
            self._retry = self._loop.call_later(RETRY, self._try_again)

    def _is_failing(self) -> bool:
        return bool(self._failed or self._failed_epochs or any(part.failing for part in self._parts))

    def _try_again(self, count: int = WRITES_MAX) -> None:
        if self._retry:
            self._retry.cancel()
            self._retry = None
        self._database.reopen()
        for key in list(self._failed)[:count]:
            self._next[key] = self._failed.pop(key)
        self._epochs = self._failed_epochs | self._epochs
        self._failed_epochs = {}
        for part in self._parts:
            part.again()
        self._write_soon()

    def _shed(self) -> None:
        """Too much waits to be written: wait for the disk for a moment, then let the oldest of it go."""
        if self._batch and not self._failure:
            wait({self._batch.future}, SLOW_DISK_DEADLINE)
            if self._batch.future.done():
                self._through(self._batch.future)
        under_way = set(self._batch.changes) if self._batch else set()
        for change in list(self._changes.values()):
            if self._unwritten <= UNWRITTEN_MAX:
                return
            if change.record and change not in under_way:
                self.thread(change.key[0]).expired(change.key[1])

    def _begin_anew(self, error: Unusable) -> None:
        """The file is set aside; what we know by ourselves goes into the next one."""
        if self._batch:
            wait({self._batch.future})
            before = self._database.number
            self._through(self._batch.future)
            if self._database.number != before:
                return  # the batch has met the same
        self._database.set_aside(error)
        for part in self._parts:
            part.rewrite()
        for thread in self._threads.values():
            self.reached(thread.thread_id, thread.epoch)
            for process_id in thread.known_ids:
                key = thread.thread_id, process_id
                if change := self._changes.get(key):
                    self._failed.pop(key, None)
                    self._next[key] = change
                elif alive := self._living.get(key):
                    self.put(alive)
                elif key not in self._living:
                    thread.expired(process_id)
        for key in list(self._living):
            if self._living[key] is None:
                self.put(Change(key, "alive"))
        for thread_id in self._threads:
            for process_id in list(self._shelf.ids(thread_id)):
                if (thread_id, process_id) not in self._changes:
                    self._threads[thread_id].expired(process_id)

    def flush(self) -> None:
        """Write what there is, now, and wait for it."""
        while self._batch or self._is_waiting():
            self._write()
            if self._batch:
                wait({self._batch.future})
                self._through(self._batch.future)

    def close(self) -> None:
        """Write what there is, also what failed before, and close the file."""
        self.flush()
        if self._is_failing():
            self._try_again(len(self._failed))
            self.flush()
        for timer in (self._timer, self._retry):
            if timer:
                timer.cancel()
        self._writer.shutdown()
        self._database.close()


class ThreadJournal:
    """One thread's part of the journal.

    `epoch`: of its last worker.
    """

    def __init__(self, journal: Journal, thread_id: str, epoch: int, *, known: bool) -> None:
        """`known`: to the file."""
        self._journal = journal
        self.thread_id = thread_id
        self.epoch = epoch
        # Every id → the call that started it, empty where that does not count; `None` until it is read.
        self._ids: dict[str, str] | None = None if known else {}
        self._calls: dict[str, str] = {}
        self._lost: set[str] = set()

    def _load(self) -> dict[str, str]:
        if self._ids is None:
            self._ids = ids = {}
            for process_id, call_id, state in self._journal.used(self.thread_id):
                ids[process_id] = call_id or ""
                if call_id and state != "alive":
                    self._calls[call_id] = process_id
                if state == "lost":
                    self._lost.add(process_id)
            for call_id in list(self._calls)[:-CALLS_REMEMBERED]:
                del self._calls[call_id]
            for process_id in self._journal.known(self.thread_id):  # in case the list could not be read
                ids.setdefault(process_id, "")
        return self._ids

    @property
    def known_ids(self) -> list[str]:
        """The ids that have been read, or given out by this broker."""
        return list(self._ids or ())

    @property
    def ids(self) -> Collection[str]:
        """Every id the thread has used."""
        return self._load().keys()

    @property
    def calls(self) -> Mapping[str, str]:
        """The call → process id of the last processes that ended or were lost, expired or not."""
        self._load()
        return self._calls

    def reached(self, epoch: int) -> None:
        """A worker of this epoch is about to be started."""
        self.epoch = epoch
        self._journal.reached(self.thread_id, epoch)

    def use(self, process_id: str, call_id: str, look: Look) -> None:
        """A process was deposited; `look` tells its line of `ps`.  One that was lost is found again."""
        key = self.thread_id, process_id
        ids = self._load()
        if process_id in self._lost:
            self._lost.discard(process_id)
        elif self._journal.is_met(key) or self._journal.is_kept(key):
            return  # deposited once more; or it has ended, and we know how
        if self._calls.get(call_id) == process_id:
            del self._calls[call_id]  # who lives answers by itself
        ids[process_id] = call_id
        self._journal.put(Change(key, "alive", call_id, look=look))

    def keep(
        self, row: dict[str, Any], transcript: Transcript, calls: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """Keep the record of a process that has gone, and of its last calls; the oldest make room."""
        self._keep("ended", Record.of(row, transcript, calls or {}))

    @property
    def lost_ids(self) -> Collection[str]:
        """The ids of processes that are lost, until that expires."""
        self._load()
        return self._lost

    def rows_of(self, process_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the lines of `ps` of some processes, as far as they are recorded."""
        found: dict[str, dict[str, Any]] = {}
        for at in range(0, len(process_ids), ROWS_AT_ONCE):
            found |= self._journal.rows(self.thread_id, process_ids[at : at + ROWS_AT_ONCE])
        return found

    def lose(self, process_id: str, reason: str) -> None:
        """Nothing is left of a process that was alive."""
        if not self._journal.is_alive((self.thread_id, process_id)):
            return
        call_id = self._load().get(process_id, "")
        row = self._journal.rows(self.thread_id, [process_id]).get(process_id)
        if row:
            self._lost.add(process_id)
            self._keep("lost", Record.lost({**row, "call_id": call_id}, reason))
            self._journal.lost(self._journal.rows(self.thread_id, [process_id]).get(process_id, row))
            return
        # The broker that knew it was killed before it could write that down.
        if call_id:
            self._calls[call_id] = process_id
        self.expired(process_id)

    def _keep(self, state: Literal["ended", "lost"], record: Record) -> None:
        process_id, call_id = record.row["process_id"], record.row["call_id"]
        self._load()[process_id] = call_id
        if state == "ended":
            self._lost.discard(process_id)
        if call_id:
            self._calls[call_id] = process_id
            if len(self._calls) > CALLS_REMEMBERED:
                self._forget(next(iter(self._calls)))
        self._journal.put(Change((self.thread_id, process_id), state, call_id, record=record))
        self._journal.expire()

    def _forget(self, call_id: str) -> None:
        process_id = self._calls.pop(call_id)
        self._load()[process_id] = ""
        if not self._journal.is_kept((self.thread_id, process_id)):
            self.expired(process_id)

    def never_ran(self, process_id: str) -> None:
        """A process that was deposited was not started: its id has been used, and its call may come again."""
        self._load()[process_id] = ""
        self._journal.put(Change((self.thread_id, process_id), "expired"))

    def then(self, process_id: str, tell: Callable[[bool], None]) -> None:
        """Have `tell` called in the loop: with True once what was said of a process is committed.

        With False when that has failed.
        """
        self._journal.then((self.thread_id, process_id), tell)

    def expired(self, process_id: str) -> None:
        """Let what is kept of a process go."""
        self._lost.discard(process_id)
        call_id = self._load().setdefault(process_id, "")
        self._journal.put(Change((self.thread_id, process_id), "expired", call_id or None))

    def __len__(self) -> int:
        return len(self._journal.kept(self.thread_id))

    def __contains__(self, process_id: str) -> bool:
        return self._journal.is_kept((self.thread_id, process_id))

    def get(self, process_id: str) -> Record:
        """Return the record of an ended process; raises `ExpiredProcess`, `UnknownProcess`, `Unavailable`."""
        self._journal.expire()
        key = self.thread_id, process_id
        if record := self._journal.record(key):
            return record
        if process_id not in self.ids:
            raise UnknownProcess(
                f"process {process_id} was never started in thread {self.thread_id}; see `outlive ps`"
            )
        if self._journal.is_alive(key):
            raise Unavailable(f"process {process_id} was alive, and has not been found yet; try again")
        raise ExpiredProcess(f"process {process_id} ended, and its outcome and output have expired")

    def rows(self, after: str = "") -> Iterator[dict[str, Any]]:
        """Yield the line of `ps` of every ended process, oldest first; `after`: of those that ended after that one.

        When that has expired, so have all before it.
        """
        self._journal.expire()
        ids = list(self._journal.kept(self.thread_id))
        if after in ids:
            ids = ids[ids.index(after) + 1 :]
        for at in range(0, len(ids), ROWS_AT_ONCE):
            rows = self._journal.rows(self.thread_id, ids[at : at + ROWS_AT_ONCE])
            yield from (rows[process_id] for process_id in ids[at : at + ROWS_AT_ONCE] if process_id in rows)


def _look(change: Change) -> dict[str, Any] | None:
    return change.look() if change.look else change.row


def _weight(change: Change) -> int:
    return change.record.size if change.record else 0
