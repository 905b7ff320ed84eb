"""Runs that must see a loss: a check that cannot fail proves nothing.

copied     the copying pump holds bytes in its hands, and whoever pumps is killed at work
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys

import outlive
from outlive.common import kernel

from .. import flood, home
from .children import BURSTS, LOOK
from .tally import Tally

VOID = 77
# Rounds in which the copying pump must be seen to lose something, and kills in each.
COPIED_ROUNDS = 10
COPIED_KILLS = 30


class Copied:
    """The copying pump, several children that flood without a pause, and a killer who meets it at work."""

    def __init__(self, host: outlive.Host, tally: Tally, seed: int | None) -> None:
        self.host = host
        self.tally = tally
        self.random = random.Random(seed)

    async def round(self, name: str, children: int) -> bool:
        """Kill the workers of a new thread; tell whether output was seen to be missing."""
        thread = await self.host.thread(name)
        ids = []
        for tag in range(children):
            numbers = (tag, 1 << 32, max(BURSTS), 0, 0)
            argv = [sys.executable, "-I", "-S", flood.__file__, *map(str, numbers)]
            ids.append((await thread.exec_command(argv, tty=True, yield_time_ms=250)).process_id)
        for _ in range(COPIED_KILLS):
            os.kill(await self._worker_at_work(thread), signal.SIGKILL)
            self.tally.kills += 1
            if any([await self._missing(thread, process_id, tag) for tag, process_id in enumerate(ids)]):
                return True
        await thread.kill(*ids, signal="KILL")
        return False

    async def _worker_at_work(self, thread: outlive.Thread) -> int:
        """Return the worker's pid a random moment after it has taken its processes."""
        await thread.resume()
        while True:
            pids = {row.worker_pid for row in await thread.processes()}
            await asyncio.sleep(self.random.uniform(0.0005, 0.02))
            for pid in pids:
                if pid is not None and not kernel.is_dead(pid, kernel.start_time(pid) or 0):
                    return pid

    async def _missing(self, thread: outlive.Thread, process_id: str, tag: int) -> bool:
        written = (await thread.read_output(process_id, 1 << 60)).written
        output = await thread.read_output(process_id, max(0, written - LOOK))
        for offset, data in output.pieces:
            self.tally.bytes_compared += len(data)
            if flood.misplaced(tag, offset, data):
                lost = flood.lost_until(tag, offset, data)
                self.tally.count("lost", lost, f"child {tag} of {thread.thread_id}, before offset {offset}")
                return True
        return False


async def copied_chaos(tally: Tally, *, children: int, seed: int | None) -> int:
    """Look for a loss until there is one; return the exit status, 77 where the check would prove nothing."""
    victims, *others = sorted(os.sched_getaffinity(0))
    if not others:
        print("void: a killer needs a core of its own, and there is only one", file=sys.stderr)
        return VOID
    os.sched_setaffinity(0, {victims})
    try:
        async with outlive.connect() as host:
            os.sched_setaffinity(0, {others[0]})
            try:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
            except PermissionError:
                print(
                    "void: no right to real-time priority, without which kills meet a sleeping pump",
                    file=sys.stderr,
                )
                await host.down(force=True)
                return VOID
            rounds = Copied(host, tally, seed)
            seen = False
            for number in range(COPIED_ROUNDS):
                if seen := await rounds.round(f"t{number}", children):
                    break
            await host.down(force=True)
            return 0 if seen else 1
    except BaseException:
        await home.emptied()
        raise
