"""Programs and wakes in real files: a wake counts once, and is written with what it reports."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlive.broker import outbox as module
from outlive.broker.journal import Journal
from outlive.broker.outbox import Letter
from outlive.broker.records import Limits
from outlive.broker.wakes import Event, Fate, State, after
from outlive.common.program import Program

EXITED = {"outcome": {"kind": "exited", "code": 3}}
PROGRAM = Program(argv=[b"\xff", b"a"], workdir=b"/\xfe", path=b"/bin", even_read=True)


class Brokers:
    """The brokers of one state folder, one after the other; each has a journal."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.db"
        self.boot = "this boot"
        self._journal: Journal | None = None

    def start(self, keep: float = 3600.0) -> Journal:
        """End the last one, if there is one, and start the next."""
        self.end()
        self._journal = Journal(self.path, Limits(keep, 1000, 1 << 30), self.boot, lambda text: None)
        return self._journal

    def end(self) -> None:
        if self._journal:
            self._journal.close()
        self._journal = None

    def sql(self, query: str, *values: Any) -> list[Any]:
        """Look into the file, or change it, from outside."""
        connection = sqlite3.connect(self.path)
        try:
            with connection:
                return connection.execute(query, values).fetchall()
        finally:
            connection.close()


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Brokers]:
    made = Brokers(tmp_path)
    yield made
    made.end()


def key(process_id: str = "1000", rule: str = "exit", generation: int = 0) -> tuple[str, str, int, str]:
    return "t", process_id, generation, rule


async def written(journal: Journal, *keys: tuple[str, str, int, str]) -> list[Letter]:
    """Return new wakes once they are written."""
    told: list[Letter] = []
    for one in keys:
        assert journal.outbox.new(one, EXITED, told.append)
    while len(told) < len(keys):
        await asyncio.sleep(0)
    return told


def become(journal: Journal, wake: Letter, *events: Event) -> None:
    for event in events:
        wake.fate = after(wake.fate, event)
    journal.outbox.changed(wake)


DONE = (Event.COMMITTED, Event.DELIVERED, Event.ACKNOWLEDGED)


async def test_a_wake_and_a_program_are_there_for_the_next_broker(brokers: Brokers) -> None:
    journal = brokers.start()
    journal.outbox.start("t", PROGRAM)
    (wake,) = await written(journal, key())
    wake.run, wake.failure = 7, "\udcff broken"
    become(journal, wake, Event.COMMITTED, Event.DELIVERED, Event.FAILED, Event.DELIVERED)
    outbox = brokers.start().outbox
    assert outbox.programs == {"t": PROGRAM}
    (found,) = outbox.wakes.values()
    assert (found.key, found.detail, found.run, found.failure) == (key(), EXITED, 7, "\udcff broken")
    assert found.fate == Fate(State.DELIVERED, 1)


async def test_what_is_not_acknowledged_is_pending_in_the_file_from_its_commit_on(brokers: Brokers) -> None:
    await written(brokers.start(), key())
    assert brokers.sql("SELECT state FROM wakes") == [("pending",)]


async def test_the_same_end_found_again_is_no_second_wake_in_this_broker_or_the_next(brokers: Brokers) -> None:
    journal = brokers.start()
    (wake,) = await written(journal, key())
    assert journal.outbox.new(key(), EXITED, lambda wake: None) is None
    become(journal, wake, *DONE)
    journal.flush()
    assert journal.outbox.wakes == {}  # what is over costs no memory
    assert journal.outbox.new(key(), EXITED, lambda wake: None) is None
    assert brokers.start().outbox.new(key(), EXITED, lambda wake: None) is None


async def test_a_thread_is_empty_once_its_wakes_are_over_and_have_expired_and_their_numbers_do_not_come_again(
    brokers: Brokers,
) -> None:
    journal = brokers.start()
    for wake in await written(journal, key(), key("1001"), ("u", "1000", 0, "exit")):
        become(journal, wake, *DONE)
    journal.flush()
    assert not journal.outbox.is_empty("t")
    brokers.sql("UPDATE wakes SET at = at - 7200")
    assert journal.outbox.is_empty("t")
    assert [*journal.empty(["t", "u"])] == ["t"]
    journal.thread("t")
    assert journal.forget(["t"])
    assert brokers.sql("SELECT number, thread FROM wakes") == [(3, "u")]


async def test_another_rule_process_or_setting_is_another_wake(brokers: Brokers) -> None:
    journal = brokers.start()
    wakes = await written(journal, key(), key("1001"), key(rule="output=x"), key(generation=1))
    assert [wake.number for wake in wakes] == [1, 2, 3, 4]


async def test_a_wake_is_in_the_same_transaction_as_the_end_it_reports(brokers: Brokers, children: Any) -> None:
    journal = brokers.start()
    thread = journal.thread("t")
    row = {"thread": "t", "process_id": "1000", "call_id": "c", "command": ["x"], "outcome": EXITED["outcome"]}
    thread.use("1000", "c", lambda: row)
    journal.flush()
    before = journal.outbox.new(key(), EXITED, lambda wake: None)
    thread.keep(row, children.transcript("1000", b"x"))
    assert before is not None
    statements: list[str] = []
    journal._database._writer.set_trace_callback(statements.append)  # type: ignore[union-attr]
    journal.flush()
    assert [word for line in statements if (word := line.split()[0]) in ("BEGIN", "COMMIT")] == ["BEGIN", "COMMIT"]
    assert sum("INTO wakes" in line for line in statements) == sum("INTO processes" in line for line in statements)


async def test_a_number_is_never_given_out_twice(brokers: Brokers) -> None:
    journal = brokers.start()
    (wake,) = await written(journal, key())
    become(journal, wake, *DONE)
    (wake,) = await written(brokers.start(), key("1001"))
    assert wake.number == 2


async def test_what_is_over_is_forgotten_when_it_is_old_and_its_process_is_not_alive(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EXPIRE_EVERY", 1)
    journal = brokers.start(keep=0.0)
    journal.thread("t").use("1001", "c", lambda: None)
    wakes = await written(journal, key(), key("1001"), key("1002"), key("1003"))
    for wake in wakes[:2]:
        become(journal, wake, *DONE)
    journal.flush()
    await written(journal, key("1004"))
    assert [number for (number,) in brokers.sql("SELECT number FROM wakes")] == [2, 3, 4, 5]


async def test_a_dead_letter_and_what_was_read_can_be_found_by_their_numbers(brokers: Brokers) -> None:
    journal = brokers.start()
    (wake,) = await written(journal, key())
    become(journal, wake, Event.COMMITTED, Event.READ)
    journal.flush()
    assert journal.outbox.wakes == {}
    found = journal.outbox.revive(wake.number)
    assert found
    assert found.fate.state is State.READ
    assert journal.outbox.revive(99) is None
    assert [one.number for one in journal.outbox.rows(None, everything=False)] == []
    assert [one.number for one in journal.outbox.rows("t", everything=True)] == [wake.number]
    assert [one.number for one in journal.outbox.rows("u", everything=True)] == []


async def test_wakes_are_listed_piece_by_piece_whatever_is_in_memory_or_in_the_file(brokers: Brokers) -> None:
    journal = brokers.start()
    wakes = await written(journal, *(key(str(process_id)) for process_id in range(1000, 1010)))
    for wake in wakes[::2]:
        become(journal, wake, *DONE)  # and so out of memory
    journal.flush()
    for at_once in (1, 3, 10, 11):
        for everything, wanted in ((True, wakes), (False, wakes[1::2])):
            listed: list[int] = []
            while page := [*journal.outbox.rows("t", everything, listed[-1] if listed else 0, at_once)]:
                assert len(page) <= at_once
                listed += [one.number for one in page]
            assert listed == [wake.number for wake in wanted]


async def test_a_file_of_version_1_gets_the_tables_it_lacks(brokers: Brokers) -> None:
    journal = brokers.start()
    journal.thread("t").reached(5)
    brokers.end()
    for statement in ("DROP TABLE programs", "DROP TABLE wakes", "DROP TABLE watches", "PRAGMA user_version = 1"):
        brokers.sql(statement)
    journal = brokers.start()
    assert (journal.trouble, journal.thread("t").epoch) == ("", 5)
    await written(journal, key())


async def test_a_disk_that_takes_nothing_keeps_nobody_from_being_woken(brokers: Brokers) -> None:
    journal = brokers.start()
    journal.flush()
    brokers.sql("CREATE TRIGGER full BEFORE INSERT ON wakes BEGIN SELECT RAISE(ABORT, 'no'); END")
    journal._database._writer.execute("PRAGMA query_only = ON")  # type: ignore[union-attr]
    (wake,) = await written(journal, key())
    assert journal.trouble
    brokers.sql("DROP TRIGGER full")
    journal._database._writer.execute("PRAGMA query_only = OFF")  # type: ignore[union-attr]
    assert list(journal.outbox.wakes) == [wake.number]
    assert [one.key for one in brokers.start().outbox.wakes.values()] == [key()]


async def test_damage_loses_no_program_and_no_wake_that_the_broker_knows(brokers: Brokers) -> None:
    journal = brokers.start()
    journal.outbox.start("t", PROGRAM)
    await written(journal, key())
    brokers.sql("CREATE TRIGGER bad BEFORE INSERT ON wakes BEGIN SELECT RAISE(ABORT, 'no'); END")
    await written(journal, key("1001"))
    outbox = brokers.start().outbox
    assert outbox.programs == {"t": PROGRAM}
    assert [one.process_id for one in outbox.wakes.values()] == ["1000", "1001"]
