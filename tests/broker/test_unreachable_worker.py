"""Peers: what a call to a worker comes to when its connection breaks."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest
import zmq

from outlive.broker.peers import Peer, WorkerGone
from outlive.common.channel import Channel
from outlive.common.messages import Bye


@pytest.fixture
def peer():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(Channel(ours), os.getpid(), None)
    yield peer
    peer.close()
    theirs.close()


def unreachable(peer: Peer, frame: bytes) -> None:
    raise zmq.ZMQError(zmq.EHOSTUNREACH)


async def test_a_call_that_cannot_be_sent_fails_with_the_hang_up_and_not_before(peer: Peer) -> None:
    # Else whoever asks again asks the same worker, without a pause, and the loop never learns of its death.
    call = asyncio.create_task(peer.call(Bye(), unreachable))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not call.done()
    peer.hang_up()
    with pytest.raises(WorkerGone):
        await call


async def test_a_call_after_the_hang_up_fails_at_once(peer: Peer) -> None:
    peer.hang_up()
    with pytest.raises(WorkerGone):
        await peer.call(Bye(), unreachable)
