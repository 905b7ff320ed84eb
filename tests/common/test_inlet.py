"""The inlet's bytes, what is refused of them, and that no kill between two steps doubles or drops a byte."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlive.common import inlet as module
from outlive.common import kernel
from outlive.common.errors import PeerError
from outlive.common.inlet import BASE, SLOTS, Call, Inlet, is_inlet, name_of

from .conftest import MARK, in_a_child

A, B = b"name-a..", b"name-b.."


@contextmanager
def a_new(mark: str = MARK) -> Iterator[int]:
    fd = Inlet.create(mark)
    try:
        yield fd
    finally:
        os.close(fd)


def loaded(fd: int) -> Inlet:
    """Return the inlet as the next holder has it."""
    found = Inlet(fd, MARK)
    found.load()
    return found


def take(inlet: Inlet, count: int) -> bytes:
    """Be the terminal: take `count` bytes."""
    data = os.read(inlet.fd, min(count, inlet.left))
    assert len(data) == min(count, inlet.left + len(data))
    return data


# The format.


def test_a_new_inlet_is_these_bytes() -> None:
    with a_new("0123456789abcdef" * 2) as fd:
        assert os.pread(fd, BASE + 1, 0) == b"OUTINLET" + bytes.fromhex("0100 000000000000") + (
            b"0123456789abcdef0123456789abcdef"
        ) + bytes(BASE - 48)
        assert os.lseek(fd, 0, os.SEEK_CUR) == BASE
        assert kernel.is_sealed_memfd(fd)
        assert is_inlet(fd)


def test_calls_are_these_bytes() -> None:
    with a_new() as fd:
        inlet = loaded(fd)
        inlet.accept(A, b"hello", 0x0102030405060708)
        assert take(inlet, 2) == b"he"
        inlet.note(B, 9, passed=1)
        inlet.take_back(A)
        raw = os.pread(fd, BASE + 5, 0)
    assert raw[64:104] == bytes(40)  # number 0 is none
    assert raw[104:144] == bytes.fromhex("0100000000000000 0500000000000000 0807060504030201 05000000 00000000") + A
    assert raw[144:184] == bytes.fromhex("0200000000000000 0500000000000000 0900000000000000 00000000 01000000") + B
    assert raw[184:224] == bytes.fromhex("0300000000000000 0200000000000000 0807060504030201 02000000 00000000") + A
    assert raw[BASE:] == b"hello"


def test_an_inlet_of_these_bytes_is_understood() -> None:
    with a_new() as fd:
        os.pwrite(fd, struct.pack("<QQQII8s", 207, 5, 3, 4, 0, A), 64 + 7 * 40)
        os.pwrite(fd, b"xabcd", BASE)
        os.lseek(fd, BASE + 2, os.SEEK_SET)
        inlet = loaded(fd)
        assert (inlet.position, inlet.end, inlet.left) == (2, 5, 3)
        call = inlet.find(A)
        assert call == Call(207, 5, 3, 4, 0, A)
        assert call.typed(inlet.position) == 1
        assert inlet.note(B, 3).number == 208


def test_a_name_is_a_hash_and_that_of_no_write_id_is_never_met_again() -> None:
    assert name_of("w").hex() == "9e6b28a282509220"
    assert name_of("\udcff") != name_of("?")
    assert name_of("") != name_of("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, b"OUTLIVE\0"), "magic"),
        ((8, b"\2"), "version 2; this code knows 1"),
        ((16, b"x"), "of another process"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(change: tuple[int, bytes], message: str) -> None:
    with a_new() as fd:
        os.pwrite(fd, change[1], change[0])
        with pytest.raises(PeerError, match=message):
            Inlet(fd, MARK)


def test_a_file_that_could_be_cut_under_us_is_refused() -> None:
    fd = kernel.memfd("unsealed")
    with pytest.raises(PeerError, match="sealed"):
        Inlet(fd, MARK)
    os.close(fd)
    with pytest.raises(PeerError, match="sealed"):
        Inlet(0, MARK)


@pytest.mark.parametrize("position", [BASE - 1, 0, BASE + 6])
def test_a_position_outside_of_what_was_accepted_is_refused(position: int) -> None:
    with a_new() as fd:
        loaded(fd).accept(A, b"hello", 0)
        os.lseek(fd, position, os.SEEK_SET)
        with pytest.raises(PeerError, match="cannot be"):
            loaded(fd)


@given(st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 3, *[st.integers(0, (1 << 32) - 1)] * 2), max_size=4))
def test_any_ring_is_understood_or_refused(records: list[tuple[int, ...]]) -> None:
    with a_new() as fd:
        for slot, record in enumerate(records):
            os.pwrite(fd, struct.pack("<QQQII8s", *record, A), 64 + slot * 40)
        try:
            inlet = loaded(fd)
        except PeerError:
            return
        assert inlet.left == 0
        inlet.accept(B, b"x", 0)
        assert take(inlet, 1) == b"x"


def test_the_ring_forgets_the_oldest_call() -> None:
    with a_new() as fd:
        inlet = loaded(fd)
        inlet.accept(A, b"x", 0)
        for number in range(SLOTS - 1):
            inlet.note(name_of(str(number)), 0)
        assert loaded(fd).find(A) is not None
        inlet.note(B, 0)
        for one in (inlet, loaded(fd)):
            assert one.find(A) is None
            assert one.end == 1
            assert [call.name for call in one.last(2)] == [name_of(str(SLOTS - 2)), B]


def test_memory_stays_bounded_and_taken_back_input_is_given_back() -> None:
    with a_new() as fd:
        inlet = loaded(fd)
        for number in range(40):
            inlet.accept(b"%8d" % number, b"x" * 100_000, 0)
            while inlet.left:
                take(inlet, 10_000)
                inlet.trim()
                assert os.fstat(fd).st_blocks * 512 < 300_000
        assert os.fstat(fd).st_blocks * 512 <= 3 * BASE
        inlet.accept(A, b"x" * 1_000_000, 0)
        inlet.take_back(A)
        assert os.fstat(fd).st_blocks * 512 <= 3 * BASE


def test_input_that_there_is_no_room_for_is_not_accepted() -> None:
    with a_new() as fd:
        inlet = loaded(fd)

        def act() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (BASE + 10, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match="too large"):
                inlet.accept(A, b"x" * 20, 0)

        in_a_child(act)
        assert (loaded(fd).find(A), loaded(fd).left) == (None, 0)


def test_nothing_is_taken_back_of_a_call_that_is_typed_or_behind_which_another_was_accepted() -> None:
    with a_new() as fd:
        inlet = loaded(fd)
        inlet.accept(A, b"a", 0)
        take(inlet, 1)
        inlet.accept(B, b"b", 0)
        inlet.take_back(A)
        inlet.take_back(b"unknown.")
        assert inlet.left == 1


# Kills.


class Killed(Exception):
    """Where kill -9 would have stopped the holder."""


class Steps:
    """Does the system calls that change something, and stops before or after the chosen ones."""

    def __init__(self, kills: set[int]) -> None:
        self._kills = kills
        self._count = 0

    def __call__(self, call: Any, *arguments: Any) -> Any:
        self._count += 2
        if self._count in self._kills:
            raise Killed
        result = call(*arguments)
        if self._count + 1 in self._kills:
            raise Killed
        return result


def converse(inlet: Inlet, name: bytes, chars: bytes, room: int, steps: Steps, typed: bytearray) -> int:
    """Do what a holder does for a call while the terminal takes `room` bytes in all; return what it answers."""
    if inlet.find(name) is None:
        inlet.accept(name, chars, 0)
    while inlet.left and len(typed) < room:
        # One system call, as for the terminal.
        steps(lambda: typed.extend(take(inlet, min(3000, room - len(typed)))))
        inlet.trim()
    inlet.take_back(name)
    call = inlet.find(name)
    assert call is not None
    return call.typed(inlet.position)


@settings(deadline=None)
@example([(5000, 1), (5000, 1)], {2, 5, 8, 9, 12})
@given(
    st.lists(st.tuples(st.integers(1, 20_000), st.floats(0, 1)), min_size=1, max_size=6),
    st.sets(st.integers(2, 80)),
)
def test_no_kill_between_two_steps_types_a_byte_twice_or_drops_one(
    calls: list[tuple[int, float]], kills: set[int]
) -> None:
    steps = Steps(kills)
    patch = pytest.MonkeyPatch()

    class Kernel:
        is_sealed_memfd = staticmethod(kernel.is_sealed_memfd)

        @staticmethod
        def punch_hole(*arguments: int) -> None:
            steps(kernel.punch_hole, *arguments)

    class System:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def pwrite(self, fd: int, data: bytes, at: int) -> int:
            # Of a long one only some may be done.
            done: int = steps(os.pwrite, fd, data[: max(1, len(data) // 2)] if at >= BASE else data, at)
            return done

    with a_new() as fd, patch.context() as patched:
        patched.setattr(module, "os", System())
        patched.setattr(module, "kernel", Kernel)
        inlet = loaded(fd)
        for number, (size, share) in enumerate(calls):
            name, chars, typed = b"%8d" % number, os.urandom(size), bytearray()
            room = round(size * share)
            while True:
                try:
                    answer = converse(inlet, name, chars, room, steps, typed)
                    break
                except Killed:
                    inlet = loaded(fd)  # the next holder; its caller asks again
            assert (answer, bytes(typed)) == (room, chars[:room])
            # Again, since nobody may have heard that.
            assert converse(loaded(fd), name, chars, size, Steps(set()), typed) == room
            assert inlet.left == 0
