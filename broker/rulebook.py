"""The rules that were added to processes after their start, until these have gone.  A part of the journal.

    watches     thread, process     whose rule
                number              by which holders know it, and the header
                generation          which setting of rules it came with
                rule                its text
                slot                of the header, for what is found
                since               the offset to look from
                set_at              when, in nanoseconds since boot

Always true
    Whoever waits is told once what it said is committed, or could not be: then it is known to us alone, and is
    written when it can be.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .records import Key

SCHEMA = """
CREATE TABLE watches (
    thread TEXT NOT NULL, process TEXT NOT NULL, number INTEGER NOT NULL, generation INTEGER NOT NULL,
    rule TEXT NOT NULL, slot INTEGER NOT NULL, since INTEGER NOT NULL, set_at INTEGER NOT NULL,
    UNIQUE (thread, process, generation, rule)
);
"""
WATCHES = "SELECT thread, process, number, generation, rule, slot, since, set_at FROM watches"
_PUT = "INSERT OR REPLACE INTO watches VALUES (?, ?, ?, ?, CAST(? AS TEXT), ?, ?, ?)"
_DELETE = "DELETE FROM watches WHERE thread = ? AND process = ?"

Statement = tuple[str, tuple[Any, ...]]
Tell = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Line:
    """One rule as it is written; its columns above."""

    number: int
    generation: int
    rule: str
    slot: int
    since: int
    set_at: int


class Rulebook:
    """All rules that were added.  `write_soon` has `take` called."""

    def __init__(self, write_soon: Callable[[], None]) -> None:
        self._write_soon = write_soon
        self._lines: dict[Key, list[Line]] = {}
        # What is to be written, and what is being written: whose rules (`None`: nobody's) → whom to tell.
        self._next: dict[Key | None, list[Tell]] = {}
        self._under_way: dict[Key | None, list[Tell]] = {}
        self._failed: set[Key] = set()

    def load(self, rows: list[Any]) -> None:
        """Take over what the file says."""
        for thread_id, process_id, number, generation, rule, slot, since, set_at in rows:
            with suppress(ValueError, TypeError):
                line = Line(int(number), int(generation), str(rule), int(slot), int(since), int(set_at))
                self._lines.setdefault((str(thread_id), str(process_id)), []).append(line)

    def of(self, key: Key) -> list[Line]:
        """Return what was added to a process."""
        return list(self._lines.get(key, ()))

    @property
    def keys(self) -> list[Key]:
        """The processes that something was added to."""
        return list(self._lines)

    def add(self, key: Key, lines: list[Line], tell: Tell) -> None:
        """Take note of what is added to a process."""
        if lines:
            self._lines.setdefault(key, []).extend(lines)
            self._failed.discard(key)
        self._next.setdefault(key if lines else None, []).append(tell)
        self._write_soon()

    def drop(self, key: Key) -> None:
        """A process has gone, and with it its rules."""
        if self._lines.pop(key, None):
            self._failed.discard(key)
            self._next.setdefault(key, [])
            self._write_soon()

    # What the journal does with it.

    @property
    def waiting(self) -> bool:
        """Whether something is to be written now."""
        return bool(self._next)

    @property
    def failing(self) -> bool:
        """Whether something could not be written."""
        return bool(self._failed)

    def take(self) -> list[Statement]:
        """Return what is to be written now, all in one transaction."""
        self._under_way, self._next = self._next, {}
        statements: list[Statement] = []
        for key in self._under_way:
            if key is None:
                continue
            statements.append((_DELETE, key))
            for line in self._lines.get(key, ()):
                rule = line.rule.encode("utf-8", "surrogatepass")
                numbers = line.slot, line.since, line.set_at
                statements.append((_PUT, (*key, line.number, line.generation, rule, *numbers)))
        return statements

    def through(self, *, written: bool) -> None:
        """What was taken is written, or could not be."""
        under_way, self._under_way = self._under_way, {}
        if not written:
            self._failed.update(key for key in under_way if key)
        for tells in under_way.values():
            for tell in tells:
                tell()

    def again(self) -> None:
        """Try once more what could not be written."""
        for key in self._failed:
            self._next.setdefault(key, [])
        self._failed.clear()

    def rewrite(self) -> None:
        """The file is a new one: everything is to be written again."""
        self._failed.update(self._lines)
        self.again()
