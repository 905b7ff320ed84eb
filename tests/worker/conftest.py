"""A worker's parts without a broker: a real spawner, real pumps, and a list where the broker would be."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from outlive.common import kernel
from outlive.common.config import Config
from outlive.common.descriptors import Handles
from outlive.common.held import Held
from outlive.common.messages import Body, Ended, ExecCommand, WriteStdin
from outlive.common.pump import Pump, Pumps
from outlive.common.response import Response
from outlive.common.transcript import Facts, Gap, Lease, Limits, Transcript
from outlive.worker.nursery import Nursery, Order
from outlive.worker.processes import ProcessManager

FOREVER = float("inf")


def printed(transcript: Transcript) -> bytes:
    """Return what is kept of a process's output; fails on a gap."""
    parts = list(transcript.read(0, transcript.written))
    assert not any(isinstance(part, Gap) for part in parts)
    return b"".join(part[1] for part in parts if not isinstance(part, Gap))


async def readable(pidfd: int) -> None:
    """Wait for the end of the process behind `pidfd`."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    copy = os.dup(pidfd)  # the loop may watch the original for somebody else
    loop.add_reader(copy, lambda: ended.done() or ended.set_result(None))
    await ended
    loop.remove_reader(copy)
    os.close(copy)


async def more(held: Held) -> None:
    """Wait until there is more output."""
    await held.until_output(held.pump.written, FOREVER)
    await asyncio.sleep(0)  # of a closed one there is none: a test that has timed out must be cancellable here


class Family:
    """A nursery driven by hand: starts commands, waits for their ends, and leaves nothing behind."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.orphans: list[Facts] = []
        self.pumps = Pumps(asyncio.get_running_loop())
        self.nursery = Nursery(log, self.orphans.append)
        self.helds: list[Held] = []
        self._ids = itertools.count(1000)

    def order(self, *argv: bytes, **fields: Any) -> Order:
        """Return an order with everything filled in that is not in `fields`."""
        environment = fields.pop("environment", {b"PATH": os.environb[b"PATH"]})
        process_id = str(next(self._ids))
        facts = {
            "thread_id": "t",
            "process_id": process_id,
            "call_id": f"call-{process_id}",
            "mark": secrets.token_hex(16),
            "argv": argv,
            "cwd": b"/",
            "tty": False,
            "columns": 80,
            "rows": 24,
            "started_at_ns": time.time_ns(),
            "boot_id": kernel.boot_id(),
            **fields,
        }
        return Order(Facts(**facts), environment, Lease.mine(1))

    async def start(self, *argv: bytes, **fields: Any) -> Held:
        """Start a command, and pump it."""
        handles = await self.nursery.start(self.order(*argv, **fields))
        held = Held(handles, self.pumps, Pump, on_ended=lambda _: None)
        self.helds.append(held)
        held.begin(Lease.mine(1))
        return held

    async def run(self, *argv: bytes, **fields: Any) -> Held:
        """Start a command, and wait for its end."""
        held = await self.start(*argv, **fields)
        assert await held.until_ended()
        return held

    async def until(self, held: Held, text: bytes) -> bytes:
        """Wait until `text` was printed; return everything printed."""
        while text not in printed(held.transcript):
            assert not held.ended, printed(held.transcript)
            await more(held)
        return printed(held.transcript)

    async def close(self) -> None:
        for held in self.helds:
            if held.handles.pidfd >= 0 and not held.exited:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(held.handles.pidfd, signal.SIGKILL)
            held.close()
        await close_nursery(self.nursery)
        self.pumps.close()


async def close_nursery(nursery: Nursery) -> None:
    """Close it, and see its spawners off the process table."""
    pids = nursery.pids
    nursery.close()
    for pid in pids:
        while kernel.start_time(pid) is not None:
            await asyncio.sleep(0.001)


@pytest.fixture
async def family(tmp_path: Path) -> AsyncIterator[Family]:
    family = Family(tmp_path / "log")
    yield family
    await family.close()
    log = family.log.read_text() if family.log.exists() else ""
    assert "Traceback" not in log, log


class Desk:
    """A `ProcessManager` of one epoch, and what it told the broker."""

    def __init__(self, house: House, thread_id: str, epoch: int, config: Config) -> None:
        self.said: list[Body] = []
        self.manager = ProcessManager(thread_id, epoch, house.nursery, house.pumps, Pump, self.said.append, config)
        self._house = house

    async def run(self, cmd: str | list[bytes], *, ms: int = 10_000, call_id: str = "", **fields: Any) -> Response:
        """Call `exec_command`; `fields` as in the message."""
        call = {
            "thread": self.manager.thread_id,
            "cmd": cmd,
            "workdir": b"/",
            "environment": {b"PATH": os.environb[b"PATH"], b"SHELL": b"/bin/sh"},
            "call_id": call_id or secrets.token_hex(8),
            "yield_time_ms": ms,
            "login": False,
            **fields,
        }
        return await self.manager.exec_command(ExecCommand(**call))

    async def start(self, cmd: str | list[bytes], *, shown: bytes = b"", **fields: Any) -> str:
        """Start a command that stays, and return its id once it has printed `shown` and that was delivered."""
        response = await self.run(cmd, ms=250, **fields)
        assert response.session_id is not None, response.text()
        if shown:
            held = self.held(response.process_id)
            while shown not in printed(held.transcript):
                await more(held)
            held.answer(0.0, 0)
        return response.process_id

    async def write(self, process_id: str, chars: bytes = b"", ms: int = 250, **fields: Any) -> Response:
        """Call `write_stdin`."""
        call = WriteStdin(
            thread=self.manager.thread_id, process_id=process_id, chars=chars, yield_time_ms=ms, **fields
        )
        return await self.manager.write_stdin(call)

    def held(self, process_id: str) -> Held:
        return self.manager.held(process_id)

    async def say(self, process_id: str, chars: bytes, wanted: bytes) -> bytes:
        """Type `chars`, wait until `wanted` was printed after that, and return what was."""
        held = self.held(process_id)
        before = len(printed(held.transcript))
        await held.type(chars, FOREVER)
        while wanted not in (text := printed(held.transcript)[before:]):
            assert not held.ended, text
            await more(held)
        return text

    async def until(self, process_id: str, wanted: bytes) -> bytes:
        """Wait until `wanted` was printed, at any time; return everything printed."""
        held = self.held(process_id)
        while wanted not in (text := printed(held.transcript)):
            assert not held.ended, text
            await more(held)
        return text

    def ends(self) -> list[Ended]:
        return [one for one in self.said if isinstance(one, Ended)]

    def copies(self) -> dict[tuple[str, str], Handles]:
        """Return what a broker holds: copies of all descriptors."""
        return {
            key: Handles({role: os.dup(fd) for role, fd in held.items()})
            for key, held in self.manager.deposits().items()
        }


class House:
    """One nursery and its pumps, for managers of several epochs and threads."""

    def __init__(self, log: Path) -> None:
        self.pumps = Pumps(asyncio.get_running_loop())
        self.nursery = Nursery(log)
        self.desks: list[Desk] = []

    def desk(self, epoch: int = 1, thread_id: str = "t", **config: Any) -> Desk:
        """Return a new manager."""
        self.desks.append(Desk(self, thread_id, epoch, Config(**config)))
        return self.desks[-1]

    async def close(self) -> None:
        for desk in self.desks:
            await desk.manager.terminate_all_processes()
            desk.manager.close()
        end_children(self.nursery)
        await close_nursery(self.nursery)
        self.pumps.close()


def end_children(nursery: Nursery) -> None:
    """Kill what a test exported and nobody took: no manager ends it."""
    for pid in nursery.pids:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children(recursive=True):
                child.kill()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "log")
    yield house
    await house.close()


@pytest.fixture
def ended() -> Callable[[int], Awaitable[None]]:
    """Wait for the end of the process behind a pidfd."""
    return readable


@pytest.fixture
def transcript_of() -> Callable[..., int]:
    """Make an empty transcript of process 1234."""

    def make(limits: Limits | None = None) -> int:
        facts = Facts(
            thread_id="t",
            process_id="1234",
            call_id="call",
            mark="m",
            argv=(b"x",),
            cwd=b"/",
            tty=True,
            columns=80,
            rows=24,
            started_at_ns=0,
            boot_id=kernel.boot_id(),
            limits=limits or Limits(),
        )
        return Transcript.create(facts, Lease.mine(1))

    return make
