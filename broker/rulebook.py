"""The rules that were added to processes after their start, until these have gone.  A part of the journal.

    watches     thread, process     whose rule
                number              by which holders know it, and the header
                generation          which setting of rules it came with
                rule                its text
                slot                of the header, for what is found
                since               the offset to look from
                set_at              when, in nanoseconds since boot

When they are written, and who is told: `ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .ledger import Ledger, Statement, Tell
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


@dataclass(frozen=True, slots=True)
class Line:
    """One rule as it is written; its columns above."""

    number: int
    generation: int
    rule: str
    slot: int
    since: int
    set_at: int


class Rulebook(Ledger[Key]):
    """All rules that were added, by process."""

    def __init__(self, write_soon: Callable[[], None]) -> None:
        super().__init__(write_soon)
        self._lines: dict[Key, list[Line]] = {}

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
        """Take note of what is added to a process; `tell` is called once it is written.

        A rule that is set again had come true, or cannot any more: the new line says from where it is looked for.
        """
        if lines:
            again = {line.rule for line in lines}
            former = [line for line in self._lines.get(key, ()) if line.rule not in again]
            self._lines[key] = [*former, *lines]
        self._put(key, tell)

    def drop(self, key: Key) -> None:
        """A process has gone, and with it its rules."""
        if self._lines.pop(key, None):
            self._put(key)

    def _names(self) -> Iterable[Key]:
        return self._lines

    def _statements(self, names: Iterable[Key]) -> list[Statement]:
        statements: list[Statement] = []
        for key in names:
            statements.append((_DELETE, key))
            for line in self._lines.get(key, ()):
                rule = line.rule.encode("utf-8", "surrogatepass")
                numbers = line.slot, line.since, line.set_at
                statements.append((_PUT, (*key, line.number, line.generation, rule, *numbers)))
        return statements
