"""Every process that a child started, found and signalled: mark ∪ session ∪ parent links.

A child may start daemons of its own session, or change its environment, or die before its children; no single
way finds them all.  The mark is a random value in the environment of one process of ours and of whatever
inherits it.

Always true
    Nothing of our own runtime is ever signalled: it carries no mark, leads its own session, and is left out
    with all its descendants even when an agent's own command has started it.
    A signal goes through a pidfd that was opened and then checked again, never to a pid that may be recycled.

These functions read all of /proc, which takes milliseconds: call them in a thread.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import kernel
from .launch import MARK, ROLE

if TYPE_CHECKING:
    import psutil

# Seconds between two looks while a killed tree goes down, and how many looks; a process in uninterruptible
# sleep dies later.
_LOOK = 0.005
_LOOKS = 200


@dataclass(frozen=True, slots=True)
class Root:
    """What the search starts from: the mark, and the child's pid if its pidfd proves that it is not reaped."""

    mark: str
    leader: int | None


def root(mark: str, pidfd: int) -> Root:
    """Return the root of the tree whose first process is behind `pidfd` (-1: unknown)."""
    alive = pidfd >= 0 and not kernel.is_reaped(pidfd)
    return Root(mark, kernel.pidfd_pid(pidfd) if alive else None)


def members(start: Root) -> list[psutil.Process]:
    """Return every living process of the tree, in no special order."""
    import psutil  # late: a worker that only starts and reads should be up sooner

    found: dict[int, psutil.Process] = {}
    children: dict[int, list[psutil.Process]] = {}
    ours: set[int] = set()
    wanted = MARK + b"=" + start.mark.encode()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            children.setdefault(process.ppid(), []).append(process)
            variables = _environment(process.pid)
            if any(variable.startswith(ROLE + b"=") for variable in variables):
                ours.add(process.pid)
            elif wanted in variables or (start.leader and os.getsid(process.pid) == start.leader):
                found[process.pid] = process
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child.pid not in found and child.pid not in ours:
                found[child.pid] = child
                queue.append(child.pid)
    return list(found.values())


def send(start: Root, number: int) -> int:
    """Send a signal to every process of the tree; return to how many."""
    return sum(_signal(process, number) for process in members(start))


def end(start: Root) -> None:
    """Kill the tree, looking again until nothing new appears: a process may fork while it is being killed."""
    for _ in range(_LOOKS):
        if not send(start, signal.SIGKILL):
            return
        time.sleep(_LOOK)


def _environment(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _signal(process: psutil.Process, number: int) -> bool:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        # The pidfd is of whoever has the pid now; only if the process we found is still there is it that.
        if not process.is_running():
            return False
        signal.pidfd_send_signal(pidfd, number)
    except (ProcessLookupError, PermissionError):
        return False
    else:
        return True
    finally:
        os.close(pidfd)
