"""One contract for both pumps; what only the spliced one promises; and the loop that drives many."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import select
import signal
from pathlib import Path
from typing import Any

import pytest

from outlive.common import kernel
from outlive.common.descriptors import Handles
from outlive.common.pump import FULL_RETRY, PUMPS, Pump, Pumps, Step
from outlive.common.transcript import Transcript

from .conftest import RAW, Children, Owner, await_end, eventually, in_a_child, printed, until

# Every byte, in an order that no line discipline would leave alone.
BINARY = bytes(range(256)) * 4 + b"\r\n\n\r\x03\x04\x1a\x00\xff\xfe"
PRINT_1_5_MB = """
import os, sys
data = memoryview(b"".join(b"%09d\\n" % line for line in range(150_000)))
while data:
    data = data[os.write(1, data):]
os._exit(3)
"""
NUMBERED = """
import os, signal, tty
tty.setraw(1)
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
lines = 0
while not stop:
    view = memoryview(b"".join(b"%09d\\n" % line for line in range(lines, lines + 256)))
    lines += 256
    while view:
        view = view[os.write(1, view):]
"""
LINES_1_5_MB = b"".join(b"%09d\n" % line for line in range(150_000))


def drain_to_the_end(pump: Pump) -> None:
    """Drain until end of file, which the child's end brings."""
    eventually(lambda: pump.drain() is Step.CLOSED)


@pytest.fixture(params=PUMPS.values(), ids=PUMPS)
def kind(request: pytest.FixtureRequest) -> type[Pump]:
    found: type[Pump] = request.param
    if found is Pump and not kernel.can_splice_terminals():
        pytest.skip("this kernel does not splice terminals")
    return found


def pump_of(kind: type[Pump], handles: Handles) -> Pump:
    return kind(handles, Transcript(handles.transcript))


def accept(pump: Pump, chars: bytes) -> None:
    assert pump.inlet is not None
    pump.inlet.accept(b"name-of-", chars, 0)


# The contract.


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
def test_the_end_of_all_writers_is_end_of_file(children: Children, kind: type[Pump], tty: bool) -> None:
    pump = pump_of(kind, children.start("/bin/sh", "-c", "echo one; echo two", tty=tty))
    drain_to_the_end(pump)
    assert printed(pump.transcript) == (b"one\r\ntwo\r\n" if tty else b"one\ntwo\n")
    assert pump.written == pump.transcript.written
    assert pump.drain() is Step.CLOSED


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
def test_a_quiet_terminal_is_dry(children: Children, kind: type[Pump], tty: bool) -> None:
    pump = pump_of(kind, children.start("/bin/sh", "-c", "echo hello; sleep 1000", tty=tty))
    eventually(lambda: pump.drain() is Step.DRY and pump.written)
    assert printed(pump.transcript).strip() == b"hello"
    assert pump.drain() is Step.DRY


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
def test_binary_output_arrives_byte_for_byte(children: Children, kind: type[Pump], tty: bool) -> None:
    program = f"import os, sys\nif {tty}:\n import tty; tty.setraw(1)\nos.write(1, bytes.fromhex(sys.argv[1]))"
    pump = pump_of(kind, children.python(program, BINARY.hex(), tty=tty))
    drain_to_the_end(pump)
    assert printed(pump.transcript) == BINARY


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
def test_1_5_mb_and_an_instant_exit_arrive_complete(children: Children, kind: type[Pump], tty: bool) -> None:
    pump = pump_of(kind, children.python(PRINT_1_5_MB, tty=tty))
    drain_to_the_end(pump)
    assert printed(pump.transcript).replace(b"\r", b"") == LINES_1_5_MB


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
def test_a_turn_ends_before_a_flood_does(children: Children, kind: type[Pump], tty: bool) -> None:
    pump = pump_of(kind, children.start("/usr/bin/yes", tty=tty))
    eventually(lambda: pump.drain(turn=10_000) is Step.MORE)
    assert pump.written < 10_000 + (64 << 10) + (2 << 20)  # all the turns until the first that was full


def test_input_reaches_a_raw_child_byte_for_byte(children: Children, kind: type[Pump]) -> None:
    count = len(BINARY)
    program = RAW + (f"data = b''\nwhile len(data) < {count}:\n data += os.read(0, {count})\nos.write(1, data)\n")
    handles = children.python(program)
    pump = pump_of(kind, handles)
    eventually(lambda: pump.drain() is Step.DRY and printed(pump.transcript) == b"raw")
    accept(pump, BINARY)
    assert pump.type() is Step.DRY
    drain_to_the_end(pump)
    assert printed(pump.transcript) == b"raw" + BINARY


def test_input_that_a_child_does_not_read_is_left_and_typed_later(children: Children, kind: type[Pump]) -> None:
    program = RAW + (
        "import signal; signal.sigwait({signal.SIGUSR1})\n"
        "left = 60_000\n"
        "while left:\n data = os.read(0, left); left -= len(data); os.write(1, data)\n"
    )
    program = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1});" + program
    handles = children.python(program)
    pump = pump_of(kind, handles)
    eventually(lambda: pump.drain() is Step.DRY and pump.written)
    text = random.Random(7).randbytes(60_000)
    accept(pump, text)
    assert pump.type() is Step.FULL  # a terminal takes a few kilobytes
    signal.pidfd_send_signal(handles.pidfd, signal.SIGUSR1)

    def typed() -> bool:
        pump.type()
        return pump.drain() is Step.CLOSED

    eventually(typed)
    assert printed(pump.transcript) == b"raw" + text


def test_typing_ends_a_turn_before_the_input_does(children: Children, kind: type[Pump]) -> None:
    pump = pump_of(kind, children.python(RAW + "\nwhile os.read(0, 4096): pass"))
    eventually(lambda: pump.drain() is Step.DRY and pump.written)
    accept(pump, b"x" * 10_000)
    assert pump.inlet is not None
    eventually(lambda: pump.type(turn=1) in (Step.MORE, Step.DRY))
    eventually(lambda: pump.type() is Step.DRY)
    assert (pump.inlet.left, pump.inlet.position) == (0, 10_000)


def test_input_for_a_terminal_that_nobody_has_open_is_no_error(children: Children, kind: type[Pump]) -> None:
    handles = children.start("/bin/true")
    pump = pump_of(kind, handles)
    drain_to_the_end(pump)
    accept(pump, b"too late")
    assert pump.type() in (Step.DRY, Step.FULL)
    assert pump.drain() is Step.CLOSED


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
def test_a_full_transcript_is_said_and_the_bytes_wait(children: Children, kind: type[Pump], tty: bool) -> None:
    pump = pump_of(kind, children.python(PRINT_1_5_MB, tty=tty))

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (PAGES := 70_000, 2 * PAGES + 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (pump.transcript.base + size, hard))
            eventually(lambda: pump.drain() is Step.FULL)
            assert isinstance(pump.refusal, OSError)
            assert pump.transcript.written == pump.written == size
            assert pump.drain() is Step.FULL
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        drain_to_the_end(pump)

    in_a_child(act)
    assert printed(pump.transcript).replace(b"\r", b"") == LINES_1_5_MB


# Only the spliced one promises this.


def test_a_killed_pumper_loses_and_repeats_nothing_and_the_next_one_goes_on(children: Children) -> None:
    if not kernel.can_splice_terminals():
        pytest.skip("this kernel does not splice terminals")
    handles = children.python(NUMBERED)
    transcript = Transcript(handles.transcript)

    def pump_for_ever() -> None:
        pump = Pump(handles, transcript)
        while pump.drain(turn=4096) is not Step.CLOSED:
            pass

    chance = random.Random(11)
    for _ in range(40):
        goal = transcript.written + chance.randrange(1, 40_000)
        pid = children.fork(pump_for_ever)
        while transcript.written < goal:
            pass  # a pause here would be worth a megabyte of output
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    signal.pidfd_send_signal(handles.pidfd, signal.SIGUSR1)
    drain_to_the_end(Pump(handles, transcript))
    lines, rest = divmod(transcript.written, 10)
    assert (lines % 256, rest) == (0, 0)  # the child stops only after so many
    assert printed(transcript) == b"".join(b"%09d\n" % line for line in range(lines))


def test_a_killed_typist_types_nothing_twice_and_drops_nothing_and_the_next_one_goes_on(
    children: Children, tmp_path: Path
) -> None:
    if not kernel.can_splice_terminals():
        pytest.skip("this kernel does not splice terminals")
    text = b"".join(b"%07d\n" % line for line in range(250_000))
    # A reader that stops now and then, so that typists are killed before full terminals and before empty ones.
    program = RAW + (
        "import random, sys, time\nleft = int(sys.argv[2])\nwith open(sys.argv[1], 'wb') as file:\n"
        " while left:\n  data = os.read(0, 4096); left -= file.write(data)\n"
        "  if random.random() < 0.2: time.sleep(0.001)\n"
    )
    handles = children.python(program, str(tmp_path / "got"), str(len(text)))
    pump = Pump(handles, Transcript(handles.transcript))
    eventually(lambda: pump.drain() is Step.DRY and pump.written)
    inlet = pump.inlet
    assert inlet is not None
    accept(pump, text)

    def type_for_ever() -> None:
        room = select.epoll()
        room.register(handles.terminal, select.EPOLLOUT | select.EPOLLET)
        while (step := pump.type()) is not Step.DRY:
            if step is Step.FULL:
                room.poll()

    chance = random.Random(13)
    kills = 0
    while inlet.left:
        pid = children.fork(type_for_ever)
        goal = min(inlet.end, inlet.position + chance.randrange(1, 20_000))
        while inlet.position < goal:
            pass  # a pause here would be worth a hundred kilobytes of input
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    drain_to_the_end(pump)
    assert kills > 20
    assert (tmp_path / "got").read_bytes() == text


def test_the_next_pumper_first_empties_the_conduit(children: Children) -> None:
    handles = children.start("/bin/sh", "-c", "printf second")
    await_end(handles.pidfd)
    os.write(handles.conduit_write, b"first ")  # where a kill between the two splices leaves it
    pump = Pump(handles, Transcript(handles.transcript))
    drain_to_the_end(pump)
    assert printed(pump.transcript) == b"first second"


# Many pumps and one loop.


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rounds of the loop: each waits once for descriptors and timers."""
    counted = [0]
    import selectors

    select = selectors.EpollSelector.select

    def counting(self: selectors.EpollSelector, timeout: float | None = None) -> object:
        counted[0] += 1
        return select(self, timeout)

    monkeypatch.setattr(selectors.EpollSelector, "select", counting)
    return counted


async def rounds_of_a_quarter_second(rounds: list[int]) -> int:
    """Return how often the loop went round while nothing was to happen."""
    loop = asyncio.get_running_loop()
    quiet = loop.create_future()
    loop.call_later(0.25, quiet.set_result, None)
    before = rounds[0]
    await quiet
    return rounds[0] - before


# The timer itself makes two or three; a spin makes thousands.
A_FEW = 10


async def test_an_idle_set_makes_no_wake_ups(children: Children, pumps: Pumps, rounds: list[int]) -> None:
    owners = []
    for tty in (True, False, True):
        owner = Owner(pump_of(Pump, children.start("/bin/sh", "-c", "echo hi; sleep 1000", tty=tty)))
        pumps.add(owner)
        owners.append(owner)
    await until(lambda: all(owner.pump.written for owner in owners))
    assert await rounds_of_a_quarter_second(rounds) < A_FEW


async def test_a_hung_up_terminal_does_not_spin(children: Children, pumps: Pumps, rounds: list[int]) -> None:
    owner = Owner(pump_of(Pump, children.start("/bin/sh", "-c", "exec sleep 1000 0<&- 1<&- 2<&-")))
    pumps.add(owner)
    await until(lambda: owner.closings)
    assert await rounds_of_a_quarter_second(rounds) < A_FEW


async def test_a_child_that_closed_its_terminal_and_opens_it_again_is_heard(
    children: Children, pumps: Pumps, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    line = f"exec 0<&- 1<&- 2<&-; read go <{fifo}; echo back >/dev/tty; sleep 1000"
    owner = Owner(pump_of(Pump, children.start("/bin/sh", "-c", line)))
    pumps.add(owner)
    await until(lambda: owner.closings)
    fifo.write_text("go\n")
    await until(lambda: printed(owner.pump.transcript) == b"back\r\n")


async def test_two_floods_share_turns(children: Children, pumps: Pumps) -> None:
    owners = [Owner(pump_of(Pump, children.start("/usr/bin/yes", tty=tty))) for tty in (True, False)]
    for owner in owners:
        pumps.add(owner)
    await until(lambda: all(owner.moves > 20 for owner in owners))
    for owner in owners:
        pumps.remove(owner)


async def test_a_loop_has_its_turns_under_flood(children: Children, pumps: Pumps) -> None:
    owner = Owner(pump_of(Pump, children.start("/usr/bin/yes", tty=False)))
    pumps.add(owner)
    await until(lambda: owner.moves)
    turns = 0
    goal = owner.pump.written + (64 << 20)
    while owner.pump.written < goal:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 3
    pumps.remove(owner)


async def test_a_removed_owner_hears_nothing_more(children: Children, pumps: Pumps) -> None:
    handles = children.start("/bin/sh", "-c", "echo one; read go; echo two")
    first, second = Owner(pump_of(Pump, handles)), Owner(pump_of(Pump, handles))
    pumps.add(first)
    await until(lambda: first.pump.written)
    pumps.remove(first)
    assert len(pumps) == 0
    heard = first.moves, first.closings, first.exits
    accept(second.pump, b"\n")
    pumps.add(second)  # which types what it finds
    await until(lambda: second.closings and second.exits)
    assert (first.moves, first.closings, first.exits) == heard
    assert printed(second.pump.transcript) == b"one\r\n\r\ntwo\r\n"


async def test_the_end_of_a_child_is_told_once(children: Children, pumps: Pumps) -> None:
    owner = Owner(pump_of(Pump, children.start("/bin/sh", "-c", "exit 3")))
    pumps.add(owner)
    await until(lambda: owner.exits)
    for _ in range(20):
        await asyncio.sleep(0)
    assert owner.exits == 1


class Refusing(Pump):
    """A pump whose transcript refuses until it is told otherwise."""

    refusing = True
    tries = 0

    def drain(self, turn: int = 1 << 20) -> Step:
        self.tries += 1
        return Step.FULL if self.refusing else super().drain(turn)


async def test_a_full_transcript_is_tried_again_and_does_not_spin(
    children: Children, pumps: Pumps, rounds: list[int]
) -> None:
    pump = pump_of(Refusing, children.start("/bin/sh", "-c", "echo hello; sleep 1000"))
    assert isinstance(pump, Refusing)
    pumps.add(Owner(pump))
    await until(lambda: pump.tries >= 2)
    assert await rounds_of_a_quarter_second(rounds) < A_FEW
    pump.refusing = False
    await until(lambda: printed(pump.transcript) == b"hello\r\n")


async def test_one_chain_of_retries_is_enough(
    children: Children, pumps: Pumps, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    later, delays = loop.call_later, []

    def counting(delay: float, *rest: Any) -> asyncio.TimerHandle:
        delays.append(delay)
        return later(delay, *rest)

    monkeypatch.setattr(loop, "call_later", counting)
    pump = pump_of(Refusing, children.start("/bin/sh", "-c", "sleep 1000"))
    assert isinstance(pump, Refusing)
    owner = Owner(pump)
    pumps.add(owner)
    for tries in range(1, 20):  # each edge of the terminal is one more try
        pumps.kick(owner)
        while pump.tries < tries:
            await asyncio.sleep(0)
    assert delays.count(FULL_RETRY) == 1


async def test_a_retry_is_not_for_an_owner_that_was_removed(children: Children, pumps: Pumps) -> None:
    handles = children.start("/bin/sh", "-c", "echo hello; sleep 1000")
    first, second = pump_of(Refusing, handles), pump_of(Refusing, handles)
    assert isinstance(first, Refusing)
    assert isinstance(second, Refusing)
    owner = Owner(first)
    pumps.add(owner)
    pumps.kick(owner)
    await until(lambda: first.tries)
    pumps.remove(owner)
    tries = first.tries
    pumps.add(Owner(second))
    await until(lambda: second.tries >= 3)  # more than one retry later
    assert first.tries == tries


async def test_input_is_typed_when_the_terminal_has_room_again(children: Children, pumps: Pumps) -> None:
    program = (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1});"
        + RAW
        + (
            "signal.sigwait({signal.SIGUSR1})\n"
            "left = 60_000\n"
            "while left:\n data = os.read(0, left); left -= len(data); os.write(1, data)\n"
        )
    )
    handles = children.python(program)
    owner = Owner(pump_of(Pump, handles))
    pumps.add(owner)
    await until(lambda: owner.pump.written)
    text = random.Random(5).randbytes(60_000)
    accept(owner.pump, text)
    pumps.type(owner)
    assert owner.pump.inlet is not None
    assert 0 < owner.pump.inlet.left < len(text)
    signal.pidfd_send_signal(handles.pidfd, signal.SIGUSR1)
    await until(lambda: owner.exits and owner.closings)
    assert printed(owner.pump.transcript) == b"raw" + text
    assert (owner.pump.inlet.left, owner.offers > 1) == (0, True)


async def test_closing_under_flood_is_quiet(children: Children, caplog: pytest.LogCaptureFixture) -> None:
    pumps = Pumps(asyncio.get_running_loop())
    owner = Owner(pump_of(Pump, children.start("/usr/bin/yes", tty=False)))
    pumps.add(owner)
    await until(lambda: owner.moves)
    pumps.kick(owner)
    pumps.close()
    await asyncio.sleep(0)
    assert not caplog.records


def test_can_splice_terminals_leaves_no_descriptor(no_leak: None) -> None:
    kernel.can_splice_terminals()
