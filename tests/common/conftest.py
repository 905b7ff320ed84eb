"""Real descriptors for the parts that both sides share: transcripts, and children on terminals and pipes.

Children are started here without a spawner.  `Children` kills and reaps what a test leaves, and closes what it gave
out.  Tests wait for named moments: a condition that only the kernel knows is polled by `eventually` or `until`.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from outlive.common import kernel, launch
from outlive.common.descriptors import Handles
from outlive.common.inlet import Inlet
from outlive.common.pump import Pump
from outlive.common.transcript import Facts, Gap, Lease, Limits, Transcript, mark_started

T = TypeVar("T")

# Of nobody: no process can have a pid beyond the kernel's largest.
DEAD = Lease(pid=(1 << 22) + 1, start_time=1, epoch=7)
DEFAULT = Limits()
MARK = "m" * 32
# Seconds that a busy machine may take; not a measurement.
PATIENCE = 60.0
# What children run: without site packages, so that a start costs little.
PYTHON = (sys.executable, "-I", "-S", "-c")
# Makes a child's terminal hand on every byte, in both directions.
RAW = "import os, tty; tty.setraw(0); os.write(1, b'raw');"


def facts_of(
    process_id: str = "1001",
    *,
    tty: bool = True,
    limits: Limits = DEFAULT,
    mark: str = MARK,
    wake_on: tuple[str, ...] = (),
) -> Facts:
    return Facts(
        thread_id="t",
        process_id=process_id,
        call_id=f"call-{process_id}",
        mark=mark,
        argv=(b"/bin/sh", b"-c", b"\xff"),
        cwd=b"/tmp/\xfe",
        tty=tty,
        columns=80,
        rows=24,
        started_at_ns=1_700_000_000_123_456_789,
        boot_id="b" * 36,
        limits=limits,
        wake_on=wake_on,
    )


def descriptors() -> dict[int, str]:
    """Return what this process has open: number → file."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the folder's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: file for fd, file in found.items() if not file.startswith("/proc/")}


def eventually(look: Callable[[], T]) -> T:
    """Return the first true answer of `look`."""
    give_up = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.002)
    return found


async def until(look: Callable[[], T]) -> T:
    """Like `eventually`, while the loop goes on."""
    give_up = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < give_up, "it never came true"
        await asyncio.sleep(0.002)
    return found


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def await_end(pidfd: int) -> None:
    """Wait until the process behind `pidfd` has ended; leaves it to be reaped."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "it never ended"


def printed(transcript: Transcript) -> bytes:
    """Return the whole stream; fails if some of it is not kept."""
    parts = list(transcript.read(0, transcript.written))
    assert not any(isinstance(part, Gap) for part in parts)
    return b"".join(part[1] for part in parts if not isinstance(part, Gap))


def in_a_child(act: Callable[[], None]) -> None:
    """Run `act` in a forked process, for what cannot be undone: limits, users, seals on everything.

    An assertion that fails there fails here.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            os.write(write_end, traceback.format_exc().encode()[-30_000:])
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, "rb") as told:
        story = told.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, story or f"ended with status {status}"


class Children:
    """Starts children, and sees to it that nothing of them is left."""

    def __init__(self) -> None:
        self._handles: list[Handles] = []
        self._transcripts: list[int] = []
        self._pids: list[int] = []

    def transcript(self, output: bytes = b"", *, limits: Limits = DEFAULT, lease: Lease = DEAD) -> Transcript:
        fd = Transcript.create(facts_of(limits=limits), lease)
        self._transcripts.append(fd)
        os.write(fd, output)
        return Transcript(fd)

    def handles(self, *, tty: bool = True, mark: str = MARK, **facts: Any) -> Handles:
        """Return what exists before a child does; with a terminal also the pipes."""
        handles = Handles({"transcript": Transcript.create(facts_of(tty=tty, mark=mark, **facts), DEAD)})
        if tty:
            handles.conduit_read, handles.conduit_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            handles.inlet = Inlet.create(mark)
        self._handles.append(handles)
        return handles

    def start(self, *argv: str, tty: bool = True, mark: str = MARK, **facts: Any) -> Handles:
        """Start `argv`, leading a session: on a terminal, or with its output in a pipe and no input."""
        handles = self.handles(tty=tty, mark=mark, **facts)
        environment = {**os.environb, launch.MARK: mark.encode()}
        if tty:
            handles.terminal, theirs = os.openpty()
            # Opening it makes it the controlling terminal of the new session.
            files: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
                (os.POSIX_SPAWN_OPEN, number, os.ttyname(theirs), os.O_RDWR, 0) for number in range(3)
            ]
        else:
            handles.terminal, theirs = os.pipe2(os.O_CLOEXEC)
            files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            files += [(os.POSIX_SPAWN_DUP2, theirs, number) for number in (1, 2)]
        os.set_blocking(handles.terminal, False)
        pid = os.posix_spawn(
            argv[0], argv, environment, file_actions=files, setsid=True, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
        )
        os.close(theirs)
        self._pids.append(pid)
        handles.pidfd = os.pidfd_open(pid)
        mark_started(handles.transcript, pid)
        return handles

    def python(self, program: str, *arguments: str, tty: bool = True, **facts: Any) -> Handles:
        return self.start(*PYTHON, program, *arguments, tty=tty, **facts)

    def fork(self, act: Callable[[], None]) -> int:
        """Run `act` in a forked process; return its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                act()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        self._pids.append(pid)
        return pid

    def close(self) -> None:
        for pid in self._pids:
            with suppress(ChildProcessError):
                # Until it is reaped, its number and its group's are its own; a shell's own child is in the group.
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                if ended is None:
                    os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED)
        for handles in self._handles:
            handles.close()
        for fd in self._transcripts:
            os.close(fd)


class Owner:
    """The least that `Pumps` asks of whoever holds a process; remembers what it was told."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self.moves = 0
        self.offers = 0
        self.closings = 0
        self.dry = 0
        self.exits = 0

    def output_moved(self) -> None:
        self.moves += 1

    def input_moved(self) -> None:
        self.offers += 1

    def terminal_closed(self) -> None:
        self.closings += 1

    def terminal_dry(self) -> None:
        self.dry += 1

    def process_exited(self) -> None:
        self.exits += 1


@pytest.fixture
def children() -> Iterator[Children]:
    started = Children()
    yield started
    started.close()


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The test leaves exactly the descriptors open that it found."""
    before = descriptors()
    yield
    assert descriptors() == before


@pytest.fixture
def me() -> Lease:
    lease = Lease.mine(epoch=3)
    assert lease.start_time == kernel.start_time(os.getpid())
    return lease
