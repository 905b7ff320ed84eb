"""The outbox: programs and wakes, and what of them is not written yet.  A part of the journal.

    programs    thread      whose it is
                program     msgpack: see `common.program`
    wakes       number      counts all wakes
                thread      that is to be woken
                process     whose rule came true; empty for `start`
                generation  which setting of rules it came with; 0: the process was started with it, or `start`
                rule        its text, or `start`
                state       see `wakes.State`; what is `new` is not written
                run         the number of the last run that it was part of; 0: none yet
                failures    of the program with it
                at          seconds since 1970: when it came true
                detail      JSON: outcome, or text and offset of the match
                failure     what went wrong last

Always true
    A process's rule has one wake, whoever finds it true, and however often: (thread, process, generation, rule).
    What is said in one turn of the loop is written in one transaction, with what the journal is told in that turn.
    A number is never given out twice once it was written.

Not here
    What becomes of a wake: `wakes`.  Who is told of what is written: `ledger`.  When the file is written, and what
    is wrong with it: `journal`, `database`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import msgpack
import msgspec

from ..common.program import Program, WakeRow
from .ledger import Ledger, Statement, Tell
from .records import rfc3339
from .wakes import Fate, State

SCHEMA = """
CREATE TABLE programs (thread TEXT PRIMARY KEY, program BLOB NOT NULL);
CREATE TABLE wakes (
    number INTEGER PRIMARY KEY, thread TEXT NOT NULL, process TEXT NOT NULL, generation INTEGER NOT NULL,
    rule TEXT NOT NULL, state TEXT NOT NULL, run INTEGER NOT NULL, failures INTEGER NOT NULL, at REAL NOT NULL,
    detail TEXT NOT NULL, failure TEXT NOT NULL, UNIQUE (thread, process, generation, rule)
);
CREATE INDEX due ON wakes (number) WHERE state IN ('pending', 'delivered', 'dead');
"""
_COLUMNS = "number, thread, process, generation, rule, state, run, failures, at, detail, failure"
PROGRAMS = "SELECT thread, program FROM programs"
DUE = f"SELECT {_COLUMNS} FROM wakes WHERE state IN ('pending', 'delivered', 'dead') ORDER BY number"
LAST = "SELECT max(number), max(run) FROM wakes"
_FOLLOWING = f"""
SELECT {_COLUMNS} FROM wakes WHERE thread = ifnull(?, thread) AND number > ? ORDER BY number LIMIT ?
"""
_ONE = f"SELECT {_COLUMNS} FROM wakes WHERE number = ?"
_BY_KEY = "SELECT number FROM wakes WHERE thread = ? AND process = ? AND generation = ? AND rule = ?"
# The last one stays, whoever has expired: its number must not come again.
_KEPT = """
SELECT number FROM wakes WHERE thread = ? AND (at > ? OR number = (SELECT max(number) FROM wakes)) LIMIT 1
"""
FORGET = "DELETE FROM wakes WHERE thread = ?"
# The second clause only where the file could not be read when we looked.
_PUT = f"""
INSERT INTO wakes ({_COLUMNS}) VALUES (?, ?, ?, ?, CAST(? AS TEXT), ?, ?, ?, ?, ?, CAST(? AS TEXT))
ON CONFLICT (number) DO UPDATE SET (state, run, failures, detail, failure) =
    (excluded.state, excluded.run, excluded.failures, excluded.detail, excluded.failure)
ON CONFLICT DO NOTHING
"""
_PUT_PROGRAM = "INSERT OR REPLACE INTO programs VALUES (?, ?)"
_DELETE_PROGRAM = "DELETE FROM programs WHERE thread = ?"
# As long as a process may be found to have ended once more, its wake has to be known; and the last number, too.
_EXPIRE = """
DELETE FROM wakes WHERE state IN ('done', 'read', 'dropped') AND at < ?
    AND number < (SELECT max(number) FROM wakes)
    AND (thread, CAST(process AS INTEGER)) NOT IN (SELECT thread, id FROM processes WHERE state = 'alive')
    AND (process <> '' OR thread NOT IN (SELECT thread FROM programs))
"""
# Wakes between two looks at what has expired.
_EXPIRE_EVERY = 1000

Read = Callable[[str, tuple[Any, ...]], list[Any]]


@dataclass(slots=True, eq=False)
class Letter:
    """One wake as it is written; its columns above."""

    number: int
    thread_id: str
    process_id: str
    generation: int
    rule: str
    at: float
    detail: dict[str, Any]
    fate: Fate = field(default_factory=Fate)
    run: int = 0
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes it count once."""
        return self.thread_id, self.process_id, self.generation, self.rule

    def row(self) -> WakeRow:
        """Return its line of `outlive wakes`."""
        return WakeRow(
            number=self.number,
            thread=self.thread_id,
            process_id=self.process_id or None,
            rule=self.rule if self.process_id else self.rule.partition(" ")[0],
            state=self.fate.state.value,
            failures=self.fate.failures,
            failure=self.failure or None,
            at=rfc3339(int(self.at * 1e9)),
            outcome=self.detail.get("outcome"),
            text=self.detail.get("text"),
            offset=self.detail.get("offset"),
        )


def letter_of(columns: tuple[Any, ...]) -> Letter:
    """Return the wake of a row; raises `ValueError`, `TypeError` when it makes no sense."""
    number, thread_id, process_id, generation, rule, state, run, failures, at, detail, failure = columns
    table = json.loads(detail)
    if not isinstance(table, dict):
        raise ValueError(f"detail of wake {number} is no object")
    fate = Fate(State(state), int(failures))
    names = str(thread_id), str(process_id), int(generation), str(rule)
    return Letter(int(number), *names, float(at), table, fate, int(run), str(failure))


def _put(wake: Letter) -> Statement:
    # What never was new in the file: it is pending from its commit on.
    state = State.PENDING if wake.fate.state is State.NEW else wake.fate.state
    rule, failure = (text.encode("utf-8", "surrogatepass") for text in (wake.rule, wake.failure))
    names = wake.thread_id, wake.process_id, wake.generation, rule
    counts = state.value, wake.run, wake.fate.failures, wake.at
    return _PUT, (wake.number, *names, *counts, json.dumps(wake.detail), failure)


class Outbox(Ledger[str | int]):
    """Programs, by thread, and the wakes that are not over, by number."""

    def __init__(self, read: Read, write_soon: Callable[[], None], keep_seconds: float) -> None:
        super().__init__(write_soon)
        self.programs: dict[str, Program] = {}
        self.wakes: dict[int, Letter] = {}
        self._read = read
        self._keep_seconds = keep_seconds
        self._keys: dict[tuple[str, str, int, str], Letter] = {}
        self._threads: dict[str, dict[int, Letter]] = {}
        self._last = 0
        self._last_run = 0
        self._expire_at = 0

    def load(self, programs: list[Any], wakes: list[Any], last: tuple[int, int]) -> None:
        """Take over what the file says."""
        for thread_id, raw in programs:
            with suppress(ValueError, TypeError, msgspec.ValidationError, msgpack.UnpackException):
                table = msgpack.unpackb(raw)
                self.programs[thread_id] = msgspec.convert(table, Program, strict=True, builtin_types=(bytes,))
        for columns in wakes:
            with suppress(ValueError, TypeError):
                self._remember(letter_of(columns))
        self._last = max([last[0], *self.wakes])
        self._last_run = max([last[1], *(wake.run for wake in self.wakes.values())])

    # What is said.

    def new(
        self, key: tuple[str, str, int, str], detail: dict[str, Any], tell: Callable[[Letter], None]
    ) -> Letter | None:
        """Take note of something that came true; `None` when that is known.  `tell`: called once it is written."""
        if self.knows(key):
            return None
        self._last += 1
        wake = Letter(self._last, *key, time.time(), detail)
        self._remember(wake)
        self.changed(wake, lambda: tell(wake))
        return wake

    def knows(self, key: tuple[str, str, int, str]) -> bool:
        """Tell whether this came true before."""
        return key in self._keys or bool(self._read(_BY_KEY, key))

    def of(self, thread_id: str) -> list[Letter]:
        """Return a thread's wakes that are not over, in their order."""
        return sorted(self._threads.get(thread_id, {}).values(), key=lambda wake: wake.number)

    def is_empty(self, thread_id: str) -> bool:
        """Tell whether a thread has no program, and all its wakes are over and have expired."""
        if thread_id in self.programs or thread_id in self._threads:
            return False
        return not self._read(_KEPT, (thread_id, time.time() - self._keep_seconds))

    def changed(self, wake: Letter, tell: Tell | None = None) -> None:
        """Write a wake as it is now."""
        self._put(wake.number, tell)

    def new_run(self) -> int:
        """Return a number for a run."""
        self._last_run += 1
        return self._last_run

    def start(self, thread_id: str, program: Program) -> None:
        """Give a thread a program."""
        self.programs[thread_id] = program
        self._put(thread_id)

    def stop(self, thread_id: str, tell: Tell) -> None:
        """Take it away."""
        self.programs.pop(thread_id, None)
        self._put(thread_id, tell)

    def revive(self, number: int) -> Letter | None:
        """Return a wake by its number, also one that was written and put away."""
        if wake := self.wakes.get(number):
            return wake
        for columns in self._read(_ONE, (number,)):
            with suppress(ValueError, TypeError):
                wake = letter_of(columns)
                self._remember(wake)
                return wake
        return None

    def rows(
        self, thread_id: str | None, everything: bool = False, after: int = 0, at_most: int | None = None
    ) -> Iterator[Letter]:
        """Return an iterator over wakes in their order, `at_most` so many: those that are not over, or all.

        `after`: only those with higher numbers.
        """
        found = {}
        if everything:
            for columns in self._read(_FOLLOWING, (thread_id, after, -1 if at_most is None else at_most)):
                with suppress(ValueError, TypeError):
                    found[int(columns[0])] = letter_of(columns)
        found.update(self.wakes)
        shown = (
            wake
            for number, wake in sorted(found.items())
            if number > after
            and thread_id in (None, wake.thread_id)
            and (everything or wake.fate.is_due or wake.fate.state in (State.NEW, State.DEAD))
        )
        return islice(shown, at_most)

    def _remember(self, wake: Letter) -> None:
        self.wakes[wake.number] = wake
        self._keys[wake.key] = wake
        self._threads.setdefault(wake.thread_id, {})[wake.number] = wake

    def _forget(self, wake: Letter) -> None:
        del self.wakes[wake.number], self._keys[wake.key], self._threads[wake.thread_id][wake.number]
        if not self._threads[wake.thread_id]:
            del self._threads[wake.thread_id]

    def _names(self) -> Iterable[str | int]:
        return chain(self.programs, self.wakes)

    def _statements(self, names: Iterable[str | int]) -> list[Statement]:
        statements: list[Statement] = []
        for name in names:
            if isinstance(name, int):
                if wake := self.wakes.get(name):
                    statements.append(_put(wake))
            elif program := self.programs.get(name):
                raw = msgpack.packb(msgspec.to_builtins(program, builtin_types=(bytes,)))
                statements.append((_PUT_PROGRAM, (name, raw)))
            else:
                statements.append((_DELETE_PROGRAM, (name,)))
        if statements and self._last >= self._expire_at:
            self._expire_at = self._last + _EXPIRE_EVERY
            statements.append((_EXPIRE, (time.time() - self._keep_seconds,)))
        return statements

    def _written(self, names: Iterable[str | int]) -> None:
        for name in names:
            wake = self.wakes.get(name) if isinstance(name, int) else None
            if wake and name not in self._next and (wake.fate.is_over or wake.fate.state is State.READ):
                self._forget(wake)
