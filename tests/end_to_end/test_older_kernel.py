"""Before Linux 6.15 a pidfd does not tell how a process ended: only whoever reaped it knows, or nobody.

Every Python of these tests' runtime has `PIDFD_GET_INFO` refused, as an older kernel refuses it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import outlive

from .conftest import Home, eventually, lives, parent_of, state_of
from .test_deaths import replaced

REFUSES = """
import errno, fcntl

ask = fcntl.ioctl

def ioctl(fd, request, *rest):
    if request == 0xC040FF0B:
        raise OSError(errno.ENOTTY, "PIDFD_GET_INFO: not on this kernel")
    return ask(fd, request, *rest)

fcntl.ioctl = ioctl
"""
# Starts a broker, adopts what nobody of ours adopts, and reaps it without a record: not every machine has an init.
INIT = """
import asyncio, os, outlive
from outlive.common import kernel

async def up():
    async with outlive.connect():
        print("up", flush=True)

kernel.become_subreaper()
asyncio.run(up())
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


@pytest.fixture(autouse=True)
def older(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this home's kernel an older one, before anything of it has started."""
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "sitecustomize.py").write_text(REFUSES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "older"))


@dataclass
class Child:
    """One that ends at SIGUSR1, with last words and a code of its own."""

    thread: outlive.Thread
    process_id: str
    pid: int
    code: int

    @classmethod
    async def start(cls, host: outlive.Host, name: str, code: int) -> Child:
        """Start it in a thread of its own."""
        thread = await host.thread(name)
        line = f"trap 'printf last; exit {code}' USR1; echo ready; while :; do read x; done"
        reply = await thread.exec_command(["sh", "-c", line], tty=True, yield_time_ms=250)
        (row,) = await thread.processes()
        assert row.pid
        return cls(thread, reply.process_id, row.pid, code)

    async def end(self) -> None:
        """Have it end, and see that it has."""
        os.kill(self.pid, signal.SIGUSR1)
        await eventually(lambda: not lives(self.pid))

    async def outcome(self) -> outlive.Outcome:
        """Return how it ended, once that is known; whatever that is, its last words are there."""
        outcome = await self.thread.wait(self.process_id)
        assert await self.thread.output(self.process_id) == b"ready\r\nlast"
        return outcome

    async def is_known(self) -> None:
        """See that its code is the real one."""
        assert await self.outcome() == outlive.Outcome("exited", code=self.code)


async def cast(host: outlive.Host) -> tuple[Child, Child]:
    """Return a child that is attached, and one that sleeps."""
    awake, asleep = await Child.start(host, "awake", 42), await Child.start(host, "asleep", 43)
    await asleep.thread.detach()
    return awake, asleep


@asynccontextmanager
async def without_broker(host: outlive.Host, *others: int) -> AsyncIterator[None]:
    """Kill the broker, and others with it; the keeper starts no next one before the end of this."""
    status = await host.status()
    killed = status["broker_pid"], *others
    os.kill(status["keeper_pid"], signal.SIGSTOP)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not any(lives(pid) for pid in killed))
    yield
    os.kill(status["keeper_pid"], signal.SIGCONT)


@pytest.mark.parametrize("worker_too", [False, True])
async def test_what_ends_while_no_broker_runs_has_the_code_that_its_spawner_or_the_keeper_recorded(
    home: Home, host: outlive.Host, worker_too: bool
) -> None:
    awake, asleep = await cast(host)
    async with without_broker(host, *(home.pids("worker") if worker_too else [])):
        await awake.end()
        await asleep.end()
    await awake.is_known()
    await asleep.is_known()


async def test_what_ends_while_its_worker_is_dead_has_the_code_that_the_broker_recorded(
    home: Home, host: outlive.Host
) -> None:
    child = await Child.start(host, "t", 44)
    for role in ("worker.spawner", "worker"):
        (pid,) = home.pids(role)
        os.kill(pid, signal.SIGKILL)
    await child.end()
    await child.is_known()


async def test_what_a_replaced_keeper_has_not_adopted_is_lost_and_never_zero(home: Home) -> None:
    init = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", INIT, stdout=subprocess.PIPE)
    assert init.stdout
    assert await init.stdout.readline() == b"up\n"
    async with outlive.connect(home.paths, start=False) as host:
        awake, asleep = await cast(host)
        before = await host.status()
        os.kill(before["keeper_pid"], signal.SIGKILL)
        await replaced(host, before, keeper=True)
        await eventually(lambda: parent_of(asleep.pid) == init.pid)
        async with without_broker(host):
            await awake.end()
            await asleep.end()
            await eventually(lambda: not state_of(asleep.pid))
        await awake.is_known()  # to its spawner, which lives
        assert await asleep.outcome() == outlive.Outcome.lost("it was reaped by a process that kept no record")
        await host.down(force=True)
    await init.wait()
