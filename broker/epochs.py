"""Which workers and spawners live, by the kernel's word, also those of a former broker: a locked file an epoch.

    RUN/workers/THREAD.EPOCH    a line of JSON: pid and start time of the worker

The file is locked before the worker starts, and the worker and its spawners inherit the lock: it is free again when
all of them are dead, and nothing can come of that epoch any more.  No child of theirs has it, except between fork
and exec, when a start is still under way.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..common import kernel


@dataclass(frozen=True, slots=True)
class Survivor:
    """What a former broker left of an epoch: a worker by its `pidfd`, now the caller's; -1: at most its spawner."""

    thread_id: str
    epoch: int
    pid: int
    pidfd: int


class Epochs:
    """The files in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, thread_id: str, epoch: int) -> Path:
        return self._folder / f"{thread_id}.{epoch}"

    def open(self, thread_id: str, epoch: int) -> int:
        """Return the locked descriptor for a worker that is about to start; raises `OSError`."""
        fd = os.open(self._path(thread_id, epoch), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def write(self, fd: int, pid: int) -> None:
        """Note the worker's pid, and close the descriptor."""
        os.pwrite(fd, json.dumps({"pid": pid, "start": kernel.start_time(pid)}).encode(), 0)
        os.close(fd)

    def is_over(self, thread_id: str, epoch: int) -> bool:
        """Tell whether worker and spawners of this epoch are all dead; then its file goes."""
        return _is_free(self._path(thread_id, epoch))

    def survivors(self) -> Iterator[Survivor]:
        """Yield the epochs of former brokers, also those that are over: no number comes again; their files go."""
        for path in sorted(self._folder.iterdir()):
            thread_id, _, epoch = path.name.rpartition(".")
            if not epoch.isdecimal():
                path.unlink(missing_ok=True)
                continue
            if _is_free(path):
                yield Survivor(thread_id, int(epoch), 0, -1)
                continue
            pid, pidfd = 0, -1
            with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
                facts = json.loads(path.read_text(encoding="ascii"))
                pid, start = int(facts["pid"]), facts["start"]
                pidfd = os.pidfd_open(pid)
                if kernel.is_dead(pid, start):
                    os.close(pidfd)
                    pidfd = -1
            yield Survivor(thread_id, int(epoch), pid, pidfd)


def _is_free(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
