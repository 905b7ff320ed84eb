"""A ledger: which rows the journal's next batch writes, and whom to tell once it has.

What `outbox` and `rulebook` have in common.  A row has a name; what it says is looked up when it is written, so
that it is written once, however often it has changed before.

Always true
    Whoever waits is told once: when the row was written, or could not be.  A full disk keeps nobody waiting.
    What could not be written is tried again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Statement = tuple[str, tuple[Any, ...]]
Tell = Callable[[], None]


class Ledger(ABC, Generic[Name]):
    """Rows to be written.  `write_soon` has `take` called."""

    def __init__(self, write_soon: Callable[[], None]) -> None:
        self._write_soon = write_soon
        # What is to be written, and what is being written: the name of a row → whom to tell.
        self._next: dict[Name, list[Tell]] = {}
        self._under_way: dict[Name, list[Tell]] = {}
        # What could not be written.
        self._failed: set[Name] = set()

    @abstractmethod
    def _statements(self, names: Iterable[Name]) -> list[Statement]:
        """Return what makes these rows say what they are to say now."""

    @abstractmethod
    def _names(self) -> Iterable[Name]:
        """Return every row that there is."""

    def _written(self, names: Iterable[Name]) -> None:
        """Take note that these rows are written."""

    def _put(self, name: Name, tell: Tell | None = None) -> None:
        """Have a row written."""
        self._failed.discard(name)
        tells = self._next.setdefault(name, [])
        if tell:
            tells.append(tell)
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
        return self._statements(self._under_way)

    def through(self, *, written: bool) -> None:
        """What was taken is written, or could not be."""
        under_way, self._under_way = self._under_way, {}
        if written:
            self._written(under_way)
        else:
            self._failed.update(under_way)
        for tells in under_way.values():
            for tell in tells:
                tell()

    def again(self) -> None:
        """Try once more what could not be written."""
        for name in self._failed:
            self._next.setdefault(name, [])
        self._failed.clear()

    def rewrite(self) -> None:
        """The file is a new one: everything is to be written again."""
        self._failed.update(self._names())
        self.again()
