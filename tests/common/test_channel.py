"""Descriptors between processes: whole or refused, never leaked, and only between processes of one user."""

from __future__ import annotations

import array
import asyncio
import os
import resource
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outlive.common import channel
from outlive.common.channel import DESCRIPTORS_MAX, PACKET_MAX, Channel, Packet
from outlive.common.descriptors import ROLES
from outlive.common.errors import HandoffError, PeerError

from .conftest import Children, descriptors, in_a_child

KEY = ("t", "1001")


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    first, second = channel.pair()
    yield first, second
    first.close()
    second.close()


def send_raw(end: Channel, raw: bytes, fds: list[int] | None = None) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    end.socket.sendmsg([raw], rights)


def same_file(first: int, second: int) -> bool:
    return os.readlink(f"/proc/self/fd/{first}") == os.readlink(f"/proc/self/fd/{second}")


# What arrives.


def test_a_packet_arrives_with_its_descriptors_in_order_and_close_on_exec(
    ends: tuple[Channel, Channel], pipe: tuple[int, int]
) -> None:
    ends[0].send("parcel", list(pipe), ticket="x", raw=b"\xff")
    packet = ends[1].receive()
    assert packet is not None
    assert packet.kind == "parcel"
    assert (packet.message["ticket"], packet.message["raw"]) == ("x", b"\xff")
    assert [same_file(*both) for both in zip(packet.fds, pipe, strict=True)] == [True, True]
    assert not any(os.get_inheritable(fd) for fd in packet.fds)
    packet.close()
    assert packet.fds == []


def test_as_many_descriptors_as_the_kernel_takes_arrive(
    ends: tuple[Channel, Channel], pipe: tuple[int, int]
) -> None:
    ends[0].send("parcel", [pipe[0]] * DESCRIPTORS_MAX)
    packet = ends[1].receive()
    assert packet is not None
    assert len(packet.fds) == DESCRIPTORS_MAX
    packet.close()


def test_more_than_one_packet_takes_is_refused_before_it_is_sent(
    ends: tuple[Channel, Channel], pipe: tuple[int, int]
) -> None:
    with pytest.raises(HandoffError, match="254 descriptors"):
        ends[0].send("parcel", [pipe[0]] * (DESCRIPTORS_MAX + 1))
    with pytest.raises(HandoffError, match="one packet takes 65536"):
        ends[0].send("parcel", raw=b"x" * PACKET_MAX)
    with pytest.raises(BlockingIOError):
        ends[1].receive()


def test_a_parcel_survives_the_death_of_its_sender(children: Children, ends: tuple[Channel, Channel]) -> None:
    def send() -> None:
        read_end, write_end = os.pipe()
        os.write(write_end, b"still here")
        ends[0].send("parcel", [read_end], ticket="last words")
        os.kill(os.getpid(), 9)

    os.waitid(os.P_PID, children.fork(send), os.WEXITED | os.WNOWAIT)
    ends[0].close()
    packet = ends[1].receive()
    assert packet is not None
    assert packet.message["ticket"] == "last words"
    assert os.read(packet.fds[0], 99) == b"still here"
    packet.close()
    assert ends[1].receive() is None


def fill(end: Channel) -> None:
    while True:
        end.send("x", raw=b"x" * 1000)


def test_a_full_queue_is_said_and_in_the_end_a_handoff_error(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BlockingIOError):
        fill(ends[0])
    monkeypatch.setattr(channel, "SEND_DEADLINE", 0.0)
    with pytest.raises(HandoffError, match="not accepted"):
        ends[0].send_patiently("x")


async def test_a_loop_waits_for_room_too(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(BlockingIOError):
        fill(ends[0])
    sending = asyncio.create_task(ends[0].send_async("late"))
    await asyncio.sleep(0)
    assert not sending.done()
    kinds = []
    while "late" not in kinds:
        try:
            packet = ends[1].receive()
        except BlockingIOError:
            await asyncio.sleep(0)
        else:
            assert packet is not None
            kinds.append(packet.kind)
    await sending


def test_sending_to_nobody_is_a_handoff_error_that_keeps_the_descriptors(
    ends: tuple[Channel, Channel], pipe: tuple[int, int]
) -> None:
    ends[1].close()
    with pytest.raises(HandoffError):
        ends[0].send_patiently("parcel", list(pipe))
    os.fstat(pipe[0])


def test_waiting_ends_with_a_timeout_or_with_the_packet(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[1].receive_within(0.01)
    ends[0].send("late")
    packet = ends[1].receive_within(60)
    assert packet is not None
    assert packet.kind == "late"


# What is refused.


DEEP = b"\x83\xa1v" + b"\x91" * 1000 + b"\xc0" + b"\xa4kind\xa1x\xa3fds\x00"
GOOD = {"v": 1, "kind": "x", "fds": 0}


@given(
    st.binary(min_size=1, max_size=300)
    | st.fixed_dictionaries(
        {},
        optional={name: st.none() | st.integers(-3, 3) | st.text(max_size=3) | st.floats() for name in GOOD},
    ).map(msgpack.packb)
)
@example(DEEP)
@example(b"\x91" * 5000)
@example(b"\xdd\xff\xff\xff\xff")  # a list of four thousand million entries
@example(msgpack.packb({**GOOD, "t": msgpack.Timestamp(1)}))
@example(msgpack.packb({**GOOD, "t": msgpack.ExtType(5, b"")}))
@example(msgpack.packb({1: 2}))
@example(msgpack.packb([1, 2]))
@example(msgpack.packb(GOOD) + b"\0")
def test_any_packet_is_understood_or_a_peer_error_and_closes_what_it_brought(raw: bytes) -> None:
    first, second = channel.pair()
    try:
        read_end, write_end = os.pipe()
        send_raw(first, raw, [read_end])
        os.close(read_end)
        before = descriptors()
        try:
            packet = second.receive()
        except PeerError as error:
            assert "packet" in str(error)  # noqa: PT017
        else:
            assert packet is not None
            assert packet.message["fds"] == 1
            packet.close()
        assert descriptors() == before
        os.close(write_end)
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"\xc1", "not msgpack"),
        (msgpack.packb("x"), "is a str, not a map"),
        (msgpack.packb({"v": 1, "fds": 0}), "'kind' is None"),
        (msgpack.packb({**GOOD, "fds": "1"}), "'fds' is '1', not of type int"),
        (msgpack.packb({**GOOD, "fds": 2}), "promises 2 descriptors and carries 0"),
        (msgpack.packb({**GOOD, "fds": -1}), "promises -1 descriptors"),
        (msgpack.packb({**GOOD, "x": msgpack.ExtType(5, b"12")}), "not msgpack"),
        (DEEP, "'v' is a list"),
        (b"\0" * (PACKET_MAX + 1), "cut short"),
    ],
)
def test_a_bad_packet_is_refused_by_name_and_the_next_one_served(
    ends: tuple[Channel, Channel], raw: bytes, complaint: str
) -> None:
    send_raw(ends[0], raw)
    ends[0].send("good")
    with pytest.raises(PeerError, match=complaint):
        ends[1].receive()
    packet = ends[1].receive()
    assert packet is not None
    assert packet.kind == "good"


def test_an_oversize_packet_closes_its_descriptors(ends: tuple[Channel, Channel], pipe: tuple[int, int]) -> None:
    send_raw(ends[0], b"\0" * (PACKET_MAX + 1), [*pipe])
    before = descriptors()
    with pytest.raises(PeerError, match="65536 bytes and 2 descriptors arrived"):
        ends[1].receive()
    assert descriptors() == before


def test_descriptors_that_the_kernel_cut_off_refuse_the_packet_and_leak_nothing(
    ends: tuple[Channel, Channel], pipe: tuple[int, int]
) -> None:
    def act() -> None:
        ends[0].send("parcel", [pipe[0]] * 20)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 10, hard))
        filling = []
        with suppress(OSError):
            while True:
                filling.append(os.dup(0))
        for fd in filling[-5:]:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        before = descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 6, hard))
        with pytest.raises(PeerError, match="cut short"):
            ends[1].receive()
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert descriptors() == before
        ends[0].send("good")
        packet = ends[1].receive()
        assert packet is not None
        assert packet.kind == "good"

    in_a_child(act)


# Parcels.


def packet_of(processes: object, count: int) -> Packet:
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    return Packet({"v": 1, "kind": "parcel", "fds": count, "processes": processes}, fds)


def test_a_parcel_of_two_processes_is_opened_into_the_right_hands(pipe: tuple[int, int]) -> None:
    held = {("a", "1"): {"terminal": pipe[0], "pidfd": pipe[1]}, ("b", "2"): {"transcript": pipe[1]}}
    rows, fds = channel.parcel_rows(held)
    opened = channel.open_parcel(Packet({"processes": rows}, [os.dup(fd) for fd in fds]))
    assert {key: list(handles.held()) for key, handles in opened.items()} == {
        ("a", "1"): ["terminal", "pidfd"],
        ("b", "2"): ["transcript"],
    }
    assert same_file(opened["a", "1"].terminal, pipe[0])
    assert same_file(opened["a", "1"].pidfd, pipe[1])
    assert same_file(opened["b", "2"].transcript, pipe[1])
    for handles in opened.values():
        handles.close()


@pytest.mark.parametrize(
    ("processes", "count"),
    [
        (None, 1),
        (5, 1),
        ([["t", "1"]], 1),
        ([["t", "1", ["terminal"]]], 0),
        ([["t", "1", ["terminal"]]], 2),
        ([["t", "1", ["nonsense"]]], 1),
        ([["t", "1", [["terminal"]]]], 1),
        ([["t", "1", ["terminal", "terminal"]]], 2),
        ([["t", "1", ["terminal"]], ["t", "1", ["pidfd"]]], 2),
        ([[["t"], "1", ["terminal"]]], 1),
        ([["t", 1, ["terminal"]]], 1),
        ([["t", {"a": 1}, ["terminal"]]], 1),
    ],
)
def test_a_parcel_that_does_not_fit_is_refused_and_closed(processes: object, count: int, no_leak: None) -> None:
    with pytest.raises(PeerError, match="parcel"):
        channel.open_parcel(packet_of(processes, count))


@given(st.lists(st.integers(0, len(ROLES)), max_size=120))
def test_parcels_carry_every_process_once_in_packets_that_fit(sizes: list[int]) -> None:
    handles = {("t", str(at)): dict.fromkeys(ROLES[:size], at) for at, size in enumerate(sizes)}
    parcels = channel.parcels(handles)
    assert [key for parcel in parcels for key in parcel] == list(handles)
    assert all(sum(map(len, parcel.values())) <= DESCRIPTORS_MAX for parcel in parcels)
    assert {key: held for parcel in parcels for key, held in parcel.items()} == handles


# Sockets by path.


def accept(listener: socket.socket) -> socket.socket:
    listener.setblocking(True)
    return listener.accept()[0]


@pytest.mark.parametrize("depth", [0, 12], ids=["short", "over 107 bytes"])
def test_a_socket_is_private_and_reached_by_a_path_of_any_length(tmp_path: Path, depth: int, no_leak: None) -> None:
    folder = tmp_path.joinpath(*["long-folder"] * depth)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "channel"
    assert (len(str(path)) > 107) == bool(depth)
    path.touch()  # a stale one
    listener = channel.listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    mine = channel.connect(path)
    theirs = Channel(accept(listener))
    assert channel.check_user(theirs.socket) == os.getpid()
    mine.send("hello")
    packet = theirs.receive_within(60)
    assert packet is not None
    assert packet.kind == "hello"
    for end in (mine, theirs, listener):
        end.close()


def test_a_socket_that_cannot_be_made_leaves_no_descriptor(tmp_path: Path, no_leak: None) -> None:
    with pytest.raises(FileNotFoundError):
        channel.listen(tmp_path / "missing" / "channel")


def test_nobody_listening_is_an_os_error(tmp_path: Path, no_leak: None) -> None:
    with pytest.raises(FileNotFoundError):
        channel.connect(tmp_path / "channel")
    channel.listen(tmp_path / "channel").close()
    with pytest.raises(ConnectionRefusedError):
        channel.connect(tmp_path / "channel")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_foreign_user_is_refused_on_both_ends() -> None:
    # Not in TMPDIR, whose folders only we may enter.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        path = Path(name) / "channel"
        listener = channel.listen(path)
        path.chmod(0o666)

        def act() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(PeerError, match="is of user 0; only user 65534"):
                channel.connect(path)

        in_a_child(act)
        theirs = accept(listener)
        with pytest.raises(PeerError, match="is of user 65534; only user 0 is served"):
            channel.check_user(theirs)
        theirs.close()
        listener.close()


def test_what_a_peer_sent_is_received_though_it_died_with_our_packets_unread() -> None:
    ours, theirs = channel.pair()
    ours.send("order")
    theirs.send("deposit", number=1)
    theirs.send("deposit", number=2)
    theirs.close()
    arrived = [ours.receive() for _ in range(3)]
    assert [packet and packet.message["number"] for packet in arrived] == [1, 2, None]
    ours.close()
