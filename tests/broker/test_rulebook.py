"""Rules that were added: in the file before anybody relies on them, and gone with their process."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from outlive.broker.journal import Journal
from outlive.broker.records import Limits
from outlive.broker.rulebook import Line

KEY = ("t", "1000")
LINES = [
    Line(1000, 77, "output=schön", slot=2, since=30, set_at=5_000_000_000),
    Line(1001, 77, "exit", slot=0, since=0, set_at=6_000_000_000),
]
ROW = {
    "thread": "t",
    "process_id": "1000",
    "call_id": "c",
    "pid": 1,
    "state": "attached",
    "worker_pid": 2,
    "command": ["x"],
    "cwd": "/",
    "tty": False,
    "started_at": "2026-01-01T00:00:00.000Z",
    "bytes_written": 0,
    "bytes_delivered": 0,
    "outcome": None,
    "wake_on": ["silence=5"],
}


class Brokers:
    """The brokers of one state folder, one after the other; each has a journal."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.db"
        self.boot = "this boot"
        self._journal: Journal | None = None

    def start(self) -> Journal:
        """End the last one, if there is one, and start the next."""
        self.end()
        self._journal = Journal(self.path, Limits(3600.0, 1000, 1 << 30), self.boot, lambda text: None)
        return self._journal

    def end(self) -> None:
        if self._journal:
            self._journal.close()
        self._journal = None

    def rows(self) -> list[Any]:
        """Return what is committed."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            return connection.execute("SELECT * FROM watches ORDER BY number").fetchall()


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Brokers]:
    made = Brokers(tmp_path)
    yield made
    made.end()


async def begun(brokers: Brokers) -> Journal:
    """Return a journal that knows a process, and what was added to it."""
    journal = brokers.start()
    journal.thread("t").use("1000", "c", lambda: ROW)
    done = asyncio.Event()
    journal.rulebook.add(KEY, LINES, done.set)
    await done.wait()
    return journal


async def test_what_was_added_is_in_the_file_when_its_setter_is_told_and_read_by_the_next_broker(
    brokers: Brokers,
) -> None:
    await begun(brokers)
    assert brokers.rows() == [
        ("t", "1000", 1000, 77, "output=schön", 2, 30, 5_000_000_000),
        ("t", "1000", 1001, 77, "exit", 0, 0, 6_000_000_000),
    ]
    assert brokers.start().rulebook.of(KEY) == LINES


async def test_a_rule_that_is_set_again_replaces_what_it_said_before(brokers: Brokers) -> None:
    journal = await begun(brokers)
    again = Line(1002, 78, LINES[0].rule, slot=3, since=40, set_at=7_000_000_000)
    journal.rulebook.add(KEY, [again], lambda: None)
    journal.flush()
    assert brokers.start().rulebook.of(KEY) == [LINES[1], again]


async def test_it_goes_with_its_process(brokers: Brokers) -> None:
    journal = await begun(brokers)
    journal.rulebook.drop(KEY)
    journal.flush()
    assert (brokers.rows(), journal.rulebook.of(KEY)) == ([], [])


async def test_it_goes_also_when_the_broker_died_between_the_process_and_the_rules(brokers: Brokers) -> None:
    journal = await begun(brokers)
    journal.thread("t").never_ran("1000")
    journal = brokers.start()
    journal.flush()
    assert (brokers.rows(), journal.rulebook.of(KEY)) == ([], [])


async def test_the_rules_of_a_process_that_a_reboot_took_are_told_with_it(brokers: Brokers) -> None:
    await begun(brokers)
    brokers.boot = "the next boot"
    journal, lost = brokers.start(), list[dict[str, Any]]()
    journal.listen(lost.append)
    assert [row["wake_on"] for row in lost] == [[("silence=5", 0), ("output=schön", 77), ("exit", 77)]]
    journal.flush()
    assert brokers.rows() == []


async def test_whoever_asks_for_nothing_is_told_once_all_that_was_said_before_is_written(brokers: Brokers) -> None:
    journal = brokers.start()
    told: list[int] = []
    done = asyncio.Event()
    journal.outbox.new(("t", "1000", 0, "exit"), {}, lambda _: told.append(1))
    journal.rulebook.add(KEY, [], done.set)
    await done.wait()
    assert told == [1]


async def test_what_a_damaged_file_still_tells_is_taken_over(brokers: Brokers) -> None:
    await begun(brokers)
    brokers.end()
    with closing(sqlite3.connect(brokers.path)) as connection, connection:
        connection.execute("ALTER TABLE threads RENAME TO others")
    journal = brokers.start()
    assert "it is now" in journal.trouble
    assert journal.rulebook.of(KEY) == LINES
    journal.flush()
    assert len(brokers.rows()) == len(LINES)
