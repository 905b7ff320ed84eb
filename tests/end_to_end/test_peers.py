"""Peers that break the rules, on both sockets: refused, while everybody else is served."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq

import outlive
from outlive.common import channel, wire
from outlive.common.channel import Channel

from .conftest import Home, descriptors_of, eventually


class Dealer:
    """A raw ZeroMQ peer of the broker's control socket."""

    def __init__(self, home: Home) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{home.paths.control}")

    def close(self) -> None:
        self._context.destroy(0)

    def ask(self, *frames: bytes) -> dict[str, Any]:
        self.socket.send_multipart(list(frames))
        assert self.socket.poll(10_000), "no answer"
        answer: dict[str, Any] = msgpack.unpackb(self.socket.recv())
        return answer


@pytest.fixture
def dealer(home: Home, host: outlive.Host) -> Iterator[Dealer]:
    dealer = Dealer(home)
    yield dealer
    dealer.close()


def request(**fields: Any) -> bytes:
    table = {"v": 1, "op": "status", "body": {}, "token": "", "id": 5, **fields}
    raw: bytes = msgpack.packb({name: value for name, value in table.items() if value is not None})
    return raw


async def greeted(home: Home) -> tuple[Channel, str]:
    link = channel.connect(home.paths.channel)
    link.send("hello", role="client")
    packet = await asyncio.to_thread(link.receive_within, 10)
    assert packet is not None
    assert packet.kind == "welcome"
    return link, packet.message["token"]


async def served(host: outlive.Host) -> None:
    """The others notice nothing."""
    thread = await host.thread("served")
    assert (await thread.exec_command(["echo", "served"])).output == "served\n"


def deep(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


BAD_FRAMES = [
    (b"", "not msgpack"),
    (b"\xc1garbage", "not msgpack"),
    (request()[:-3], "not msgpack"),
    (request() + b"more", "not msgpack"),
    (msgpack.packb([1, 2, 3]), "list, not a map"),
    (msgpack.packb(None), "NoneType, not a map"),
    (deep(100_000), "not msgpack"),
    (msgpack.packb({"v": 1, "op": "status", "body": msgpack.ExtType(4, b"x")}), "not msgpack"),
    (b"\xdf\xff\xff\xff\xff", "not msgpack"),
    (request(v=99), "field `v` is 99"),
    (request(v=None), "field `v` is None"),
    (request(op=7), "$.op"),
    (request(id=-1), "$.id"),
    (request(body=[]), "$.body"),
    (request(token=b"bytes"), "$.token"),
    (request(), "token: unknown"),
    (request(token="0" * 32), "token: unknown"),
]


async def test_a_bad_frame_is_answered_with_what_is_wrong_with_it(host: outlive.Host, dealer: Dealer) -> None:
    for frame, complaint in BAD_FRAMES:
        answer = await asyncio.to_thread(dealer.ask, frame)
        assert answer["error"]["kind"] == "peer"
        assert complaint in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 500
        await served(host)


async def test_what_is_bad_in_a_batch_of_messages_costs_only_itself(
    home: Home, host: outlive.Host, dealer: Dealer
) -> None:
    link, token = await greeted(home)
    good = [request(token=token, id=number) for number in (1, 2)]
    dealer.socket.send_multipart([b"", good[0], b"garbage", good[1]])
    answers: list[dict[str, Any]] = []
    while len(answers) < 4:
        assert await asyncio.to_thread(dealer.socket.poll, 10_000)
        answers += [msgpack.unpackb(frame) for frame in dealer.socket.recv_multipart()]
    assert sorted(answer["id"] for answer in answers) == [0, 0, 1, 2]
    assert {answer["id"] for answer in answers if answer["error"] is None} == {1, 2}
    many = await asyncio.to_thread(dealer.ask, *[request(token=token)] * (wire.BATCH_MAX + 1))
    assert f"{wire.BATCH_MAX + 1} messages at once" in many["error"]["message"]
    await served(host)
    link.close()


BAD_REQUESTS = [
    ({"op": "no_such_op"}, "unknown request 'no_such_op'"),
    ({"op": "register", "body": {"processes": []}}, "unknown request 'register'"),
    ({"op": "export"}, "unknown request 'export'"),
    ({"op": "read_output", "body": {"thread": "t"}}, "process_id"),
    ({"op": "read_output", "body": {"thread": "t", "process_id": "1000", "offset": -1}}, "$.offset"),
    ({"op": "read_output", "body": {"thread": "t", "process_id": "1000", "offset": 1 << 62}}, "$.offset"),
    ({"op": "kill", "body": {"thread": "t", "process_ids": [], "signal": 9}}, "$.process_ids"),
    ({"op": "kill", "body": {"thread": "t", "process_ids": ["1"], "signal": 65}}, "$.signal"),
    ({"op": "resize", "body": {"thread": "t", "process_id": "1", "columns": 0, "rows": 1}}, "$.columns"),
    ({"deadline": 1.0}, "after its deadline"),
]


async def test_a_bad_request_of_a_known_client_names_the_field_and_keeps_its_connection(
    home: Home, host: outlive.Host, dealer: Dealer
) -> None:
    link, token = await greeted(home)
    for fields, complaint in BAD_REQUESTS:
        answer = await asyncio.to_thread(dealer.ask, request(token=token, **fields))
        assert complaint in answer["error"]["message"]
        answer = await asyncio.to_thread(dealer.ask, request(token=token))
        assert answer["result"]["broker_pid"] == home.pids("broker")[0]
    await served(host)
    link.close()


async def test_an_oversize_frame_costs_its_sender_the_connection_and_nobody_else(
    home: Home, host: outlive.Host, dealer: Dealer
) -> None:
    (broker,) = home.pids("broker")
    monitor = dealer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.socket.send(b"\0" * (wire.FRAME_MAX + 1))
    assert await asyncio.to_thread(monitor.poll, 10_000)
    dealer.socket.disable_monitor()
    monitor.close()
    await served(host)
    assert home.pids("broker") == [broker]


async def test_a_token_is_good_for_one_connection_and_while_its_channel_is_open(
    home: Home, host: outlive.Host, dealer: Dealer
) -> None:
    link, token = await greeted(home)
    assert (await asyncio.to_thread(dealer.ask, request(token=token)))["error"] is None
    thief = Dealer(home)
    stolen = await asyncio.to_thread(thief.ask, request(token=token))
    assert "belongs to another connection" in stolen["error"]["message"]
    thief.close()
    link.close()
    while (answer := await asyncio.to_thread(dealer.ask, request(token=token)))["error"] is None:
        pass
    assert "token: unknown" in answer["error"]["message"]
    await served(host)


def raw_socket(home: Home) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(10)
    connection.connect(str(home.paths.channel))
    return connection


def refused(connection: socket.socket) -> str:
    """Return what the broker said before it hung up."""
    said = ""
    while True:
        try:
            packet = connection.recv(65536)
        except ConnectionResetError:
            return said
        if not packet:
            return said
        message = msgpack.unpackb(packet)
        assert message["kind"] == "refused"
        said = message["message"]


BAD_PACKETS = [
    (b"garbage", ""),
    (msgpack.packb([1]), ""),
    (channel.pack("hello", role="client")[:-2], ""),
    (msgpack.packb({"v": 1, "kind": "hello", "fds": 3, "role": "client"}), ""),
    (msgpack.packb({"v": 1, "kind": "hello", "role": "client"}), ""),
    (deep(50_000), ""),
    (b"\0" * 70_000, ""),
    (channel.pack("deposit", processes=[]), "before hello"),
    (channel.pack("parcel", processes=[]), "before hello"),
    (channel.pack("hello", role="king"), "use client or worker"),
    (channel.pack("hello"), "use client or worker"),
    (channel.pack("hello", role="worker", thread="served", epoch=1), "is not the worker of"),
    (channel.pack("hello", role="worker"), "is not the worker of"),
    (channel.pack("hello", role="worker", thread=["x"], epoch={}), "is not the worker of"),
]


async def test_a_bad_packet_is_refused_and_its_sender_hung_up_on(home: Home, host: outlive.Host) -> None:
    await served(host)
    (broker,) = home.pids("broker")
    before = len(descriptors_of(broker))
    for packet, complaint in BAD_PACKETS:
        with raw_socket(home) as connection:
            connection.send(packet)
            assert complaint in await asyncio.to_thread(refused, connection)
        await served(host)
    assert home.pids("broker") == [broker]
    await eventually(lambda: len(descriptors_of(broker)) <= before)


async def test_descriptors_that_come_uncalled_for_are_closed(home: Home, host: outlive.Host) -> None:
    await served(host)
    (broker,) = home.pids("broker")
    before = len(descriptors_of(broker))
    ours = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ours * 50))]
    for packet in (
        channel.pack("hello", role="client"),  # promises none
        channel.pack("hello", 100, role="king"),
        channel.pack("deposit", 100, processes=[["served", "1000", ["terminal"] * 100]]),
        b"garbage",
    ):
        with raw_socket(home) as connection:
            connection.sendmsg([packet], rights)
            await asyncio.to_thread(refused, connection)
    # And from one that is known, but no worker.
    link, _ = await greeted(home)
    link.send("deposit", [*ours], processes=[["served", "1000", ["terminal", "pidfd"]]])
    await served(host)
    link.close()
    os.close(ours[0])
    os.close(ours[1])
    await eventually(lambda: len(descriptors_of(broker)) <= before)


async def test_clients_that_connect_and_say_nothing_hold_up_nobody(home: Home, host: outlive.Host) -> None:
    silent = [raw_socket(home) for _ in range(50)]
    await served(host)
    async with outlive.connect(start=False) as other:
        await served(other)
    for connection in silent:
        connection.close()


async def test_a_worker_process_may_not_register_a_second_time_for_somebody_else(
    home: Home, host: outlive.Host
) -> None:
    """Only the kernel's word counts: the pid of whoever connects, not what it says."""
    await served(host)
    worker = await home.worker(host, "served")
    row = next(row for row in await host.threads() if row.thread == "served")
    with raw_socket(home) as connection:
        connection.send(channel.pack("hello", role="worker", thread="served", epoch=row.epoch, pid=worker))
        assert "is not the worker of" in await asyncio.to_thread(refused, connection)
    assert await home.worker(host, "served") == worker


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_refused_even_where_the_folders_let_them_in(home: Home, host: outlive.Host) -> None:
    opened = [home.paths.run, *home.paths.run.parents]
    modes = {folder: folder.stat().st_mode & 0o7777 for folder in opened}
    script = f"""
import os, socket
os.setgid(65534)
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({str(home.paths.channel)!r})
print(connection.recv(65536))
"""
    sockets = home.sockets()
    assert {path.stat().st_mode & 0o777 for path in sockets} == {0o600}
    try:
        for folder in opened:
            folder.chmod(modes[folder] | 0o711)
        for path in sockets:
            path.chmod(0o666)
        said = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", script], capture_output=True, check=True, timeout=30
        )
    finally:
        for folder in opened:
            folder.chmod(modes[folder])
    assert b"refused" in said.stdout
    assert b"user 65534" in said.stdout
    await served(host)


async def test_the_folders_and_sockets_are_private(home: Home, host: outlive.Host) -> None:
    for folder in (home.paths.run, home.paths.state, home.paths.workers):
        assert folder.stat().st_mode & 0o777 == 0o700
    for ending in ("", "-wal", "-shm"):
        assert os.stat(f"{home.paths.journal}{ending}").st_mode & 0o777 == 0o600
    assert len(home.sockets()) == 4
    for path in home.sockets():
        assert path.stat().st_mode & 0o777 == 0o600


async def test_a_client_that_the_broker_does_not_understand_is_told_at_once(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.status()
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    with pytest.raises(outlive.Unavailable, match=r"does not understand us.*field `v` is"):
        await host.status()
    monkeypatch.undo()
    await host.status()
