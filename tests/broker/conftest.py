"""Real descriptors for the broker's parts: transcripts, and children on terminals, made without a spawner."""

from __future__ import annotations

import os
import secrets
import select
import signal
from collections.abc import Callable, Iterator

import pytest

from outlive.common import kernel, launch
from outlive.common.descriptors import Handles
from outlive.common.inlet import Inlet
from outlive.common.transcript import Facts, Lease, Limits, Transcript, mark_started

# Of nobody: as long as a process of this pid and start time cannot exist, the lease is free to take.
DEAD = Lease(pid=(1 << 22) + 1, start_time=1, epoch=7)

DEFAULT = Limits()


def facts_of(process_id: str, *, thread: str = "t", call: str = "", limits: Limits = DEFAULT) -> Facts:
    """Return the facts of a process with a terminal."""
    return Facts(
        thread_id=thread,
        process_id=process_id,
        call_id=call or f"call-{process_id}",
        mark=secrets.token_hex(16),
        argv=(b"/bin/sh",),
        cwd=b"/",
        tty=True,
        columns=80,
        rows=24,
        started_at_ns=1_700_000_000_123_456_789,
        boot_id=kernel.boot_id(),
        limits=limits,
    )


class Children:
    """Starts children on terminals as the spawner does, and sees to it that none is left."""

    def __init__(self) -> None:
        self._handles: list[Handles] = []
        self._pids: list[int] = []

    def transcript(
        self, process_id: str, output: bytes = b"", limits: Limits = DEFAULT, **facts: str
    ) -> Transcript:
        """Return a transcript that holds `output`, trimmed to its limits."""
        fd = Transcript.create(facts_of(process_id, limits=limits, **facts), DEAD)
        self._handles.append(Handles({"transcript": fd}))
        os.write(fd, output)
        transcript = Transcript(fd)
        transcript.trim(len(output), exact=True)
        return transcript

    def early(self, process_id: str, **facts: str) -> Handles:
        """Return what a spawner deposits before it forks; the caller's to close, as everything else here."""
        handles = Handles({"transcript": Transcript.create(facts_of(process_id, **facts), DEAD)})
        handles.conduit_read, handles.conduit_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        handles.inlet = Inlet.create(Transcript(handles.transcript).facts.mark)
        return handles

    def late(self, early: Handles, *argv: str, executed: bool = True) -> Handles:
        """Start `argv` on a terminal; return what a spawner deposits after the fork.

        Not `executed`: like a forked child before it executes its program, with the transcript, without the mark.
        """
        transcript = Transcript(early.transcript)
        terminal, slave = os.openpty()
        os.set_blocking(terminal, False)
        environment = dict(os.environb)
        files = [(os.POSIX_SPAWN_DUP2, slave, number) for number in range(3)]
        if executed:
            environment[launch.MARK] = transcript.facts.mark.encode()
        else:
            files.append((os.POSIX_SPAWN_DUP2, early.transcript, 3))
        pid = os.posix_spawn(argv[0], argv, environment, file_actions=files, setsid=True)
        os.close(slave)
        self._pids.append(pid)
        mark_started(early.transcript, pid)
        return Handles({"terminal": terminal, "pidfd": os.pidfd_open(pid)})

    def start(self, process_id: str, *argv: str, **facts: str) -> Handles:
        """Return all handles of a new child."""
        handles = self.early(process_id, **facts)
        handles.adopt(self.late(handles, *argv))
        return handles

    def close(self) -> None:
        """Kill and reap what is left."""
        for handles in self._handles:
            handles.close()
        for pid in self._pids:
            try:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                    os.kill(pid, signal.SIGKILL)
                    os.waitid(os.P_PID, pid, os.WEXITED)
            except ChildProcessError:
                pass


def duplicate(handles: Handles) -> Handles:
    """Return a second copy of every descriptor, as the kernel makes them on their way to somebody else."""
    return Handles({role: os.dup(fd) for role, fd in handles.held().items()})


def has_ended(pidfd: int) -> bool:
    """Whether the process behind `pidfd` has ended."""
    return bool(select.select([pidfd], [], [], 0)[0])


@pytest.fixture
def children() -> Iterator[Children]:
    started = Children()
    yield started
    started.close()


@pytest.fixture
def copies() -> Callable[[Handles], Handles]:
    return duplicate


@pytest.fixture
def descriptors() -> Callable[[], int]:
    """Return how many descriptors this process has open, without the journal's files."""

    def ours(fd: str) -> bool:
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            return False
        return not target.startswith("/") or target.startswith(("/dev/", "/memfd:"))

    return lambda: sum(map(ours, os.listdir("/proc/self/fd")))
