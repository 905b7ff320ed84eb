"""Every process that a child started, found and signalled: mark ∪ session ∪ parent links.

A child may start daemons of its own session, or change its environment, or die before its children; no single
way finds them all.  The mark is a random value in the environment of one process of ours and of whatever
inherits it.

Always true
    Nothing of our own runtime is ever signalled: it carries no mark, leads its own session, and is left out
    with all its descendants even when an agent's own command has started it.
    A signal goes through a pidfd that was opened and then checked again, never to a pid that may be recycled.

A search reads all of /proc, which takes milliseconds, and a good part of a second when there are thousands of
processes: do it in a thread, and end many trees by one `Feller`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import kernel
from .descriptors import Handles
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


def members(*starts: Root) -> list[list[psutil.Process]]:
    """Return for each of the trees every living process, in no special order."""
    import psutil  # late: a worker that only starts and reads should be up sooner

    marks = {MARK + b"=" + start.mark.encode(): tree for tree, start in enumerate(starts)}
    leaders = {start.leader: tree for tree, start in enumerate(starts) if start.leader}
    found: dict[int, int] = {}
    processes: dict[int, psutil.Process] = {}
    children: dict[int, list[int]] = {}
    ours: set[int] = set()
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            # Not by `process_iter`: it remembers, and leaves out who was given the pid since its last search.
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            processes[pid] = process
            children.setdefault(process.ppid(), []).append(pid)
            variables = _environment(pid)
            # A leader was started as a command, whatever it says that it is.
            if pid not in leaders and any(variable.startswith(ROLE + b"=") for variable in variables):
                ours.add(pid)
                continue
            tree = next((marks[one] for one in variables if one in marks), None)
            if tree is None and leaders:
                tree = leaders.get(os.getsid(pid))
            if tree is not None:
                found[pid] = tree
    queue = list(found)
    while queue:
        parent = queue.pop()
        for pid in children.get(parent, ()):
            if pid not in found and pid not in ours:
                found[pid] = found[parent]
                queue.append(pid)
    trees: list[list[psutil.Process]] = [[] for _ in starts]
    for pid, tree in found.items():
        trees[tree].append(processes[pid])
    return trees


def send(number: int, *starts: Root) -> list[int]:
    """Send a signal to every process of these trees; return to how many of each."""
    return [sum(_signal(process, number) for process in found) for found in members(*starts)]


@dataclass(slots=True, eq=False)
class _Tree:
    """A tree that is being killed: who has the pidfd, the looks that are left, and what tells who waits."""

    handles: Handles
    looks: int
    felled: asyncio.Future[None]


class Feller:
    """Kills trees, all that it is asked to by one search after the other.

    It looks again until nothing of a tree appears: a process may fork while it is being killed.
    """

    def __init__(self) -> None:
        self._trees: dict[str, _Tree] = {}
        self._work: asyncio.Task[None] | None = None

    async def fell(self, mark: str, handles: Handles) -> None:
        """Kill a tree; returns when nothing of it is left, but for what is in uninterruptible sleep.

        Whoever asks for the same one meanwhile waits for the same end; a caller that is cancelled stops nothing.
        """
        tree = self._trees.get(mark)
        if tree is None:
            tree = self._trees[mark] = _Tree(handles, _LOOKS, asyncio.get_running_loop().create_future())
        if self._work is None:
            self._work = asyncio.create_task(self._go_on())
        await asyncio.shield(tree.felled)

    async def _go_on(self) -> None:
        try:
            while self._trees:
                if any(await self._look()):
                    await asyncio.sleep(_LOOK)
        finally:
            self._work = None
            for tree in self._trees.values():  # we were cancelled
                tree.felled.cancel()
            self._trees.clear()

    async def _look(self) -> list[int]:
        """Kill what is found; return of how many processes each tree was."""
        trees = dict(self._trees)
        try:
            # Now, not when it was asked for: the leader may have been reaped since.
            roots = [root(mark, tree.handles.pidfd) for mark, tree in trees.items()]
            left = await asyncio.to_thread(send, signal.SIGKILL, *roots)
        except Exception as error:  # whoever waits is to know, and the next search is to be made
            for mark in trees:
                self._trees.pop(mark).felled.set_exception(error)
            return []
        for (mark, tree), alive in zip(trees.items(), left, strict=True):
            tree.looks -= 1
            if not alive or tree.looks < 0:
                self._trees.pop(mark).felled.set_result(None)
        return left


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
