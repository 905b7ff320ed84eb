"""Real brokers, workers and children for the tests, and the moments to wait for.

Each test has a broker of its own, in a folder of its own: `home` is that folder, `host` a connection to its broker.
Afterwards the broker is ended by force, and nothing may be left: no process that carries the folder's name in its
environment, which children inherit too, and no socket.

Tests wait for named moments: an answer, an event (`Home.until`), or a condition that only the kernel knows
(`eventually`).  How long that takes is nobody's business but that of the timeout in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

import outlive
from outlive.common.paths import Paths

T = TypeVar("T")

# Seconds that a process which was told to end may take: a busy machine, not a measurement.
PATIENCE = 30.0
# What a test's commands run: without site packages, so that a start costs little.
PYTHON = [sys.executable, "-I", "-S", "-c"]

# `sh -c HELD FIFO LINE`: wait for a line on the named pipe, then run LINE.
HELD = 'read go <"$0"; eval "$1"'

# Numbered lines until SIGUSR1, then their number into the file, and exit code 7.  Their width is fixed, so that the
# byte at any offset of the output is known.  They come in bursts that fill terminal and conduit; between two,
# others get the processor.
FLOOD = """
import os, signal, sys, time
if os.isatty(0):
    import termios
    mode = termios.tcgetattr(0)
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSANOW, mode)
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
lines = 0
while not stop:
    view = memoryview(b"".join(b"%013d\\n" % line for line in range(lines, lines + 2000)))
    lines += 2000
    while view:
        view = view[os.write(1, view):]
    time.sleep(0.005)
with open(sys.argv[1], "w") as file:
    file.write(str(lines))
sys.exit(7)
"""


async def eventually(look: Callable[[], T]) -> T:
    """Return what `look` returns once that is true: for what only looking can tell."""
    while not (found := look()):
        await asyncio.sleep(0.005)
    return found


def environment_of(pid: int) -> list[bytes]:
    """Return a process's environment; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """Return the parent's pid; 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def state_of(pid: int) -> str:
    """Return the letter of a process's state, as ps shows it; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def lives(pid: int) -> bool:
    """Tell whether a process is there and not a zombie."""
    return state_of(pid) not in ("", "Z", "X")


def descriptors_of(pid: int) -> list[str]:
    """Return what a process has open, one text each."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def numbered(start: int, end: int, *, tty: bool) -> bytes:
    """Return bytes `start` to `end` of what FLOOD prints; a terminal ends lines with CR and LF."""
    width, newline = (15, b"\r\n") if tty else (14, b"\n")
    first = start // width
    lines = b"".join(b"%013d%b" % (line, newline) for line in range(first, end // width + 1))
    return lines[start - first * width : end - first * width]


class Home:
    """One folder with one broker."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = Paths.from_environment({"OUTLIVE_HOME": str(path)})

    def pids(self, role: str | None = None) -> list[int]:
        """Return the living processes of this home; `role`: only our own of that kind, such as `broker`."""
        wanted = [f"OUTLIVE_HOME={self.path}".encode()]
        if role is not None:
            wanted.append(f"OUTLIVE_ROLE={role}".encode())
        found = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
        return [pid for pid in found if lives(pid) and set(wanted) <= set(environment_of(pid))]

    def spawner(self, worker_pid: int) -> int:
        """Return the pid of a worker's one spawner."""
        (pid,) = (pid for pid in self.pids("worker.spawner") if parent_of(pid) == worker_pid)
        return pid

    def write_config(self, text: str) -> None:
        """Write the configuration file."""
        self.path.mkdir(exist_ok=True)
        self.paths.config.write_text(text)

    def sockets(self) -> list[Path]:
        """Return the sockets in the runtime folder."""
        if not self.paths.run.exists():
            return []
        return [path for path in self.paths.run.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]

    async def until(self, host: outlive.Host, after: int = 0, **wanted: Any) -> dict[str, Any]:
        """Return the first event after number `after` with these fields, past or to come."""
        while True:
            for event in await host.recent_events():
                if event["seq"] > after and all(event.get(name) == value for name, value in wanted.items()):
                    return event
            await asyncio.sleep(0.01)

    async def last_event(self, host: outlive.Host) -> int:
        """Return the number of the newest event, for `until`."""
        return max(event["seq"] for event in await host.recent_events())

    async def worker(self, host: outlive.Host, thread_id: str) -> int:
        """Return the pid of a thread's worker, resumed if need be."""
        row = await outlive.Thread(host, thread_id).resume()
        assert row.worker_pid is not None
        return row.worker_pid

    async def kill_worker(self, host: outlive.Host, thread_id: str) -> int:
        """Kill a thread's worker with SIGKILL and wait until its next one is up; return the pid of that."""
        after, pid = await self.last_event(host), await self.worker(host, thread_id)
        os.kill(pid, signal.SIGKILL)
        await self.until(host, after, event="worker", thread=thread_id, what="died")
        event = await self.until(host, after, event="worker", thread=thread_id, what="up")
        assert event["pid"] != pid
        return int(event["pid"])

    async def end(self) -> None:
        """End the broker and everything with it; raises `AssertionError` if anything is left."""
        for pid in self.pids():  # a test that failed may have left something stopped
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        refusal, patience = "", PATIENCE
        try:  # a new broker, if the test has ended on its own, asks the workers that survived
            async with asyncio.timeout(PATIENCE), outlive.connect(self.paths, start=bool(self.pids())) as host:
                await host.down(force=True)
        except outlive.Interrupted as error:  # the broker was gone, or going, before its answer was here
            refusal, patience = repr(error), PATIENCE
        except (outlive.OutliveError, TimeoutError) as error:
            refusal, patience = repr(error), 0.0
        until = time.monotonic() + patience
        left = [pid for pid in self.pids() if not ended_within(pid, until - time.monotonic())]
        shown = [f"{pid} {_command(pid)}" for pid in left]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not shown, f"left behind: {shown} {refusal}"
        assert self.sockets() == []


def ended_within(pid: int, seconds: float) -> bool:
    """Wait for the end of a process that need not be our child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(0, seconds) * 1000))
    finally:
        os.close(pidfd)


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "(gone)"


@pytest.fixture
def home_path(tmp_path: Path) -> Path:
    """The folder that OUTLIVE_HOME names."""
    return tmp_path / "h"


@pytest.fixture
async def home(home_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Home]:
    """A home without a broker yet; `outlive.connect()` finds it, and starts one."""
    for name in ("OUTLIVE_THREAD", "OUTLIVE_PROCESS", "OUTLIVE_MARK", "OUTLIVE_ROLE", "OUTLIVE_LIMITS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUTLIVE_HOME", str(home_path))
    # Commands run in a login shell: whatever a person's own profile says and does is not for us.
    monkeypatch.setenv("HOME", str(home_path))
    monkeypatch.setenv("SHELL", "/bin/sh")
    monkeypatch.chdir(home_path.parent)
    home = Home(home_path)
    yield home
    await home.end()


@pytest.fixture
async def host(home: Home) -> AsyncIterator[outlive.Host]:
    """A connection to the home's broker."""
    async with outlive.connect() as host:
        yield host


@pytest.fixture
def fifo(tmp_path: Path) -> Callable[[str], Path]:
    """Makes named pipes, by which a test lets a child go on."""

    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


class Numbered:
    """One child that runs FLOOD."""

    def __init__(self, thread: outlive.Thread, process_id: str, count: Path, *, tty: bool) -> None:
        self.thread = thread
        self.process_id = process_id
        self.tty = tty
        self.seen = 0
        self._count = count

    @classmethod
    async def start(cls, thread: outlive.Thread, folder: Path, *, tty: bool) -> Numbered:
        """Start it."""
        count = folder / f"lines-{os.urandom(4).hex()}"
        started = await thread.exec_command([*PYTHON, FLOOD, str(count)], tty=tty, yield_time_ms=250)
        assert started.session_id is not None, started
        return cls(thread, started.process_id, count, tty=tty)

    async def more(self, size: int = 1 << 20) -> None:
        """Wait until it has printed `size` bytes more."""
        wanted = self.seen + size
        while self.seen < wanted:
            output = await self.thread.read_output(self.process_id, self.seen, wait_ms=5000)
            self.seen = output.written

    async def finish(self) -> outlive.Outcome:
        """Let it end, and return how it did."""
        await self.thread.kill(self.process_id, signal="USR1")
        return await self.thread.wait(self.process_id)

    async def check(self) -> None:
        """Hold what is kept of its output, byte for byte, against what it says it has printed."""
        printed = int(self._count.read_text()) * (15 if self.tty else 14)
        at = 0
        while True:
            output = await self.thread.read_output(self.process_id, at)
            assert output.written == printed
            for start, data in output.pieces:
                assert data == numbered(start, start + len(data), tty=self.tty), f"damaged in {start}+{len(data)}"
            spans = sorted([*output.gaps, *((start, start + len(data)) for start, data in output.pieces)])
            for start, end in spans:
                assert start == at
                at = end
            if at >= printed:
                return
