"""Input of a process that is held: whose turn it is, what a repetition does, what is taken back; for both pumps."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from outlive.common import kernel
from outlive.common.descriptors import Handles
from outlive.common.held import Held
from outlive.common.inlet import Inlet, name_of
from outlive.common.outcome import Outcome
from outlive.common.pump import PUMPS, Pump, Pumps
from outlive.common.transcript import Lease

from .conftest import PATIENCE, RAW, Children, printed, until

Hold = Callable[[Handles], Held]

# Reads nothing until SIGUSR1, then prints what it gets, up to `E`.
DEAF = (
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1});"
    + RAW
    + "signal.sigwait({signal.SIGUSR1})\n"
    + "while True:\n data = os.read(0, 65536); os.write(1, data)\n if data.endswith(b'E'): os._exit(5)\n"
)
# Without an echo, so that what was typed is counted in what is printed.
LINES = "stty -echo; echo ready; while read line; do echo got $line; done"


@pytest.fixture(params=PUMPS.values(), ids=PUMPS)
def hold(request: pytest.FixtureRequest, pumps: Pumps, me: Lease) -> Iterator[Hold]:
    kind: type[Pump] = request.param
    if kind is Pump and not kernel.can_splice_terminals():
        pytest.skip("this kernel does not splice terminals")
    helds: list[Held] = []

    def hold(handles: Handles) -> Held:
        held = Held(handles, pumps, kind, on_ended=lambda held: None)
        held.begin(me)
        helds.append(held)
        return held

    yield hold
    for held in helds:
        held.close()


def noise(size: int) -> bytes:
    """Return random bytes, without the deaf child's last one."""
    return random.Random(size).randbytes(size).replace(b"E", b"e")


def soon() -> float:
    return time.monotonic() + PATIENCE


def inlet_of(held: Held) -> Inlet:
    assert held.pump.inlet is not None
    return held.pump.inlet


async def deaf(children: Children, hold: Hold) -> Held:
    held = hold(children.python(DEAF))
    await until(lambda: held.pump.written == 3)
    return held


async def heard(held: Held) -> bytes:
    """Let a deaf child read; return everything that it was typed until it ends."""
    signal.pidfd_send_signal(held.handles.pidfd, signal.SIGUSR1)
    assert await held.until_ended(soon())
    return printed(held.transcript).removeprefix(b"raw")


async def lines(children: Children, hold: Hold) -> Held:
    held = hold(children.start("/bin/sh", "-c", LINES))
    await until(lambda: printed(held.transcript) == b"ready\r\n")
    held.answer(0.0, 100)
    return held


async def test_a_call_that_comes_again_types_nothing_and_gets_the_output_again(
    children: Children, hold: Hold
) -> None:
    held = await lines(children, hold)
    first = await held.converse(b"a\n", 0.25, 100, "w")
    await until(lambda: b"got a\r\n" in printed(held.transcript))
    again = await held.converse(b"a\n", 0.25, 100, "w")
    assert (first.typed, again.typed, again.warnings) == (2, 2, [])
    assert again.output == "got a\r\n"
    assert (await held.converse(b"b\n", 0.0, 100, "x")).typed == 2
    await until(lambda: b"got b\r\n" in printed(held.transcript))
    assert printed(held.transcript) == b"ready\r\ngot a\r\ngot b\r\n"


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
async def test_a_poll_that_comes_again_gets_the_same_output_also_from_the_next_holder(
    children: Children, hold: Hold, tty: bool
) -> None:
    held = hold(children.start("/bin/sh", "-c", "echo one; sleep 1000", tty=tty))
    await until(lambda: held.pump.written)
    first = await held.converse(b"", 0.0, 100, "w")
    assert first.output.split() == ["one"]
    assert (await held.converse(b"", 0.0, 100, "x")).output == ""
    again = hold(held.release())
    assert (await again.converse(b"", 0.0, 100, "x")).output == ""
    if tty:  # without an inlet only the last is known
        assert (await again.converse(b"", 0.0, 100, "w")).output.split() == ["one"]


async def test_what_is_not_taken_by_the_deadline_is_taken_back_to_the_byte(children: Children, hold: Hold) -> None:
    held = await deaf(children, hold)
    text = noise(300_000)
    first = await held.converse(text, 0.0, 100, "w")
    assert 0 < first.typed < len(text)
    assert first.warnings == [
        f"only {first.typed} of 300000 bytes were typed: the program does not read its input; send the rest again"
    ]
    again = await held.converse(text, 0.0, 100, "w")
    assert (again.typed, again.warnings) == (first.typed, first.warnings)
    signal.pidfd_send_signal(held.handles.pidfd, signal.SIGUSR1)
    await until(lambda: held.pump.written == 3 + first.typed)
    assert await held.type(b"E", soon()) == 1
    assert await heard(held) == text[: first.typed] + b"E"


async def test_calls_are_typed_one_after_the_other_in_the_order_in_which_they_came(
    children: Children, hold: Hold
) -> None:
    held = await deaf(children, hold)
    texts = [bytes([65 + number]) * 40_000 for number in range(3)] + [b"E"]
    calls = [asyncio.create_task(held.type(text, soon())) for text in texts]
    await asyncio.sleep(0)
    assert inlet_of(held).end == 40_000
    assert await heard(held) == b"".join(texts)
    assert await asyncio.gather(*calls) == [40_000] * 3 + [1]


async def test_a_call_whose_turn_does_not_come_types_nothing_and_says_so_again(
    children: Children, hold: Hold
) -> None:
    held = await deaf(children, hold)
    first = asyncio.create_task(held.type(b"x" * 40_000, soon()))
    await asyncio.sleep(0)
    for _ in range(2):
        late = await held.converse(b"too late", 0.0, 100, "w")
        assert (late.typed, late.warnings[0][:28]) == (0, "only 0 of 8 bytes were typed")
    last = asyncio.create_task(held.type(b"E", soon()))
    assert await heard(held) == b"x" * 40_000 + b"E"
    assert (await first, await last) == (40_000, 1)
    assert (await held.converse(b"too late", 0.0, 100, "w")).typed == 0


async def test_a_repetition_joins_its_first_try_also_one_that_still_waits_for_its_turn(
    children: Children, hold: Hold
) -> None:
    held = await deaf(children, hold)
    calls = [
        asyncio.create_task(held.type(text, soon(), name))
        for text, name in [(b"a" * 40_000, b"a"), (b"bb", b"b"), (b"a" * 40_000, b"a"), (b"bb", b"b"), (b"E", b"")]
    ]
    await asyncio.sleep(0)
    assert await heard(held) == b"a" * 40_000 + b"bbE"
    assert await asyncio.gather(*calls) == [40_000, 2, 40_000, 2, 1]


async def test_the_next_holder_types_on_and_answers_for_the_whole_call(children: Children, hold: Hold) -> None:
    held = await deaf(children, hold)
    text = noise(100_000) + b"E"
    call = asyncio.create_task(held.type(text, soon(), name_of("w")))
    await asyncio.sleep(0)
    following = hold(held.release())
    assert 0 < await call < len(text)
    assert inlet_of(following).left
    again = asyncio.create_task(following.converse(text, PATIENCE, 0, "w"))
    await asyncio.sleep(0)
    assert await heard(following) == text
    assert ((await again).typed, following.outcome) == (len(text), Outcome("exited", code=5))


async def test_a_hurry_and_an_end_take_back_what_was_not_typed(children: Children, hold: Hold) -> None:
    for ends in (False, True):
        held = await deaf(children, hold)
        call = asyncio.create_task(held.type(b"x" * 40_000, soon()))
        await asyncio.sleep(0)
        if ends:
            signal.pidfd_send_signal(held.handles.pidfd, signal.SIGKILL)
        else:
            held.hurry()
        assert 0 < await call == inlet_of(held).end < 40_000


async def test_a_cancelled_call_leaves_its_input_to_be_typed(children: Children, hold: Hold) -> None:
    held = await deaf(children, hold)
    call = asyncio.create_task(held.type(b"x" * 40_000 + b"E", soon(), name_of("w")))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait({call})
    assert await heard(held) == b"x" * 40_000 + b"E"
    assert (await held.converse(b"x" * 40_000 + b"E", 0.0, 0, "w")).typed == 40_001


async def test_ctrl_c_gets_past_input_that_waits_and_a_repetition_of_it_signals_nobody(
    children: Children, hold: Hold
) -> None:
    line = "trap 'echo caught' INT; echo ready; while :; do sleep 0.01; done"
    held = hold(children.start("/bin/sh", "-c", line))
    await until(lambda: printed(held.transcript).startswith(b"ready"))
    waiting = asyncio.create_task(held.type(b"y\n" * 40_000, soon()))
    await until(lambda: inlet_of(held).left)
    for _ in range(2):
        assert (await held.converse(b"\x03", 0.0, 0, "ctrl-c")).typed == 1
        await until(lambda: b"caught" in printed(held.transcript))
        assert inlet_of(held).left
    assert await held.type(b"\x03", soon()) == 1
    await until(lambda: printed(held.transcript).count(b"caught") == 2)
    held.hurry()
    assert 0 < await waiting < 80_000


async def test_input_for_what_has_ended_is_said_not_to_be_typed_each_time(children: Children, hold: Hold) -> None:
    for tty in (True, False):
        held = hold(children.start("/bin/sh", "-c", "echo bye; exit 3", tty=tty))
        assert await held.until_ended(soon())
        for _ in range(2):
            answer = await held.converse(b"late", 0.0, 100, "w")
            assert (answer.typed, answer.exit_code, answer.output.split()) == (0, 3, ["bye"])
            assert answer.warnings == ["the process has ended; nothing was typed"]


async def test_an_inlet_of_another_process_is_refused(children: Children, pumps: Pumps) -> None:
    from outlive.common.errors import PeerError

    handles = children.start("/bin/cat")
    os.close(handles.inlet)
    handles.inlet = Inlet.create("another")
    with pytest.raises(PeerError, match="another process"):
        Held(handles, pumps, Pump, on_ended=lambda held: None)
