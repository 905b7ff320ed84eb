"""What a peer's death or silence does to whoever waits for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from outlive.broker.peers import Peer, WorkerGone
from outlive.common import channel, kernel, wire
from outlive.common.errors import StdinClosed, Unavailable
from outlive.common.messages import Bye, Export, Request


class Wire:
    """A worker's end of ZeroMQ: what was sent to it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def transmit(self, peer: Peer, frame: bytes) -> None:
        message = wire.decode(frame)
        assert isinstance(message, Request)
        self.requests.append(message)


@pytest.fixture
def peer() -> Iterator[Peer]:
    ours, theirs = channel.pair()
    peer = Peer(ours, os.getpid(), os.pidfd_open(os.getpid()))
    peer.admit("worker", "t", 1)
    yield peer
    peer.close()
    theirs.close()


async def asked(work: Wire, count: int = 1) -> None:
    while len(work.requests) < count:
        await asyncio.sleep(0)


async def test_each_call_gets_its_own_answer_in_whatever_order_they_come(peer: Peer) -> None:
    work = Wire()
    first = asyncio.create_task(peer.call(Export(), work.transmit))
    second = asyncio.create_task(peer.call(Bye(), work.transmit))
    await asked(work, 2)
    assert [request.op for request in work.requests] == ["export", "bye"]
    peer.answered(wire.success(work.requests[1].id, "second"))
    peer.answered(wire.success(work.requests[0].id, "first"))
    assert await asyncio.gather(first, second) == ["first", "second"]
    assert peer.calls == {}


async def test_an_error_of_the_worker_is_raised_as_what_it_was(peer: Peer) -> None:
    work = Wire()
    call = asyncio.create_task(peer.call(Export(), work.transmit))
    await asked(work)
    peer.answered(wire.failure(work.requests[0].id, StdinClosed("rerun with tty=true")))
    with pytest.raises(StdinClosed, match="rerun"):
        await call


async def test_a_call_under_way_when_the_worker_dies_is_told_so_at_once(peer: Peer) -> None:
    work = Wire()
    call = asyncio.create_task(peer.call(Export(), work.transmit))
    await asked(work)
    peer.hang_up()
    with pytest.raises(WorkerGone):
        await call


async def test_a_worker_that_does_not_answer_in_time_is_unavailable_and_a_late_answer_harmless(peer: Peer) -> None:
    work = Wire()
    with pytest.raises(Unavailable, match="processes are safe"):
        await peer.call(Export(), work.transmit, kernel.boottime() - 1)
    peer.answered(wire.success(work.requests[0].id, []))
    assert peer.calls == {}


async def test_hanging_up_drops_what_a_client_waits_for(peer: Peer) -> None:
    task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    peer.waits[1] = task  # type: ignore[assignment]
    assert peer.token
    peer.hang_up()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not peer.open


async def test_no_two_peers_have_the_same_token(peer: Peer) -> None:
    tokens = {peer.admit("client") for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 32 for token in tokens)


async def test_closing_twice_closes_once(peer: Peer) -> None:
    pidfd = peer.pidfd
    assert pidfd is not None
    peer.close()
    reused = os.open("/dev/null", os.O_RDONLY)  # the kernel hands a closed number out again at once
    peer.close()
    os.fstat(reused)
    os.close(reused)
