"""One broker hands over to another, over a real channel; the successor is a thread, and where it dies, a child."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from outlive.broker import succession
from outlive.broker.peers import Peer
from outlive.broker.succession import Inheritance, Succession, take_over
from outlive.common import channel, kernel
from outlive.common.channel import Channel
from outlive.common.connection import until_readable
from outlive.common.descriptors import ROLES, Handles
from outlive.common.errors import PeerError
from outlive.common.paths import Paths

PATIENCE = 30.0
# More than fit into one parcel.
MANY = channel.DESCRIPTORS_MAX // len(ROLES) + 2


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)})
    paths.prepare()
    return paths


class Predecessor:
    """A broker that has a successor, as soon as one knocks."""

    def __init__(self, paths: Paths, folder: Path) -> None:
        self._listener = channel.listen(paths.channel)
        self.lock = os.open(paths.lock, os.O_RDWR | os.O_CREAT)
        self.line, self.keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.handles = {
            ("t", str(number)): Handles({role: os.open(folder / role, os.O_RDWR | os.O_CREAT) for role in ROLES})
            for number in range(MANY)
        }

    async def knocked(self, pid: int = 0) -> Peer:
        """Return whoever said that it is there to take over; `pid`: who that is to be taken for."""
        assert await until_readable(self._listener.fileno(), PATIENCE)
        link = Channel(self._listener.accept()[0])
        assert await until_readable(link.fileno(), PATIENCE)
        hello = link.receive()
        assert hello is not None
        assert (hello.kind, hello.message["role"], hello.message["pid"]) == ("hello", "successor", os.getpid())
        return Peer(link, pid or os.getpid(), os.pidfd_open(pid) if pid else None)

    def hand_over(self, successor: Peer, *, upgrade: bool) -> Succession:
        """Return what is there to hand over."""
        return Succession(successor, self.handles, self.line, upgrade)

    def close(self) -> None:
        """Close everything that was not handed over for good."""
        for handles in self.handles.values():
            handles.close()
        self._listener.close()
        os.close(self.lock)
        self.line.close()
        self.keepers.close()


@pytest.fixture
async def predecessor(paths: Paths, tmp_path: Path) -> AsyncIterator[Predecessor]:
    predecessor = Predecessor(paths, tmp_path)
    yield predecessor
    predecessor.close()


@pytest.fixture
def silent() -> Iterator[int]:
    """Somebody who lives and never says anything."""
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ)
    yield pid
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def closed(inheritance: Inheritance) -> None:
    """Close what was inherited."""
    for handles in inheritance.handed:
        handles.close()
    os.close(inheritance.lock)
    if inheritance.line:
        inheritance.line.close()
    if inheritance.predecessor:
        inheritance.predecessor.close()


@pytest.mark.parametrize("upgrade", [True, False])
async def test_the_successor_gets_every_descriptor_and_the_lock_and_the_line_if_its_keeper_is_the_same(
    predecessor: Predecessor, paths: Paths, upgrade: bool
) -> None:
    taking = asyncio.create_task(asyncio.to_thread(take_over, paths))
    handing = predecessor.hand_over(await predecessor.knocked(), upgrade=upgrade)
    telling = asyncio.create_task(handing.hand_over(predecessor.lock, paths.log))
    inheritance = await taking
    assert inheritance is not None
    assert inheritance.predecessor is not None
    assert inheritance.kept is upgrade
    assert (inheritance.line is not None) is upgrade
    assert kernel.is_same_file(inheritance.lock, predecessor.lock)
    assert len(inheritance.handed) == MANY
    for theirs, ours in zip(inheritance.handed, predecessor.handles.values(), strict=True):
        assert all(kernel.is_same_file(theirs.held()[role], fd) for role, fd in ours.held().items())
    assert not telling.done()
    inheritance.predecessor.send("ready")
    assert await telling == ""
    closed(inheritance)


async def test_a_successor_that_dies_while_it_comes_up_leaves_everything_where_it_was(
    predecessor: Predecessor, paths: Paths
) -> None:
    taking = asyncio.create_task(asyncio.to_thread(take_over, paths))
    handing = predecessor.hand_over(await predecessor.knocked(), upgrade=True)
    telling = asyncio.create_task(handing.hand_over(predecessor.lock, paths.log))
    inheritance = await taking
    assert inheritance is not None
    with paths.log.open("a") as log:
        log.write("Traceback:\nNameError: it\n")
    closed(inheritance)
    assert await telling == f"it died while it came up: NameError: it (see {paths.log})"
    assert all(len(handles) == len(ROLES) for handles in predecessor.handles.values())


async def test_a_successor_that_says_nothing_is_seen_dead_before_anybody_serves_again(
    predecessor: Predecessor, paths: Paths, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "READY_DEADLINE", 0.5)
    ours, theirs = channel.pair()
    successor = Peer(ours, silent, os.pidfd_open(silent))
    failure = await predecessor.hand_over(successor, upgrade=True).hand_over(predecessor.lock, paths.log)
    assert failure.startswith("it did not come up within")
    assert kernel.start_time(silent) is None
    theirs.close()


async def test_a_predecessor_that_dies_in_the_middle_is_as_none_and_nothing_is_left_open(
    predecessor: Predecessor, paths: Paths, descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    taking = asyncio.create_task(asyncio.to_thread(take_over, paths))
    peer = await predecessor.knocked()
    rows, fds = channel.parcel_rows({key: handles.held() for key, handles in [*predecessor.handles.items()][:3]})
    peer.channel.send("inheritance", fds, processes=rows)
    peer.close()
    assert await taking is None
    assert descriptors() == before


async def test_a_refusal_is_told_with_its_reason(predecessor: Predecessor, paths: Paths) -> None:
    taking = asyncio.create_task(asyncio.to_thread(take_over, paths))
    peer = await predecessor.knocked()
    peer.channel.send("refused", message="another broker is about to take over")
    with pytest.raises(PeerError, match="another broker is about"):
        await taking
    peer.close()


def test_where_nobody_listens_there_is_nothing_to_take_over(paths: Paths) -> None:
    assert take_over(paths) is None
