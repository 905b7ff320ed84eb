"""One held process, with a real loop and real children: it ends once, drained, and takes input byte for byte."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outlive.common import ending, kernel
from outlive.common.descriptors import Handles
from outlive.common.errors import HandoffError, StdinClosed
from outlive.common.held import Held
from outlive.common.outcome import Outcome
from outlive.common.pump import Pump, Pumps
from outlive.common.transcript import Lease, Limits

from .conftest import PATIENCE, RAW, Children, printed, until

Hold = Callable[[Handles], Held]


class Story:
    """What the holder was told, with what the transcript held at that moment."""

    def __init__(self) -> None:
        self.ended: list[bytes] = []


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def hold(pumps: Pumps, me: Lease, story: Story) -> Iterator[Hold]:
    helds: list[Held] = []

    def hold(handles: Handles) -> Held:
        held = Held(
            handles,
            pumps,
            Pump,
            on_ended=lambda held: story.ended.append(printed(held.transcript)),
        )
        held.begin(me)
        helds.append(held)
        return held

    yield hold
    for held in helds:
        held.close()


def soon() -> float:
    return time.monotonic() + PATIENCE


# Its end.


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
async def test_it_ends_once_and_after_its_output(children: Children, hold: Hold, story: Story, tty: bool) -> None:
    program = "import os\nleft = b'x' * 1_500_000\nwhile left: left = left[os.write(1, left):]\nos._exit(3)"
    held = hold(children.python(program, tty=tty, limits=Limits(head=2 << 20)))
    assert await held.until_ended(soon())
    assert held.outcome == Outcome("exited", code=3)
    assert [len(output) for output in story.ended] == [1_500_000]
    held.process_exited()
    held.terminal_closed()
    assert len(story.ended) == 1


async def test_grandchildren_that_keep_the_pipe_do_not_hold_the_end_back_and_are_heard(
    children: Children, hold: Hold, story: Story, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    held = hold(children.start("/bin/sh", "-c", f"(read go <{fifo}; echo later) & echo first; exit 4", tty=False))
    assert await held.until_ended(soon())
    assert held.outcome == Outcome("exited", code=4)
    assert story.ended == [b"first\n"]
    assert held.terminal_open
    fifo.write_text("go\n")
    await until(lambda: not held.terminal_open)
    assert printed(held.transcript) == b"first\nlater\n"
    assert (len(story.ended), held.terminal_open) == (1, False)


async def test_an_end_that_nobody_can_know_is_lost(
    children: Children, hold: Hold, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outlive.common.held.RECORD_GRACE", 0.0)
    monkeypatch.setattr(ending, "_status", lambda pidfd: None)
    held = hold(children.start("/bin/true"))
    assert await held.until_ended(soon())
    assert held.outcome is not None
    assert held.outcome.kind == "lost"
    assert len(story.ended) == 1


async def test_what_is_released_is_no_longer_pumped_and_the_next_holder_goes_on(
    children: Children, hold: Hold, story: Story
) -> None:
    first = hold(children.start("/bin/sh", "-c", "echo one; read go; echo two; exit 5"))
    await until(lambda: first.pump.written)
    handles = first.release()
    assert first.transcript.live().lease is None
    second = hold(handles)
    assert await second.type(b"\n", soon()) == 1
    assert await second.until_ended(soon())
    assert printed(second.transcript) == b"one\r\n\r\ntwo\r\n"
    assert second.outcome == Outcome("exited", code=5)
    assert (first.ended, len(story.ended)) == (False, 1)


# The lease.


async def test_pumping_is_refused_while_another_living_process_holds_the_lease(
    children: Children, pumps: Pumps, me: Lease
) -> None:
    pid = children.fork(lambda: signal.pause())
    other = Lease(pid, kernel.start_time(pid) or 0, 9)
    handles = children.start("/bin/cat")
    held = Held(handles, pumps, Pump, on_ended=lambda held: None)
    held.transcript.take_lease(other)
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG))
    with pytest.raises(HandoffError, match="still holds the lease"):
        held.begin(me)
    assert held.transcript.live().lease == other
    assert len(pumps) == 0
    os.kill(pid, signal.SIGKILL)
    await until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG))
    held.begin(me)
    assert held.transcript.live().lease == me
    held.close()


# Input.


async def test_input_larger_than_a_terminal_takes_reaches_raw_cat_byte_for_byte(
    children: Children, hold: Hold
) -> None:
    held = hold(children.python(RAW + "os.execv('/bin/cat', ['cat'])"))
    await until(lambda: held.pump.written == 3)
    data = random.Random(3).randbytes(300_000)
    assert await held.type(data, soon()) == len(data)
    await until(lambda: held.pump.written == 3 + len(data))
    assert printed(held.transcript) == b"raw" + data


async def test_input_that_is_not_read_stops_at_the_deadline_and_is_counted(children: Children, hold: Hold) -> None:
    held = hold(children.python(RAW + "import signal; signal.pause()"))
    await until(lambda: held.pump.written == 3)
    taken = await held.type(b"x" * 300_000, time.monotonic())
    assert 0 < taken < 300_000
    assert held.pump.inlet is not None
    assert (held.pump.inlet.position, held.pump.inlet.left) == (taken, 0)


async def test_a_process_without_a_terminal_takes_no_input(children: Children, hold: Hold) -> None:
    held = hold(children.start("/bin/sleep", "1000", tty=False))
    with pytest.raises(StdinClosed, match="rerun the command with tty=true"):
        await held.type(b"x", soon())


async def test_a_line_that_the_terminal_would_cut_is_warned_of(children: Children, hold: Hold) -> None:
    held = hold(children.start("/bin/sleep", "1000"))
    assert held.typist is not None
    assert not held.typist.cuts(b"x" * 4095 + b"\n" + b"y" * 4095)
    assert held.typist.cuts(b"x" * 4096)
    raw = hold(children.python(RAW + "import signal; signal.pause()"))
    await until(lambda: raw.pump.written == 3)
    assert raw.typist is not None
    assert not raw.typist.cuts(b"x" * 4096)


# Answers.


async def test_half_a_character_is_held_back_and_delivered_later(children: Children, hold: Hold) -> None:
    held = hold(children.python(RAW + "os.write(1, b'a\\xe2\\x82'); os.read(0, 1); os.write(1, b'\\xac!')"))
    await until(lambda: held.pump.written == 6)
    first = held.answer(time.monotonic(), 100)
    assert (first.output, first.output_end) == ("rawa", 4)
    await held.type(b"go", soon())
    assert await held.until_ended(soon())
    second = held.answer(time.monotonic(), 100)
    assert (second.output, second.exit_code, second.session_id) == ("€!", 0, None)
    assert held.answer(time.monotonic(), 100).output == ""
