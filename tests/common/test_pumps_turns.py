"""How `Pumps` shares the loop with everything else, however much there is to pump."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest

from outlive.common import pump as pump_module
from outlive.common.descriptors import Handles
from outlive.common.pump import Pump, Pumps, Step
from outlive.common.transcript import Facts, Lease, Transcript


class Spring(Pump):
    """A pump whose terminal has always more, and says so by an edge each time."""

    def __init__(self, handles: Handles, transcript: Transcript, mouth: int) -> None:
        super().__init__(handles, transcript)
        self.mouth = mouth
        self.turns = 0

    def drain(self, turn: int = pump_module.TURN) -> Step:
        self.turns += 1
        os.write(self.mouth, b"x")
        return Step.MORE


class Owner:
    """Holds it."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump

    def output_moved(self) -> None: ...
    def terminal_closed(self) -> None: ...
    def terminal_dry(self) -> None: ...
    def process_exited(self) -> None: ...


@pytest.fixture
def spring() -> Iterator[Spring]:
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    facts = Facts(
        thread_id="t",
        process_id="1000",
        call_id="c",
        mark="m",
        argv=(b"true",),
        cwd=b"/",
        tty=False,
        columns=80,
        rows=24,
        started_at_ns=0,
        boot_id="b",
    )
    handles = Handles({"transcript": Transcript.create(facts, Lease(1, 1, 1)), "terminal": read})
    yield Spring(handles, Transcript(handles.transcript), write)
    handles.close()
    os.close(write)


async def test_a_flood_gets_one_turn_in_each_trip_through_the_loop(
    spring: Spring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "SLICE", 0.0)
    pumps = Pumps(asyncio.get_running_loop())
    owner = Owner(spring)
    pumps.add(owner)
    pumps.kick(owner)
    try:
        turns = []
        for _ in range(100):
            before = spring.turns
            await asyncio.sleep(0)
            turns.append(spring.turns - before)
    finally:
        pumps.close()
    assert max(turns) == 1


class Listener(Owner):
    """Counts how often output was told."""

    told = 0

    def output_moved(self) -> None:
        self.told += 1


async def test_a_little_output_is_told_before_more_is_waited_for(
    spring: Spring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "LINGER", 2.0)
    monkeypatch.setattr(pump_module, "SLICE", 1000.0)
    pumps = Pumps(asyncio.get_running_loop())
    owner = Listener(Pump(spring.handles, spring.transcript))
    pumps.add(owner)
    heard = threading.Event()

    def say_more() -> None:
        """Only a loop that waits for more needs this to go on."""
        if not heard.wait(1):
            os.write(spring.mouth, b"more")

    speaker = threading.Thread(target=say_more)
    try:
        os.write(spring.mouth, b"echo")
        speaker.start()
        while not owner.told:
            await asyncio.sleep(0)
        heard.set()
        assert owner.told == 1
    finally:
        speaker.join()
        pumps.close()
