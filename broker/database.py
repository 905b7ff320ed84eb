"""The journal's file: one SQLite database, STATE/journal.db, and what may be wrong with it.

    threads     name            of the thread
                epoch           of its last worker that was recorded
    processes   number          in the order of use
                thread, id      unique together
                state           alive, ended, lost, or expired: then only the id is known, and perhaps the call
                call_id         of the call that started it; null when that may come again, or came too long ago
                boot_id         of the boot that it is, or was, alive in
                pid, born_at    as `ps` shows them (born_at: RFC 3339 UTC); pid is null as long as it is not known
                row             JSON: the rest of its line of `ps`; and of what has ended `calls`: `Record.calls`
                outcome         JSON, once it has ended; the reason of one that is lost is in it
                archived_at     seconds since 1970, once it has ended
                written         bytes of its output stream
                ranges          JSON: [from, to] of what is kept of the stream
                size            bytes that it takes, as they count for the limit
    outputs     number          of the process
                data            the kept ranges, one after the other
    programs, wakes             see `outbox`
    watches                     see `rulebook`

Always true
    The file is private (0600), and so are -wal and -shm beside it.  One broker at a time writes: it has the state
    folder locked, so that one with another runtime folder does not call our processes lost.
    A database of version 1, which had no programs, wakes and watches, gets the tables for them.
    A database that is damaged, newer, or not ours is renamed, never deleted; whatever ids can be read in it are
    taken over, so that they are not given out again.
    Write-ahead log and synchronous=NORMAL: a commit is written, not flushed.  `kill -9` of the broker loses nothing
    that was committed.  A power loss or a crash of the kernel may lose the last commits: those that the kernel
    has not written back by itself (about 30 s), at worst all since the last checkpoint (4 MB of log, or the
    broker's end).  It never damages what was before.

Not here
    What is written when, and what has to go: `journal`.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..common.errors import BadRequest
from ..common.messages import ProcessRow, outcome_from_wire
from ..common.names import check_thread
from . import outbox, rulebook
from .ledger import Statement
from .outbox import DUE, LAST, PROGRAMS
from .records import Key, Record
from .rulebook import WATCHES

VERSION = 2
_APPLICATION = 0x6F75_746C  # "outl", as `file` shows it

_ADDED = outbox.SCHEMA + rulebook.SCHEMA
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE threads (name TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE processes (
    number INTEGER PRIMARY KEY, thread TEXT NOT NULL, id INTEGER NOT NULL, state TEXT NOT NULL, call_id TEXT,
    boot_id TEXT, pid INTEGER, born_at TEXT, row TEXT, outcome TEXT, archived_at REAL, written INTEGER, ranges TEXT,
    size INTEGER, UNIQUE (thread, id)
);
CREATE TABLE outputs (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE INDEX living ON processes (thread, id, boot_id) WHERE state = 'alive';
CREATE INDEX kept ON processes (archived_at, thread, id, size) WHERE archived_at IS NOT NULL;
{_ADDED}"""
_FROM_VERSION_1 = f"BEGIN IMMEDIATE; {_ADDED} PRAGMA user_version = {VERSION}; COMMIT;"
_PUT = """
INSERT INTO processes
    (thread, id, state, call_id, boot_id, pid, born_at, row, outcome, archived_at, written, ranges, size)
VALUES (?, ?, ?, CAST(? AS TEXT), ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (thread, id) DO UPDATE SET
    (state, call_id, boot_id, pid, born_at, row, outcome, archived_at, written, ranges, size) =
    (excluded.state, excluded.call_id, excluded.boot_id, excluded.pid, excluded.born_at, excluded.row,
     excluded.outcome, excluded.archived_at, excluded.written, excluded.ranges, excluded.size)
"""
_PUT_OUTPUT = "INSERT OR REPLACE INTO outputs SELECT number, ? FROM processes WHERE thread = ? AND id = ?"
_DELETE_OUTPUT = "DELETE FROM outputs WHERE number = (SELECT number FROM processes WHERE thread = ? AND id = ?)"
_PUT_EPOCH = """
INSERT INTO threads VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET epoch = max(epoch, excluded.epoch)
"""
# What makes a thread unknown, each with its name.
FORGET = (
    "DELETE FROM outputs WHERE number IN (SELECT number FROM processes WHERE thread = ?)",
    "DELETE FROM processes WHERE thread = ?",
    outbox.FORGET,
    "DELETE FROM threads WHERE name = ?",
)
_ROW = "id, call_id, pid, born_at, row, outcome"

# Seconds that whoever else looks into the file may keep us from writing, and from opening it.
_BUSY_TIMEOUT = 5.0
# Seconds that a dying broker's last children may have the folder locked, between fork and exec.
_LOCK_DEADLINE = 1.0
# Bytes of log that stay on the disk after a checkpoint.
_LOG_SIZE = 8 << 20
# A file with more free pages than this, and more than used ones, is made smaller.
_FREE_PAGES = 1024
# Files that one broker sets aside: a disk on which none of them lasts is not to be filled with them.
SET_ASIDE_MAX = 3
# Processes that are looked up at once.
ROWS_AT_ONCE = 50

_MEMORY_ONLY = "what ends from now on is known until this broker ends"

# What is wrong with the machine, not with the file.
_MACHINE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_MISUSE,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
# What SQLite raises; the second where a damaged name in its message is no text.
_ERRORS = (sqlite3.Error, UnicodeDecodeError)


@dataclass(slots=True, eq=False)
class Change:
    """What is to be written of one process: the newest, whatever was before."""

    key: Key
    state: Literal["alive", "ended", "lost", "expired"]
    call_id: str | None = None
    boot_id: str | None = None
    # Its line of `ps` while it is alive; looked up when it is written, since most have ended by then.
    row: dict[str, Any] | None = None
    look: Callable[[], dict[str, Any] | None] | None = None
    # Once it has ended.
    record: Record | None = None
    archived_at: float | None = None
    # Called once it is written, or is not going to be.
    then: list[Callable[[bool], None]] = field(default_factory=list)


@dataclass(slots=True)
class Contents:
    """What a database says at its start: threads and their epochs, what is kept (oldest first), what is alive."""

    threads: dict[str, int] = field(default_factory=dict)
    kept: list[tuple[Key, float, int]] = field(default_factory=list)
    living: dict[Key, str] = field(default_factory=dict)
    # Rows as they are, and the last numbers of a wake and a run: `outbox` and `rulebook` understand them.
    programs: list[Any] = field(default_factory=list)
    wakes: list[Any] = field(default_factory=list)
    watches: list[Any] = field(default_factory=list)
    last: tuple[int, int] = (0, 0)


class Unusable(Exception):
    """What is in the file is nothing that we can go on with: set it aside, under a name that says `why`."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


class Database:
    """The file, or as much of it as can be used; opening never fails.

    `trouble`: what is wrong with it, for people; empty when nothing is.
    """

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self._path = path
        self._log = log
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._lock = -1
        # Whether everything that the file holds is known, so that it may be written later when not now.
        self._complete = True
        # How many were set aside.
        self.number = 0
        self.trouble = ""
        self.contents = Contents()
        self._start()

    @property
    def writes(self) -> bool:
        """Whether it can be written."""
        return self._writer is not None

    # Opening.

    def _start(self) -> None:
        try:
            self._lock = _locked(self._path.parent)
        except BlockingIOError:
            self._complain(f"another broker uses {self._path.parent}, with another runtime folder; {_MEMORY_ONLY}")
            self._read_only()
            self.contents.living.clear()  # they are the other's
            return
        except OSError as error:
            self._complain(f"{self._path.parent}: {error.strerror}; {_MEMORY_ONLY}")
            return
        try:
            self._open()
        except Unusable as error:
            self.set_aside(error)
        except (*_ERRORS, OSError) as error:
            self._complain(f"{self._path}: {_said(error)}; {_MEMORY_ONLY}")
            self._read_only()

    def _open(self) -> None:
        """Open for reading and writing; raises `Unusable`, `sqlite3.Error`, `OSError`."""
        # SQLite gives -wal and -shm the mode of the file.
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        try:
            writer = self._writer = _connect(self._path, _BUSY_TIMEOUT)
            if not writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
                writer.execute("PRAGMA journal_mode = WAL")
                writer.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            (version,) = writer.execute("PRAGMA user_version").fetchone()
            if writer.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
                raise Unusable("foreign", "is a database, and not ours")
            if version == 1:
                writer.executescript(_FROM_VERSION_1)
            elif version != VERSION:
                newer = "a newer" if version > VERSION else "another"
                raise Unusable(
                    f"version-{version}", f"has version {version}, of {newer} program; this one knows {VERSION}"
                )
            writer.execute("PRAGMA journal_mode = WAL")
            writer.execute("PRAGMA synchronous = NORMAL")
            writer.execute(f"PRAGMA journal_size_limit = {_LOG_SIZE}")
            reader = self._reader = _connect(self._path, _BUSY_TIMEOUT / 10)
            self.contents = _contents(reader)
        except BaseException as error:
            self._disconnect()
            if isinstance(error, sqlite3.Error | ValueError | TypeError) and not _is_the_machines(error):
                raise Unusable("damaged", f"is damaged ({_said(error)})") from error
            raise

    def _read_only(self) -> None:
        """Read what was written before, if that can be done without writing anything."""
        self._complete = not self._path.exists()
        log = Path(f"{self._path}-wal")
        uris = [f"{self._path.as_uri()}?mode=ro"]
        with suppress(OSError):
            if not log.exists() or not log.stat().st_size:
                uris.append(f"{self._path.as_uri()}?immutable=1")
        for uri in uris:
            try:
                self._reader = _connect(uri, 0.0)
                self.contents = _contents(self._reader)
                self._complete = self._lock >= 0
                return
            except (sqlite3.Error, ValueError, TypeError):
                self._disconnect()

    def reopen(self) -> bool:
        """Try again to open for writing what could not be; tell whether it can be written now."""
        if self._writer:
            return True
        if not self._complete or self._lock < 0:
            return False
        former, self._reader, contents = self._reader, None, self.contents
        try:
            self._open()
        except (Unusable, *_ERRORS, OSError):
            self._reader, self.contents = former, contents
            return False
        if former:
            former.close()
        self.trouble = ""
        return True

    def set_aside(self, error: Unusable) -> None:
        """Rename the file, and begin a new one with the ids that the old one still tells."""
        self.number += 1
        if self.number > SET_ASIDE_MAX:
            self._disconnect()
            self._complete = False
            self._complain(f"{self._path} {error}, again; {_MEMORY_ONLY}")
            return
        saved = self._salvage()
        self._disconnect()
        self.contents = Contents(programs=saved[2], wakes=saved[3], watches=saved[4])
        due = self.contents
        aside = _unused(self._path, error.why)
        try:
            for ending in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.rename(f"{self._path}{ending}", f"{aside}{ending}")
            self._open()
            self.contents.programs, self.contents.wakes = due.programs, due.wakes
            self.contents.watches = due.watches
            self._take_over(*saved[:2])
            self._complain(
                f"{self._path} {error}; it is now {aside.name}, and what had ended before is not known here"
            )
        except (Unusable, *_ERRORS, OSError) as another:
            self._disconnect()
            self._complete = not self._path.exists()
            self._complain(f"{self._path} {error}; in its place: {_said(another)}; {_MEMORY_ONLY}")

    def _salvage(self) -> tuple[dict[str, int], dict[Key, str | None], list[Any], list[Any], list[Any]]:
        """Return threads with their epochs, ids with their calls, programs, wakes, watches: what can be read."""
        threads: dict[str, int] = {}
        ids: dict[Key, str | None] = {}
        programs: list[Any] = []
        wakes: list[Any] = []
        watches: list[Any] = []
        with suppress(*_ERRORS), closing(_connect(self._path, 0.0)) as connection:
            with suppress(*_ERRORS):
                programs += (row for row in connection.execute(PROGRAMS) if _is_name(row[0]))
            with suppress(*_ERRORS):
                wakes += (row for row in connection.execute(DUE) if _is_name(row[1]))
            with suppress(*_ERRORS):
                watches += (row for row in connection.execute(WATCHES) if _is_name(row[0]))
            with suppress(*_ERRORS):
                for name, epoch in connection.execute("SELECT name, epoch FROM threads"):
                    if _is_name(name) and isinstance(epoch, int):
                        threads[name] = epoch
            # The table, and its index, which may be whole where the other is not.
            for query in ("SELECT thread, id, call_id FROM processes", "SELECT thread, id, NULL FROM processes"):
                with suppress(*_ERRORS):
                    for name, number, call_id in connection.execute(query):
                        if _is_name(name) and _is_id(number):
                            threads.setdefault(name, 0)
                            ids.setdefault((name, str(number)), call_id if isinstance(call_id, str) else None)
        return threads, ids, programs, wakes, watches

    def _take_over(self, threads: dict[str, int], ids: dict[Key, str | None]) -> None:
        self._write(threads, [Change(key, "expired", call_id) for key, call_id in ids.items()])
        self.contents.threads = threads

    def _complain(self, text: str) -> None:
        self.trouble = text
        self._log(f"journal: {text}")

    # Reading: in the loop.

    def used(self, thread_id: str) -> list[tuple[str, str | None, str]]:
        """Return the ids that a thread has used, with call id and state, in the order of use."""
        found = self.read("SELECT id, call_id, state FROM processes WHERE thread = ? ORDER BY number", (thread_id,))
        return [(str(number), call_id, state) for number, call_id, state in found if _is_id(number)]

    def rows(self, thread_id: str, process_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the lines of `ps` of a thread's processes; what cannot be read is left out."""
        found = {}
        for at in range(0, len(process_ids), ROWS_AT_ONCE):
            some = process_ids[at : at + ROWS_AT_ONCE]
            marks = ", ".join("?" * len(some))
            query = f"SELECT {_ROW} FROM processes WHERE thread = ? AND id IN ({marks})"
            for columns in self.read(query, (thread_id, *map(int, some))):
                with suppress(ValueError, TypeError):
                    found[str(columns[0])] = _row(thread_id, *columns)
        return found

    def record(self, key: Key) -> Record | None:
        """Return the record of an ended process; `None` when there is none that makes sense."""
        query = f"""SELECT written, ranges, data, {_ROW} FROM processes LEFT JOIN outputs USING (number)
            WHERE thread = ? AND id = ? AND archived_at IS NOT NULL"""
        for written, ranges, data, *columns in self.read(query, (key[0], int(key[1]))):
            with suppress(ValueError, TypeError):
                spans = [(int(first), int(last)) for first, last in json.loads(ranges)]
                sizes = [last - first for first, last in spans]
                if min(sizes, default=0) < 0 or sum(sizes) != len(data or b""):
                    raise ValueError(f"{len(data or b'')} bytes for ranges {spans}")
                row = _row(key[0], *columns)
                calls = msgspec.convert(json.loads(columns[4]).get("calls", {}), dict[str, tuple[int, int]])
                return Record(row, int(written), spans, data or b"", calls)
        return None

    def read(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        """Return what is found, nothing when it cannot be read; raises `Unusable`."""
        if self._reader is None:
            return []
        try:
            return self._reader.execute(query, values).fetchall()
        except _ERRORS as error:
            if self._writer and _is_damage(error):
                raise Unusable("damaged", f"is damaged ({_said(error)})") from None
            self._log(f"journal: {self._path} cannot be read: {_said(error)}")
            return []

    # Writing: in the writer's thread.

    def commit(
        self, threads: dict[str, int], changes: Sequence[Change], statements: Sequence[Statement] = ()
    ) -> tuple[list[Change], str]:
        """Write these, as many as can be; return those that could not, and why.  Raises `Unusable`.

        A reason without changes: threads and statements could not be written.
        """
        if self._writer is None:
            return list(changes), self.trouble
        try:
            self._write(threads, changes, statements)
            self._shrink()
            return [], ""
        except _ERRORS as error:
            reason = _said(error)
            if _is_damage(error):
                raise Unusable("damaged", f"is damaged ({reason})") from None
        failed = [change for change in changes if not self._written({}, change)]
        if failed or not self._written(threads, None, statements):
            return failed, reason
        return [], ""

    def _written(
        self, threads: dict[str, int], change: Change | None = None, statements: Sequence[Statement] = ()
    ) -> bool:
        try:
            self._write(threads, [change] if change else [], statements)
            return True
        except _ERRORS:
            if change and change.record and change.record.data:
                # There may be room for how it ended.
                with suppress(*_ERRORS):
                    self._write({}, [replace(change, record=replace(change.record, ranges=[], data=b""))])
            return False

    def _write(
        self, threads: dict[str, int], changes: Sequence[Change], statements: Sequence[Statement] = ()
    ) -> None:
        assert self._writer is not None
        writer = self._writer
        writer.execute("BEGIN IMMEDIATE")
        try:
            writer.executemany(_PUT_EPOCH, threads.items())
            writer.executemany(_PUT, [list(_values(change)) for change in changes])
            for change in changes:
                key = change.key[0], int(change.key[1])
                if change.record and change.record.data:
                    writer.execute(_PUT_OUTPUT, (change.record.data, *key))
                elif change.state == "expired":
                    writer.execute(_DELETE_OUTPUT, key)
            for statement, values in statements:
                writer.execute(statement, values)
            writer.execute("COMMIT")
        finally:
            if writer.in_transaction:
                with suppress(*_ERRORS):
                    writer.execute("ROLLBACK")

    def _shrink(self) -> None:
        """Give the disk back what expired, now and then."""
        assert self._writer is not None
        (free,) = self._writer.execute("PRAGMA freelist_count").fetchone()
        if free > _FREE_PAGES and 2 * free > self._writer.execute("PRAGMA page_count").fetchone()[0]:
            self._writer.executescript("PRAGMA incremental_vacuum")  # `execute` would take one page only

    def _disconnect(self) -> None:
        for connection in (self._reader, self._writer):
            if connection:
                with suppress(*_ERRORS):
                    connection.close()
        self._reader = self._writer = None

    def close(self) -> None:
        """Close the file, and let the folder go; afterwards nothing can be read or written."""
        self._disconnect()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def _locked(folder: Path) -> int:
    """Return the locked folder; raises `BlockingIOError` when another broker has it, and `OSError`.

    Where a folder cannot be locked (NFS), it is taken without.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    give_up = time.monotonic() + _LOCK_DEADLINE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(fd)
                raise
            time.sleep(0.01)
        except OSError:
            return fd


def _connect(place: Path | str, timeout: float) -> sqlite3.Connection:
    """Connect without Python's own transactions; `place`: a path, or a URI."""
    connection = sqlite3.connect(
        place, timeout=timeout, isolation_level=None, check_same_thread=False, uri=isinstance(place, str)
    )
    connection.text_factory = _text
    return connection


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # damaged
        return data.decode("utf-8", "replace")


def _contents(reader: sqlite3.Connection) -> Contents:
    contents = Contents()
    for name, epoch in reader.execute("SELECT name, epoch FROM threads ORDER BY name"):
        contents.threads[name] = int(epoch)
    query = "SELECT thread, id, archived_at, size FROM processes WHERE archived_at IS NOT NULL ORDER BY archived_at"
    for thread_id, number, at, size in reader.execute(query):
        if _is_id(number):
            contents.kept.append(((thread_id, str(number)), float(at), int(size)))
    query = "SELECT thread, id, boot_id FROM processes WHERE state = 'alive'"
    for thread_id, number, boot_id in reader.execute(query):
        if _is_id(number):
            contents.living[thread_id, str(number)] = boot_id
    contents.programs = reader.execute(PROGRAMS).fetchall()
    contents.wakes = reader.execute(DUE).fetchall()
    contents.watches = reader.execute(WATCHES).fetchall()
    number, run = reader.execute(LAST).fetchone()
    contents.last = int(number or 0), int(run or 0)
    return contents


def _is_name(name: object) -> bool:
    """Tell whether it can be a thread's name."""
    with suppress(BadRequest):
        return isinstance(name, str) and bool(check_thread(name))
    return False


def _is_id(number: object) -> bool:
    """Tell whether it can be a process id: a damaged page may say anything."""
    return isinstance(number, int) and 0 < number < 10**10


def _values(change: Change) -> Iterator[Any]:
    """Yield what `_PUT` wants."""
    record = change.record
    row = dict((record.row if record else change.row) or {})
    for name in ("thread", "process_id", "call_id"):
        row.pop(name, None)
    yield from (change.key[0], int(change.key[1]), change.state)
    yield None if change.call_id is None else change.call_id.encode("utf-8", "surrogatepass")
    yield change.boot_id
    yield from (row.pop("pid", None), row.pop("started_at", None))
    outcome = row.pop("outcome", None)
    if record:
        row["calls"] = record.calls
    # In ASCII: what is no valid text in a command must not keep it from being written.
    yield json.dumps(row) if row else None
    yield json.dumps(outcome) if record else None
    yield change.archived_at
    yield from (record.written, json.dumps(record.ranges), record.size) if record else (None, None, None)


def _row(
    thread_id: str, number: int, call_id: str, pid: int | None, born_at: str, row: str | None, outcome: str | None
) -> dict[str, Any]:
    """Return a line of `ps`; raises `ValueError` or `TypeError` when it cannot be one."""
    if row is None:
        raise ValueError("no line of ps was written")
    ids = {
        "thread": thread_id,
        "process_id": str(number),
        "call_id": call_id or "",
        "pid": pid,
        "started_at": born_at,
    }
    whole = {**json.loads(row), **ids, "outcome": json.loads(outcome) if outcome else None}
    whole.pop("calls", None)
    msgspec.convert(whole, ProcessRow)
    outcome_from_wire(whole["outcome"])
    return whole


def _unused(path: Path, why: str) -> Path:
    """Return a name for a file that is set aside."""
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = path.with_name(f"{path.name}.{why}-{at}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{at}-{number}")
    return aside


def _code(error: BaseException) -> int:
    # An error of the module itself has none.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_the_machines(error: BaseException) -> bool:
    return _code(error) in _MACHINE


def _is_damage(error: BaseException) -> bool:
    """Tell whether an error says that the file is not as we left it: any about what is in it, once it was open."""
    return isinstance(error, UnicodeDecodeError) or (_code(error) > 0 and not _is_the_machines(error))


def _said(error: BaseException) -> str:
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} [{name}]" if name else str(error)
