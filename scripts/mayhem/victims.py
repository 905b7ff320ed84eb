"""Our own processes, found and killed: brokers, keepers, and the worker of a thread.

Brokers and keepers are found by their environment, since two brokers may be alive (one takes over from the other)
and neither need answer; a worker by the file of its epoch (`broker.epochs`), which is cheaper than asking.

Always true
    Only who is proved to be the one we meant is killed, never a stranger with its number.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from outlive.common import kernel
from outlive.common.paths import Paths


@dataclass(frozen=True, slots=True)
class Victim:
    """One process, or what it was."""

    pid: int
    start: int
    # Of a worker; else 0.
    epoch: int = 0

    @property
    def alive(self) -> bool:
        return not kernel.is_dead(self.pid, self.start)

    def kill(self) -> bool:
        """Kill it with SIGKILL, unless it has gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True


class Victims:
    """Everybody of one home who can be killed."""

    def __init__(self, home: Path, paths: Paths) -> None:
        self._home = b"OUTLIVE_HOME=" + os.fsencode(home)
        self._workers = paths.workers
        # Processes that are none of this home, so that looking again is cheap.
        self._strangers: set[int] = set()

    def brokers(self) -> list[Victim]:
        """Return the living brokers, those starting or ending too, oldest first."""
        return self._of_role(b"broker")

    def keepers(self) -> list[Victim]:
        """Return the living keepers."""
        return self._of_role(b"broker.keeper")

    def spawners(self, worker: int) -> list[Victim]:
        """Return a worker's spawners."""
        return [one for one in self._of_role(b"worker.spawner") if parent_of(one.pid) == worker]

    def worker(self, thread_id: str) -> Victim | None:
        """Return a thread's latest worker, by the file of its epoch."""
        found: Victim | None = None
        for path in self._workers.glob(f"{thread_id}.*"):
            with suppress(OSError, ValueError, KeyError, TypeError):  # gone, or half written
                epoch, facts = int(path.suffix[1:]), json.loads(path.read_text())
                if found is None or epoch > found.epoch:
                    found = Victim(int(facts["pid"]), int(facts["start"]), epoch)
        return found

    def _of_role(self, role: bytes) -> list[Victim]:
        found = []
        pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
        self._strangers &= pids
        for pid in pids - self._strangers:
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if self._home not in environment:
                    # One that has just been forked shows its parent's until it executes its program; an empty
                    # one is on its way.
                    if environment != [b""]:
                        self._strangers.add(pid)
                elif b"OUTLIVE_ROLE=" + role in environment and (start := kernel.start_time(pid)) is not None:
                    found.append(Victim(pid, start))
        return sorted((one for one in found if one.alive), key=lambda one: (one.start, one.pid))


def parent_of(pid: int) -> int:
    """Return the parent's pid; 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
