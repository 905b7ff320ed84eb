"""The broker's end of a keeper that is a socket in the test's hand."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from outlive.broker.keeping import Keeping
from outlive.common import notify

# More than a keeper's queue takes while it does not look.
MANY = 600
# Seconds for what a busy machine does.
PATIENCE = 30.0


class Keeper:
    """What the broker tells, in its order, and a line to the broker."""

    def __init__(self, path: Path) -> None:
        self.listener = notify.listen(path)
        self.line, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def hear(self) -> tuple[dict[str, str], list[int]]:
        """Return the next datagram."""
        while True:
            try:
                received = notify.receive(self.listener)
            except BlockingIOError:
                await asyncio.sleep(0)  # our broker lives in the same loop
                continue
            assert received is not None
            return received[0], received[1]

    def hear_all(self, count: int) -> list[dict[str, str]]:
        """Wait for so many datagrams without descriptors."""
        received = [notify.receive(self.listener) for _ in range(count)]
        return [fields for fields, _, _ in filter(None, received)]

    def close(self) -> None:
        """Be gone."""
        self.listener.close()
        self.line.close()


class Heard:
    """What the broker made of it."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []
        self.orphans: list[tuple[int, int, int]] = []
        self.lost = asyncio.Event()

    def keeping(self, line: socket.socket | None) -> Keeping:
        """Return a new one that tells us."""
        return Keeping(
            line,
            on_found=self.found.append,
            on_orphan=lambda *numbers: self.orphans.append(numbers),
            on_lost=self.lost.set,
        )


@pytest.fixture
async def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Keeper]:
    monkeypatch.setenv(notify.ADDRESS, str(tmp_path / "keeper"))
    keeper = Keeper(tmp_path / "keeper")
    yield keeper
    keeper.close()


@pytest.fixture
async def heard() -> Heard:
    return Heard()


@pytest.fixture
async def keeping(keeper: Keeper, heard: Heard) -> AsyncIterator[Keeping]:
    keeping = heard.keeping(keeper.theirs)
    yield keeping
    keeping.close()


async def test_what_a_busy_keeper_has_no_room_for_comes_later_complete_and_in_order(
    keeping: Keeping, keeper: Keeper, tmp_path: Path, descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    for number in range(MANY):
        fd = os.open(tmp_path / str(number), os.O_RDONLY | os.O_CREAT)
        keeping.store(f"{number}", [fd])
        os.close(fd)  # it was a loan
    keeping.remove("last")
    for number in range(MANY):
        fields, (fd,) = await keeper.hear()
        assert fields == notify.stored(f"{number}")
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / str(number))
        os.close(fd)
    assert await keeper.hear() == (notify.removed("last"), [])
    assert descriptors() == before


async def test_what_is_still_queued_at_the_end_is_said(keeping: Keeping, keeper: Keeper) -> None:
    for number in range(MANY):
        keeping.remove(f"{number}")
    keeping.stopping()
    keeper.listener.settimeout(PATIENCE)
    hearing = asyncio.create_task(asyncio.to_thread(keeper.hear_all, MANY + 1))
    await asyncio.sleep(0)  # it has begun
    keeping.close()
    *removals, last = await hearing
    assert removals == [notify.removed(f"{number}") for number in range(MANY)]
    assert last == {"STOPPING": "1"}


async def test_a_broker_that_is_ready_says_first_who_it_is(keeping: Keeping, keeper: Keeper) -> None:
    keeping.ready()
    assert (await keeper.hear())[0] == {"MAINPID": str(os.getpid())}
    assert (await keeper.hear())[0] == {"READY": "1"}


async def hear_out(keeping: Keeping, keeper: Keeper) -> None:
    """Have the broker's end hear everything, the keeper answering in its turn."""
    hearing = asyncio.create_task(keeping.hear())
    fields, _ = await keeper.hear()
    notify.send(keeper.line, fields)
    assert await hearing


async def test_orphans_and_what_was_forwarded_are_heard_and_nonsense_is_not(
    keeping: Keeping, keeper: Keeper, heard: Heard, descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    fd = os.open("/dev/null", os.O_RDONLY)
    for fields in (
        {"ORPHAN": "1", "START": "2"},
        {"ORPHAN": "one", "START": "2", "STATUS": "3"},
        {"ORPHAN": "-1", "START": "2", "STATUS": "3"},
        {"X": "y"},
        {"ORPHAN": "10", "START": "20", "STATUS": "30"},
    ):
        notify.send(keeper.line, fields, [fd] if "ORPHAN" in fields else [])
    notify.send(keeper.line, {"FORWARD": "1"}, [fd, fd])
    await hear_out(keeping, keeper)
    assert heard.orphans == [(10, 20, 30)]
    (found,) = heard.found
    assert len(found) == 2
    for each in (*found, fd):
        os.close(each)
    assert descriptors() == before


async def test_the_keepers_death_is_told_once_and_then_nothing_is_said_to_it(
    keeping: Keeping, keeper: Keeper, heard: Heard
) -> None:
    keeper.close()
    await heard.lost.wait()
    heard.lost.clear()
    assert keeping.line is None
    keeping.store("mark", [0])
    assert not await keeping.hear()  # what the next one knows, its own broker will be told
    assert not heard.lost.is_set()


async def test_a_keeper_that_dies_before_it_answers_was_not_heard(keeping: Keeping, keeper: Keeper) -> None:
    hearing = asyncio.create_task(keeping.hear())
    await keeper.hear()
    keeper.close()
    assert not await hearing


async def test_what_is_gone_is_told_to_the_next_keeper_by_a_broker_that_has_lost_its_own(
    keeping: Keeping, keeper: Keeper, heard: Heard, tmp_path: Path
) -> None:
    keeper.close()
    await heard.lost.wait()
    keeping.remove("before there is one")
    with notify.listen(tmp_path / "keeper") as listener:
        keeping.remove("m" * 32)
        received = notify.receive(listener)
    assert received is not None
    assert received[0] == notify.removed("m" * 32)


async def test_a_line_that_was_let_go_is_the_successors_alone(
    keeping: Keeping, keeper: Keeper, heard: Heard
) -> None:
    line = keeping.let_go()
    assert line is not None
    notify.send(keeper.line, {"ORPHAN": "1", "START": "2", "STATUS": "3"})
    await keeping.hear()
    assert heard.orphans == []
    assert notify.receive(line) is not None
    line.close()


async def test_without_a_keeper_nothing_is_done(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.ADDRESS, raising=False)
    keeping = heard.keeping(None)
    keeping.store("mark", [0])
    keeping.remove("mark")
    keeping.ready()
    keeping.stopping()
    await keeping.hear()
    assert keeping.let_go() is None
