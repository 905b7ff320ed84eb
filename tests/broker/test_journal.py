"""The journal, in real files: outcomes, output with its gaps, and ids for ever; and every way a file can go wrong.

`Brokers` starts one journal after the other on the same file, as brokers do.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlive.broker import journal as module
from outlive.broker.journal import Journal, ThreadJournal
from outlive.broker.records import Key, Limits, Record, Shelf
from outlive.common.errors import ExpiredProcess, Unavailable, UnknownProcess
from outlive.common.inlet import name_of
from outlive.common.messages import WriteStdin
from outlive.common.transcript import Gap
from outlive.common.transcript import Limits as Kept

SMALL = Kept(head=8192, tail=8192, unread=0, slack=4096)
HOUR = 3600.0


def row_of(process_id: str, outcome: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "thread": "t",
        "process_id": process_id,
        "call_id": f"call-{process_id}",
        "pid": 4711,
        "state": "ended",
        "worker_pid": None,
        "command": ["/bin/sh"],
        "cwd": "/",
        "tty": True,
        "started_at": "2023-11-14T22:13:20.123Z",
        "bytes_written": 1,
        "bytes_delivered": 1,
        "outcome": outcome or {"kind": "exited", "code": 3},
        **fields,
    }


def alive(process_id: str, **fields: Any) -> dict[str, Any]:
    return {**row_of(process_id, state="attached", worker_pid=7), "outcome": None, **fields}


def overwrite(path: Path, pieces: list[tuple[int, bytes]], length: int | None = None) -> None:
    """Damage a file."""
    with open(path, "r+b") as file:
        for where, what in pieces:
            file.seek(where)
            file.write(what)
        if length is not None:
            file.truncate(length)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


class Brokers:
    """The brokers of one state folder, one after the other; each has a journal."""

    def __init__(self, folder: Path, children: Any) -> None:
        self.path = folder / "journal.db"
        self.logged: list[str] = []
        self.boot = "this boot"
        self._children = children
        self._journals: list[Journal] = []

    def start(self, *, hours: float = 24.0, count: int = 1000, size: int = 1 << 30) -> Journal:
        """End the last one, if there is one, and start the next."""
        self.end()
        self._journals.append(Journal(self.path, Limits(hours * HOUR, count, size), self.boot, self.logged.append))
        return self._journals[-1]

    def end(self) -> None:
        for journal in self._journals:
            journal.close()
        self._journals.clear()

    def begin(self, thread: ThreadJournal, process_id: str, **fields: Any) -> None:
        thread.use(process_id, f"call-{process_id}", lambda: alive(process_id, **fields))

    def transcript(self, process_id: str, output: bytes = b"x") -> Any:
        return self._children.transcript(process_id, output)

    def finish(self, thread: ThreadJournal, process_id: str, output: bytes = b"x", then: Any = None) -> None:
        self.begin(thread, process_id)
        thread.keep(row_of(process_id), self.transcript(process_id, output))
        if then:
            thread.then(process_id, then)

    def sql(self, query: str, *values: Any) -> list[Any]:
        """Look into the file, or change it, from outside."""
        connection = sqlite3.connect(self.path)
        try:
            with connection:
                return connection.execute(query, values).fetchall()
        finally:
            connection.close()

    def files(self) -> dict[Path, bytes]:
        """Return the database, its log and the index of that as they are on the disk."""
        paths = [Path(f"{self.path}{ending}") for ending in ("", "-wal", "-shm")]
        return {path: path.read_bytes() for path in paths if path.exists()}

    def remove(self) -> None:
        for path in self.files():
            path.unlink()

    def aside(self) -> list[str]:
        """Return the files that were set aside."""
        names = os.listdir(self.path.parent)
        return sorted(
            name for name in names if name.startswith("journal.db.") and not name.endswith(("-wal", "-shm"))
        )


@pytest.fixture
async def brokers(tmp_path: Path, children: Any) -> Any:
    brokers = Brokers(tmp_path, children)
    yield brokers
    brokers.end()


# What a record answers.


async def test_a_kept_process_answers_with_its_outcome_and_every_byte(brokers: Brokers) -> None:
    output = bytes(range(256)) * 5
    journal = brokers.start()
    brokers.finish(journal.thread("t"), "1234", output)
    for _ in range(3):  # from memory, from the file, in the next broker
        record = journal.thread("t").get("1234")
        assert list(record.parts(0, len(output))) == [(0, output)]
        assert record.row == row_of("1234")
        assert record.piece(7, 100).pieces == [(7, output[7:107])]
        answer = record.answer(10_000, 0)
        assert (answer.exit_code, answer.session_id, answer.output_end) == (3, None, len(output))
        assert answer.sentence == "Process exited with code 3"
        journal.flush() if journal._changes else (journal := brokers.start())


async def test_an_answer_after_everything_was_delivered_is_empty_and_still_has_the_outcome(
    brokers: Brokers, children: Any
) -> None:
    thread = brokers.start().thread("t")
    row = row_of("1234", {"kind": "signaled", "signal": 9})
    thread.keep(row, children.transcript("1234", b"all of it"))
    answer = thread.get("1234").answer_write(WriteStdin(thread="t", process_id="1234", chars=b"x"))
    assert (answer.output, answer.exit_code, answer.original_token_count) == ("", 137, 0)
    assert answer.warnings == ["the process has ended; nothing was typed"]


async def test_the_last_calls_of_what_has_ended_are_answered_as_they_were(brokers: Brokers, children: Any) -> None:
    journal = brokers.start()
    calls = {name_of("typed").hex(): (2, 3), name_of("poll").hex(): (0, 5)}
    journal.thread("t").keep(row_of("1234"), children.transcript("1234", b"all of it"), calls)

    def asked(write_id: str, chars: bytes = b"") -> tuple[int, str, list[str]]:
        call = WriteStdin(thread="t", process_id="1234", chars=chars, write_id=write_id)
        answer = thread.get("1234").answer_write(call)
        return answer.typed, answer.output, answer.warnings

    for _ in range(2):
        thread = journal.thread("t")
        assert asked("typed", b"ab") == (2, " of it", [])
        assert asked("typed", b"abc") == (
            2,
            " of it",
            ["the process has ended; only 2 of 3 bytes were typed"],
        )
        assert asked("poll") == (0, "f it", [])
        assert asked("another", b"ab") == (0, "", ["the process has ended; nothing was typed"])
        assert "calls" not in next(iter(thread.rows()))
        journal = brokers.start()


async def test_a_gap_is_kept_as_a_gap(brokers: Brokers, children: Any) -> None:
    output = os.urandom(100_000)
    transcript = children.transcript("1234", output, SMALL)
    journal = brokers.start()
    journal.thread("t").keep(row_of("1234"), transcript)
    thread = brokers.start().thread("t")
    parts = list(thread.get("1234").parts(0, len(output)))
    assert parts == [(0, output[:8192]), Gap(8192, 91_808), (91_808, output[91_808:])]
    assert parts == list(transcript.read(0, len(output)))
    piece = thread.get("1234").piece(8000, 1 << 20)
    assert piece.gaps == [(8192, 91_808)]
    assert piece.ended
    # Of the stream, 84 kB are gone: the file holds what was kept.
    assert brokers.sql("SELECT length(data) FROM outputs") == [(8192 * 2,)]


@given(data=st.data())
def test_a_record_reads_like_the_bytes_it_was_made_of(data: st.DataObject) -> None:
    stream = data.draw(st.binary(max_size=60))
    bounds = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    ranges = list(zip(bounds[::2], bounds[1::2], strict=False))
    kept = {at for first, last in ranges for at in range(first, last)}
    record = Record({}, len(stream), ranges, b"".join(stream[first:last] for first, last in ranges))
    start, end = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    told: dict[int, int | None] = {}
    for part in record.parts(start, end):
        where, what = (
            (range(part.start, part.end), [None] * (part.end - part.start))
            if isinstance(part, Gap)
            else (range(part[0], part[0] + len(part[1])), part[1])
        )
        assert len(where) > 0
        assert not told or where[0] == max(told) + 1, "in order, and without a hole between"
        told.update(zip(where, what, strict=True))
    expected = range(start, min(end, len(stream)))
    assert told == {at: stream[at] if at in kept else None for at in expected}


async def test_a_line_of_ps_comes_back_as_it_was_also_what_is_no_valid_text(brokers: Brokers) -> None:
    odd = {"command": ["/bin/\udcff", "a\0b", "ä"], "cwd": "/\udcfe", "pid": None, "call_id": "call-\ud800\udcff\0"}
    journal = brokers.start()
    thread = journal.thread("t")
    thread.use("1000", odd["call_id"], lambda: alive("1000", **odd))
    thread.keep(row_of("1000", **odd), brokers.transcript("1000", b""))
    thread = brokers.start().thread("t")
    assert list(thread.rows()) == [row_of("1000", **odd)]
    assert thread.calls == {odd["call_id"]: "1000"}


async def test_ps_lists_the_oldest_first_whatever_is_in_memory_or_in_the_file(brokers: Brokers) -> None:
    journal = brokers.start()
    ids = [str(number) for number in range(2000, 1000, -7)]  # more than are looked up at once
    for number, process_id in enumerate(ids):
        brokers.finish(journal.thread("t"), process_id)
        if number % 60 == 59:
            journal.flush()
    assert [row["process_id"] for row in journal.thread("t").rows()] == ids
    again = brokers.start().thread("t")
    assert [row["process_id"] for row in again.rows()] == ids
    assert [row["process_id"] for row in again.rows(ids[9])] == ids[10:]
    assert [row["process_id"] for row in again.rows("1234567")] == ids  # as one that has expired


# Ids and calls.


async def test_an_id_of_another_thread_or_of_nobody_is_unknown(brokers: Brokers) -> None:
    journal = brokers.start()
    brokers.finish(journal.thread("t"), "1234")
    brokers.finish(journal.thread("u"), "4321")
    for _ in range(2):
        with pytest.raises(UnknownProcess, match="4321 was never started in thread t"):
            journal.thread("t").get("4321")
        journal = brokers.start()


async def test_the_next_broker_finds_everything_and_the_ids_for_ever(brokers: Brokers) -> None:
    thread = brokers.start(count=1).thread("t")
    for process_id in ("1000", "99999", "100000"):
        brokers.begin(thread, process_id)
    brokers.finish(thread, "1000")
    brokers.finish(thread, "99999", b"y")
    for _ in range(3):
        thread = brokers.start(count=1).thread("t")
        assert set(thread.ids) == {"1000", "99999", "100000"}
        assert thread.get("99999").data == b"y"
        with pytest.raises(ExpiredProcess):
            thread.get("1000")
        with pytest.raises(Unavailable, match="100000 was alive"):
            thread.get("100000")


async def test_a_call_is_remembered_also_by_the_next_broker_and_when_its_process_has_expired(
    brokers: Brokers,
) -> None:
    thread = brokers.start(count=1).thread("t")
    for process_id in ("1000", "1001"):
        brokers.finish(thread, process_id)
    brokers.begin(thread, "1002")
    for _ in range(3):
        assert thread.calls == {"call-1000": "1000", "call-1001": "1001"}, "who lives answers by itself"
        with pytest.raises(ExpiredProcess):
            thread.get(thread.calls["call-1000"])
        assert thread.get(thread.calls["call-1001"]).row["outcome"] == {"kind": "exited", "code": 3}
        thread = brokers.start(count=1).thread("t")


async def test_only_so_many_calls_are_remembered_and_their_ids_all_the_same(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALLS_REMEMBERED", 3)
    thread = brokers.start(count=1).thread("t")
    for number in range(1000, 1006):
        brokers.finish(thread, str(number))
    for _ in range(2):
        assert list(thread.calls) == ["call-1003", "call-1004", "call-1005"]
        assert set(thread.ids) == {str(number) for number in range(1000, 1006)}
        thread = brokers.start(count=1).thread("t")
    brokers.end()
    assert brokers.sql("SELECT count(call_id) FROM processes") == [(3,)]


async def test_what_never_ran_uses_its_id_and_not_its_call(brokers: Brokers) -> None:
    journal = brokers.start()
    brokers.begin(journal.thread("t"), "1000")
    journal.flush()
    journal.thread("t").never_ran("1000")
    for _ in range(2):
        thread = journal.thread("t")
        assert (set(thread.ids), dict(thread.calls), len(thread), journal.living()) == ({"1000"}, {}, 0, [])
        with pytest.raises(ExpiredProcess):
            thread.get("1000")
        journal = brokers.start()


async def test_threads_and_their_epochs_go_on_where_the_last_broker_stopped(brokers: Brokers) -> None:
    journal = brokers.start()
    journal.thread("unused")
    for epoch in (1, 2, 3):
        journal.thread("t").reached(epoch)
    journal = brokers.start()
    assert journal.thread_ids == ["t", "unused"]
    assert (journal.thread("t").epoch, journal.thread("unused").epoch) == (3, 0)
    journal.thread("t").reached(4)
    assert brokers.start().thread("t").epoch == 4


# Limits.


async def test_the_oldest_make_room_and_answer_expired(brokers: Brokers) -> None:
    journal = brokers.start(count=3)
    for process_id in ("5000", "4000", "3000", "2000", "1000"):
        brokers.finish(journal.thread("t"), process_id)
        brokers.finish(journal.thread("u"), process_id)
    for _ in range(2):
        thread = journal.thread("t")
        assert [row["process_id"] for row in thread.rows()] == ["3000", "2000", "1000"]
        assert (len(thread), len(journal.thread("u"))) == (3, 3)
        with pytest.raises(ExpiredProcess):
            thread.get("4000")
        journal = brokers.start(count=3)
    brokers.end()
    assert brokers.sql("SELECT count(*) FROM outputs") == [(6,)]


async def test_what_is_too_old_expires_and_what_is_not_stays(brokers: Brokers) -> None:
    thread = brokers.start().thread("t")
    for process_id in ("2000", "1000"):
        brokers.finish(thread, process_id)
    brokers.end()
    brokers.sql("UPDATE processes SET archived_at = archived_at - 25 * 3600 WHERE id = 2000")
    for _ in range(2):
        thread = brokers.start().thread("t")
        assert thread.get("1000").data == b"x"
        with pytest.raises(ExpiredProcess):
            thread.get("2000")
    brokers.end()
    assert brokers.sql("SELECT state, row, outcome, size FROM processes WHERE id = 2000") == [
        ("expired", None, None, None)
    ]
    assert brokers.sql("SELECT data FROM outputs") == [(b"x",)]


async def test_what_grows_old_while_nobody_asks_expires_when_somebody_does(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = brokers.start()
    brokers.finish(journal.thread("t"), "1000")
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 25 * HOUR)
    with pytest.raises(ExpiredProcess):
        journal.thread("t").get("1000")
    assert len(journal.thread("t")) == 0


async def test_the_size_of_all_threads_together_is_limited_oldest_first(brokers: Brokers) -> None:
    journal = brokers.start(size=400_000)
    for number in range(6):
        brokers.finish(journal.thread(f"t{number % 2}"), str(1000 + number), os.urandom(100_000))
    for _ in range(2):
        left = [row["process_id"] for name in ("t0", "t1") for row in journal.thread(name).rows()]
        assert sorted(left) == ["1003", "1004", "1005"]
        with pytest.raises(ExpiredProcess):
            journal.thread("t0").get("1002")
        journal = brokers.start(size=400_000)
    journal = brokers.start(size=150_000)  # a limit that was lowered
    assert [row["process_id"] for name in ("t0", "t1") for row in journal.thread(name).rows()] == ["1005"]


async def test_a_file_that_has_become_too_large_gives_the_disk_back(brokers: Brokers) -> None:
    journal = brokers.start()
    for number in range(12):
        brokers.finish(journal.thread("t"), str(1000 + number), os.urandom(1 << 20))
    brokers.end()
    assert brokers.path.stat().st_size > 12 << 20
    brokers.start(size=2 << 20)
    brokers.end()
    assert brokers.path.stat().st_size < 3 << 20


KEYS = st.tuples(st.sampled_from("tu"), st.sampled_from("1234"))


@given(
    steps=st.lists(
        st.tuples(KEYS, st.integers(0, 5), st.integers(0, 40), st.sampled_from(["add", "remove", "expire"]))
    ),
    count=st.integers(0, 3),
    size=st.integers(0, 100),
    seconds=st.integers(0, 10),
)
def test_exactly_what_is_too_old_or_too_much_goes_oldest_first(
    steps: list[tuple[Key, int, int, str]], count: int, size: int, seconds: int
) -> None:
    shelf = Shelf(Limits(seconds, count, size))
    kept: list[tuple[Key, int, int]] = []
    now = 0
    for key, later, weight, what in steps:
        now += later
        if what == "expire":
            gone = set(shelf.expire(now))
            for thread in "tu":
                mine = [item for item in kept if item[0][0] == thread]
                kept = [item for item in kept if item not in mine[: max(0, len(mine) - count)]]
            while kept and (kept[0][1] < now - seconds or sum(item[2] for item in kept) > size):
                kept.pop(0)
            assert not gone & {item[0] for item in kept}
        else:
            kept = [item for item in kept if item[0] != key]
            if what == "add":
                shelf.add(key, now, weight)
                kept.append((key, now, weight))
            else:
                shelf.remove(key)
        for thread in "tu":
            assert list(shelf.ids(thread)) == [item[0][1] for item in kept if item[0][0] == thread]
        assert shelf.size == sum(item[2] for item in kept)


# Who lives, and who is lost.


async def test_what_was_alive_in_another_boot_is_lost_with_that_reason(brokers: Brokers) -> None:
    thread = brokers.start().thread("t")
    brokers.begin(thread, "1000")
    brokers.finish(thread, "2000", b"kept")
    brokers.boot = "the next boot"
    for _ in range(2):
        journal = brokers.start()
        assert journal.living() == []
        thread = journal.thread("t")
        record = thread.get("1000")
        assert record.row == {
            **alive("1000"),
            "state": "ended",
            "worker_pid": None,
            "bytes_written": 0,
            "bytes_delivered": 0,
            "outcome": {"kind": "lost", "reason": "rebooted"},
        }
        answer = record.answer(1000, 0)
        assert (answer.exit_code, answer.sentence) == (None, "Process lost: rebooted")
        assert record.piece(0, 100).pieces == []
        assert thread.calls["call-1000"] == "1000", "it is not started again"
        assert thread.get("2000").data == b"kept", "what had ended is still there"
        assert [row["process_id"] for row in thread.rows()] == ["2000", "1000"]


async def test_who_lives_in_this_boot_is_told_to_the_next_broker_which_may_lose_it(brokers: Brokers) -> None:
    journal = brokers.start()
    brokers.begin(journal.thread("t"), "1000")
    brokers.begin(journal.thread("u"), "1000")
    brokers.finish(journal.thread("t"), "2000")
    journal = brokers.start()
    assert sorted(journal.living()) == [("t", "1000"), ("u", "1000")]
    journal.lose("t", "1000", "the broker and its keeper died")
    for _ in range(2):
        assert journal.living() == [("u", "1000")]
        outcome = journal.thread("t").get("1000").row["outcome"]
        assert outcome == {"kind": "lost", "reason": "the broker and its keeper died"}
        journal = brokers.start()


async def test_of_what_is_lost_and_was_never_described_the_call_is_known_all_the_same(brokers: Brokers) -> None:
    thread = brokers.start().thread("t")
    thread.use("1000", "call-1000", lambda: None)
    journal = brokers.start()
    journal.lose("t", "1000", "nobody knew")
    for _ in range(2):
        thread = journal.thread("t")
        assert dict(thread.calls) == {"call-1000": "1000"}
        with pytest.raises(ExpiredProcess):
            thread.get("1000")
        journal = brokers.start()


async def test_what_is_deposited_with_the_next_broker_too_is_written_as_that_sees_it(brokers: Brokers) -> None:
    brokers.begin(brokers.start().thread("t"), "1000", pid=None)
    for _ in range(2):
        brokers.begin(brokers.start().thread("t"), "1000", pid=42)
    brokers.end()
    assert brokers.sql("SELECT id, state, pid FROM processes") == [(1000, "alive", 42)]


async def test_only_who_lives_can_be_lost(brokers: Brokers) -> None:
    journal = brokers.start()
    brokers.finish(journal.thread("t"), "1000")
    journal.lose("t", "1000", "no")
    journal.lose("t", "2000", "no")
    assert journal.thread("t").get("1000").row == row_of("1000")
    assert set(journal.thread("t").ids) == {"1000"}


async def test_what_was_lost_and_is_found_lives_again(brokers: Brokers) -> None:
    journal = brokers.start()
    brokers.begin(journal.thread("t"), "1000")
    journal.lose("t", "1000", "nobody knew")
    for lost in (journal, brokers.start()):
        thread = lost.thread("t")
        brokers.begin(thread, "1000")
        assert (lost.living(), dict(thread.calls), len(thread)) == ([("t", "1000")], {}, 0)
        if lost is journal:
            journal.lose("t", "1000", "nobody knew")
    thread.keep(row_of("1000"), brokers.transcript("1000", b"all"))
    assert brokers.start().thread("t").get("1000").data == b"all"


async def test_a_process_that_is_deposited_again_after_its_end_keeps_its_record(brokers: Brokers) -> None:
    journal = brokers.start()
    brokers.finish(journal.thread("t"), "1000", b"all")
    brokers.begin(journal.thread("t"), "1000")
    assert journal.living() == []
    assert journal.thread("t").get("1000").data == b"all"


# Writing.


async def test_of_a_short_command_only_its_end_is_written(brokers: Brokers) -> None:
    thread = brokers.start().thread("t")
    looked: list[str] = []
    thread.use("1000", "call-1000", lambda: looked.append("1000") or alive("1000"))  # type: ignore[func-returns-value]
    brokers.finish(thread, "1000")
    brokers.end()
    assert looked == []
    assert brokers.sql("SELECT id, state FROM processes") == [(1000, "ended")]


async def test_whoever_wants_to_know_is_told_in_the_loop_once_it_is_committed(brokers: Brokers) -> None:
    journal = brokers.start()
    told: asyncio.Queue[tuple[str, bool, Any]] = asyncio.Queue()

    def then(what: str) -> Any:
        def tell(written: bool) -> None:
            asyncio.get_running_loop()
            told.put_nowait((what, written, brokers.sql("SELECT state FROM processes WHERE id = 1000")))

        return tell

    brokers.finish(journal.thread("t"), "1000", then=then("kept"))
    assert brokers.sql("SELECT * FROM processes") == [], "not before"
    assert await told.get() == ("kept", True, [("ended",)])
    journal.thread("t").never_ran("2000")
    journal.thread("t").then("2000", then("never ran"))
    assert await told.get() == ("never ran", True, [("ended",)])
    journal.thread("t").then("2000", then("has been"))
    assert await told.get() == ("has been", True, [("ended",)])
    # What is replaced before it is written is told with what replaces it.
    journal = brokers.start(count=0)
    brokers.finish(journal.thread("t"), "1000", then=then("kept"))
    assert await told.get() == ("kept", True, [("expired",)])
    brokers.end()
    assert told.empty()


async def test_a_broker_that_ends_writes_and_tells_everything_before(brokers: Brokers) -> None:
    journal = brokers.start()
    told: list[bool] = []
    for number in range(1000, 1200):
        brokers.finish(journal.thread("t"), str(number), then=told.append)
    brokers.end()
    assert told == [True] * 200
    assert brokers.sql("SELECT count(*) FROM outputs") == [(200,)]


async def test_what_is_committed_survives_a_kill_9(brokers: Brokers, tmp_path: Path) -> None:
    script = """
import asyncio, json, os, signal, sys
from pathlib import Path
from outlive.broker.journal import Journal
from outlive.broker.records import Limits
from outlive.common import kernel
from outlive.common.transcript import Facts, Lease, Limits as Kept, Transcript
async def main():
    journal = Journal(Path(sys.argv[1]), Limits(3600, 1000, 1 << 30), "this boot", print)
    thread = journal.thread("t")
    facts = Facts("t", "1000", "call-1000", "m" * 32, (b"x",), b"/", True, 80, 24, 0, kernel.boot_id(), Kept())
    fd = Transcript.create(facts, Lease(pid=1, start_time=1, epoch=1))
    os.write(fd, b"all of it")
    thread.keep(json.loads(sys.argv[2]), Transcript(fd))
    thread.then("1000", lambda written: os.kill(os.getpid(), signal.SIGKILL))
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    arguments = [sys.executable, "-c", script, str(brokers.path), json.dumps(row_of("1000"))]
    ended = await asyncio.to_thread(subprocess.run, arguments, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    record = brokers.start().thread("t").get("1000")
    assert (record.data, record.row["outcome"]) == (b"all of it", {"kind": "exited", "code": 3})


async def test_the_file_and_its_log_are_private_whatever_they_were(brokers: Brokers) -> None:
    brokers.path.touch(0o666)
    brokers.path.chmod(0o666)
    mask = os.umask(0)
    try:
        journal = brokers.start()
        brokers.finish(journal.thread("t"), "1234", b"secret")
        journal.flush()
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in brokers.path.parent.glob("journal*")}
    assert modes == {"journal.db": 0o600, "journal.db-wal": 0o600, "journal.db-shm": 0o600}


# What can be wrong with the file.


def fill(brokers: Brokers) -> None:
    """Write something into the file, and close it."""
    journal = brokers.start()
    journal.thread("t").reached(5)
    for number in range(1000, 1040):
        brokers.finish(journal.thread("t"), str(number), os.urandom(3000))
    brokers.begin(journal.thread("t"), "2000")
    brokers.end()


def works(brokers: Brokers) -> None:
    """What ends now is kept, and there in the next broker."""
    brokers.finish(brokers.start().thread("t"), "3000", b"new")
    journal = brokers.start()
    assert journal.thread("t").get("3000").data == b"new"
    assert journal.trouble == ""


async def test_a_file_that_is_no_database_is_set_aside_and_everything_works(brokers: Brokers) -> None:
    brokers.path.write_bytes(b"not a database" * 1000)
    journal = brokers.start()
    (aside,) = brokers.aside()
    assert aside.startswith("journal.db.damaged-2")
    assert (brokers.path.parent / aside).read_bytes() == b"not a database" * 1000
    assert "is damaged" in journal.trouble
    assert aside in journal.trouble
    assert brokers.logged == [f"journal: {journal.trouble}"]
    works(brokers)


@pytest.mark.parametrize("version", [3, 0])
async def test_a_database_of_another_version_is_set_aside_and_its_ids_are_taken_over(
    brokers: Brokers, version: int
) -> None:
    fill(brokers)
    brokers.sql(f"PRAGMA user_version = {version}")
    journal = brokers.start()
    (aside,) = brokers.aside()
    assert aside.startswith(f"journal.db.version-{version}-2")
    assert f"has version {version}" in journal.trouble
    thread = journal.thread("t")
    assert (thread.epoch, len(thread.ids), len(thread), len(thread.calls)) == (5, 41, 0, 41)
    with pytest.raises(ExpiredProcess):
        thread.get("1000")
    brokers.begin(thread, "2000")  # it lives, and is deposited again
    assert "call-2000" not in thread.calls
    assert journal.living() == [("t", "2000")]
    works(brokers)


async def test_somebody_elses_database_is_set_aside(brokers: Brokers) -> None:
    brokers.sql("CREATE TABLE pictures (name)")
    assert "not ours" in brokers.start().trouble
    assert [name.split("-")[0] for name in brokers.aside()] == ["journal.db.foreign"]
    works(brokers)


async def test_what_is_set_aside_never_takes_the_place_of_what_was_set_aside_before(brokers: Brokers) -> None:
    for number in range(3):
        brokers.path.write_bytes(b"%d" % number * 5000)
        brokers.start()
        brokers.end()
    assert sorted((brokers.path.parent / name).read_bytes()[:1] for name in brokers.aside()) == [b"0", b"1", b"2"]


async def test_a_table_of_another_shape_is_set_aside(brokers: Brokers) -> None:
    fill(brokers)
    brokers.sql("ALTER TABLE processes RENAME COLUMN archived_at TO at")
    assert "is damaged" in brokers.start().trouble
    works(brokers)


async def test_a_truncated_log_loses_its_end_and_nothing_before(brokers: Brokers, tmp_path: Path) -> None:
    journal = brokers.start()
    for number in range(1000, 1010):
        brokers.finish(journal.thread("t"), str(number))
        journal.flush()
    # What a killed broker leaves, cut within the last commit.
    other = tmp_path / "killed"
    other.mkdir()
    for path, data in brokers.files().items():
        (other / path.name).write_bytes(data)
    log = other / "journal.db-wal"
    os.truncate(log, log.stat().st_size - 100)
    killed = Brokers(other, brokers._children)
    thread = killed.start().thread("t")
    assert [row["process_id"] for row in thread.rows()] == [str(number) for number in range(1000, 1009)]
    assert killed.aside() == []
    works(killed)
    killed.end()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    holes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=300)), max_size=6),
    length=st.floats(0, 1),
)
def test_whatever_happened_to_the_file_the_broker_starts_and_keeps_what_ends(
    children: Any, tmp_path_factory: pytest.TempPathFactory, holes: list[tuple[float, bytes]], length: float
) -> None:
    async def act() -> None:
        brokers = Brokers(tmp_path_factory.mktemp("damaged"), own)
        fill(brokers)
        size = brokers.path.stat().st_size
        pieces = [(int(where * size), what) for where, what in holes]
        overwrite(brokers.path, pieces, int(length * 2 * size) if length < 0.5 else None)
        journal = brokers.start()
        thread = journal.thread("t")
        assert all(isinstance(row["process_id"], str) for row in thread.rows())
        for process_id in list(thread.ids):
            with suppress(ExpiredProcess, Unavailable):
                thread.get(process_id)
        brokers.finish(thread, "3000", b"new")
        journal.flush()
        journal.flush()  # the first may have met the damage
        assert thread.get("3000").data == b"new"
        assert brokers.start().thread("t").get("3000").data == b"new"
        brokers.end()

    own = type(children)()
    try:
        asyncio.run(act())
    finally:
        own.close()


async def test_damage_that_is_met_while_it_is_used_sets_the_file_aside_and_keeps_what_is_known(
    brokers: Brokers,
) -> None:
    fill(brokers)
    journal = brokers.start()
    thread = journal.thread("t")
    assert len(thread.ids) == 41
    told: list[bool] = []
    brokers.begin(thread, "3000")
    brokers.finish(thread, "3001", b"new", told.append)
    size = brokers.path.stat().st_size
    overwrite(brokers.path, [(4096, b"\xff" * (size - 4096))])  # every page but the first
    with pytest.raises(ExpiredProcess):
        thread.get("1000")
    journal.flush()
    assert "is damaged" in journal.trouble
    assert len(brokers.aside()) >= 1
    journal = brokers.start()
    thread = journal.thread("t")
    assert thread.get("3001").data == b"new"
    assert len(told) == 1
    assert sorted(journal.living()) == [("t", "2000"), ("t", "3000")]
    assert len(thread.ids) == 43
    assert thread.epoch == 5


async def test_damage_that_is_met_in_the_list_of_ids_leaves_none_of_those_that_can_be_read_to_be_given_out_again(
    brokers: Brokers,
) -> None:
    fill(brokers)
    journal = brokers.start()
    overwrite(brokers.path, [(page, b"\xff" * 100) for page in range(5 * 4096, 12 * 4096, 4096)])
    ids = {*map(str, range(1000, 1040)), "2000"}
    assert set(journal.thread("t").ids) == ids
    assert "is damaged" in journal.trouble
    brokers.finish(journal.thread("t"), "3000", b"new")
    journal = brokers.start()
    thread = journal.thread("t")
    assert set(thread.ids) == ids | {"3000"}
    assert journal.living() == [("t", "2000")]
    assert thread.get("3000").data == b"new"


async def test_a_disk_on_which_no_file_lasts_is_given_up(brokers: Brokers) -> None:
    journal = brokers.start()
    thread = journal.thread("t")
    for number in range(1000, 1010):
        brokers.finish(thread, str(number))
        journal.flush()
        with suppress(ExpiredProcess):
            thread.get(str(number))
        if brokers.path.exists():
            for path in brokers.files():
                overwrite(path, [(0, b"\xff" * path.stat().st_size)])
            brokers.finish(thread, str(number + 1000))
            journal.flush()
    assert len(brokers.aside()) <= 3
    assert thread.get("2009").data == b"x"


async def test_a_record_that_makes_no_sense_counts_as_expired(brokers: Brokers) -> None:
    for column, value in [
        ("ranges", "nonsense"),
        ("ranges", "[[0, 2]]"),
        ("ranges", "[[5, 2]]"),
        ("ranges", None),
        ("row", "{"),
        ("row", None),
        ("row", b"\xff\xfe"),
        ("outcome", "{"),
        ("written", "many"),
    ]:
        thread = brokers.start().thread("t")
        for process_id in ("1000", "2000"):
            brokers.finish(thread, process_id)
        brokers.end()
        brokers.sql(f"UPDATE processes SET {column} = ? WHERE id = 1000", value)
        thread = brokers.start().thread("t")
        with pytest.raises(ExpiredProcess):
            thread.get("1000")
        assert thread.get("2000").data == b"x"
        assert [row["process_id"] for row in thread.rows()] == ["2000"]
        brokers.end()
        brokers.remove()


# What can be wrong with the disk.


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Refuse writes beyond `size` with EFBIG: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_keeps_what_ends_in_memory_says_so_once_and_writes_it_when_there_is_room(
    brokers: Brokers,
) -> None:
    big, small = os.urandom(200_000), b"x"
    journal = brokers.start()
    journal.flush()
    thread = journal.thread("t")
    told: list[tuple[str, bool]] = []
    made = {id: brokers.transcript(id, output) for id, output in (("1000", big), ("2000", small), ("3000", big))}
    with files_no_larger_than(100_000):
        for process_id, transcript in made.items():
            brokers.begin(thread, process_id)
            thread.keep(row_of(process_id), transcript)
            thread.then(process_id, lambda written, id=process_id: told.append((id, written)))
        brokers.begin(thread, "4000")
        journal.flush()
        assert sorted(told) == [("1000", False), ("2000", True), ("3000", False)]
        thread.then("1000", lambda written: told.append(("1000 later", written)))
        await asyncio.sleep(0)
        assert told.pop() == ("1000 later", False)
        assert "I/O" in journal.trouble or "full" in journal.trouble
        assert thread.get("1000").data == big
        assert thread.get("2000").data == small
        # A killed broker leaves how they ended, and that their output is not there.
        assert brokers.sql("SELECT state, outcome, ranges, written FROM processes WHERE id = 1000") == [
            ("ended", '{"kind": "exited", "code": 3}', "[]", len(big))
        ]
    assert len([line for line in brokers.logged if "cannot be written" in line]) == 1
    journal._try_again()
    journal.flush()
    assert journal.trouble == ""
    assert brokers.logged[-1] == "journal: everything is written again"
    assert len(told) == 3, "nobody is told twice"
    assert brokers.start().thread("t").get("1000").data == big


async def test_what_does_not_fit_into_memory_either_expires_oldest_first(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNWRITTEN_MAX", 500_000)
    journal = brokers.start()
    journal.flush()
    made = {str(number): brokers.transcript(str(number), os.urandom(150_000)) for number in range(1000, 1006)}
    with files_no_larger_than(100_000):
        for process_id, transcript in made.items():
            journal.thread("t").keep(row_of(process_id), transcript)
            journal.flush()
        assert [row["process_id"] for row in journal.thread("t").rows()] == ["1003", "1004", "1005"]
        with pytest.raises(ExpiredProcess):
            journal.thread("t").get("1002")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, if we may."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_disk(folder: Path) -> Path:
    """Leave no byte on a small file system."""
    with open(folder / "filler", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return folder / "filler"


async def test_a_broker_starts_on_a_full_disk_answers_what_was_and_writes_when_there_is_room(
    tmp_path: Path, children: Any
) -> None:
    with mounted(tmp_path / "disk", "size=4m,mode=0700") as folder:
        brokers = Brokers(folder, children)
        fill(brokers)
        filler = fill_disk(folder)
        journal = brokers.start()
        try:
            assert journal.trouble != ""
            thread = journal.thread("t")
            assert (thread.epoch, len(thread.ids), len(thread.get("1000").data)) == (5, 41, 3000)
            brokers.finish(thread, "3000", b"new")
            journal.flush()
            assert thread.get("3000").data == b"new"
            filler.unlink()
            journal._try_again()
            journal.flush()
            assert journal.trouble == ""
            assert brokers.start().thread("t").get("3000").data == b"new"
        finally:
            brokers.end()


async def test_a_disk_that_fills_up_while_the_broker_runs_loses_nothing_of_it(
    tmp_path: Path, children: Any
) -> None:
    with mounted(tmp_path / "disk", "size=4m,mode=0700") as folder:
        brokers = Brokers(folder, children)
        try:
            fill(brokers)
            journal = brokers.start()
            filler = fill_disk(folder)
            thread = journal.thread("t")
            told: list[bool] = []
            brokers.finish(thread, "3000", os.urandom(300_000), told.append)
            journal.flush()
            assert told == [False]
            assert "full" in journal.trouble
            assert len(thread.get("3000").data) == 300_000
            assert len(thread.get("1000").data) == 3000
            filler.unlink()
            brokers.end()  # which tries a last time
            assert len(brokers.start().thread("t").get("3000").data) == 300_000
        finally:
            brokers.end()


@pytest.mark.parametrize("killed", [False, True], ids=["a broker that ended", "a broker that was killed"])
async def test_a_broker_starts_on_a_read_only_disk_and_answers_what_was(
    tmp_path: Path, children: Any, killed: bool
) -> None:
    with mounted(tmp_path / "disk", "size=4m,mode=0700") as folder:
        brokers = Brokers(folder, children)
        fill(brokers)
        if killed:
            journal = brokers.start()
            brokers.finish(journal.thread("t"), "3000")
            journal.flush()
            kept = brokers.files()
            brokers.end()
            for path, data in kept.items():
                path.write_bytes(data)
        remount(folder, "ro")
        journal = brokers.start()
        try:
            assert "journal.db" in journal.trouble
            thread = journal.thread("t")
            assert (thread.epoch, len(thread.ids), len(thread.get("1000").data)) == (5, 41 + killed, 3000)
            brokers.finish(thread, "4000", b"new")
            thread.reached(6)
            journal.flush()
            assert thread.get("4000").data == b"new"
        finally:
            brokers.end()
        remount(folder, "rw")
        thread = brokers.start().thread("t")
        assert len(thread.get("1000").data) == 3000
        brokers.end()


async def test_a_broker_starts_where_the_state_folder_is_none(tmp_path: Path, children: Any) -> None:
    (tmp_path / "state").touch()
    brokers = Brokers(tmp_path / "state", children)
    journal = brokers.start()
    assert "Not a directory" in journal.trouble
    told: list[bool] = []
    brokers.finish(journal.thread("t"), "1000", b"new", told.append)
    journal.flush()
    assert told == [False]
    assert journal.thread("t").get("1000").data == b"new"
    brokers.end()


async def test_a_second_broker_of_the_same_state_folder_leaves_the_file_alone(
    brokers: Brokers, children: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outlive.broker.database._LOCK_DEADLINE", 0.0)
    journal = brokers.start()
    brokers.begin(journal.thread("t"), "1000")
    brokers.finish(journal.thread("t"), "2000")
    journal.flush()
    other = Brokers(brokers.path.parent, children)
    other.boot = "another boot"
    second = other.start()
    assert "another broker uses" in second.trouble
    assert second.living() == []
    assert second.thread("t").get("2000").data == b"x"
    other.finish(second.thread("t"), "3000", b"of the second")
    second.flush()
    assert second.thread("t").get("3000").data == b"of the second"
    other.end()
    assert brokers.sql("SELECT id, state FROM processes ORDER BY id") == [(1000, "alive"), (2000, "ended")]
