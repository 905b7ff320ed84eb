"""What must be afterwards as it was before: descriptors, processes, and a log without surprises.

Everybody is looked at when nothing is under way: each thread has run and forgotten one command, and its worker and
spawner are up; then all are sent to bed, and broker and keeper are looked at.  What they have open then belongs to
no process, so it has to be the same after the first start and after any number of deaths.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import psutil

import outlive
from outlive.common.errors import PeerError
from outlive.common.held import REPEATED_WITHIN
from outlive.common.transcript import Transcript

from .scene import Scene
from .victims import Victims

# Seconds until everybody must have closed what the last process left them.
SETTLED_WITHIN = REPEATED_WITHIN + 10.0
# What a command that leaves nothing behind is.
NOTHING = ("/bin/sh", "-c", "exit 0")


class Accounts:
    """What is open when all is quiet, by role."""

    def __init__(self, scene: Scene, victims: Victims, threads: Sequence[outlive.Thread]) -> None:
        self.scene = scene
        self.victims = victims
        self.threads = threads
        self._before: dict[str, Counter[str]] = {}

    async def open(self) -> None:
        """Take note of what is open at first."""
        self._before = await self._at_rest()

    async def close(self) -> None:
        """Count what is left over."""
        tally = self.scene.tally
        for row in await self.scene.until_done(self.scene.host.processes):
            tally.count("left_running", 1, f"{row.thread}/{row.process_id} {row.state}: {row.command}")
        deadline = time.monotonic() + SETTLED_WITHIN
        while self._surplus(after := await self._at_rest()) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        for role, more in self._surplus(after).items():
            before = dict(self._before.get(role, {}))
            tally.count("descriptors_leaked", more.total(), f"{role}: {dict(more)} more than {before}")
        for whose in sorted({text for one in self.victims.brokers() for text in _transcripts(one.pid)}):
            tally.evidence.append(f"still held: {whose}")
        log = self.scene.host.paths.log.read_text(errors="replace")
        for found in re.finditer(r"Traceback.*?\n(?=\S)[^\n]*", log, re.S):
            tally.count("calls_failed", 1, found.group()[-600:])

    def _surplus(self, after: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
        """Return what is open now and was not before, by role."""
        more = {role: kinds - self._before.get(role, Counter()) for role, kinds in after.items()}
        return {role: kinds for role, kinds in more.items() if kinds}

    async def _at_rest(self) -> dict[str, Counter[str]]:
        """Return what everybody has open while nothing is under way."""
        found: dict[str, Counter[str]] = {}
        for thread in self.threads:
            await self._run_nothing(thread)
            row = await self.scene.until_done(thread.resume)
            assert row.worker_pid is not None
            found[f"worker of {thread.thread_id}"] = await _open_in(row.worker_pid)
            spawners = self.victims.spawners(row.worker_pid)
            found[f"spawner of {thread.thread_id}"] = await _open_in(*(one.pid for one in spawners))
        for thread in self.threads:
            await self.scene.until_done(thread.detach)
        found["broker"] = await _open_in(*(one.pid for one in self.victims.brokers()))
        found["keeper"] = await _open_in(*(one.pid for one in self.victims.keepers()))
        return found

    async def _run_nothing(self, thread: outlive.Thread) -> None:
        """Run a command in a thread's worker and collect it, so that its spawner is there and idle."""
        reply = await self.scene.until_done(thread.exec_command, NOTHING)
        while reply.session_id is not None:
            reply = await self.scene.until_done(thread.write_stdin, reply.process_id)


async def _open_in(*pids: int) -> Counter[str]:
    """Return what processes have open, by kind, once each of them sleeps.

    One that waits for the processor may have told somebody that it is done, and not have closed yet what that took.
    """
    kinds: Counter[str] = Counter()
    for pid in pids:
        with suppress(OSError, psutil.NoSuchProcess):  # it has gone
            while psutil.Process(pid).status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP):
                await asyncio.sleep(0.005)
            for name in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    kinds[re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{name}"))] += 1
    return kinds


def _transcripts(pid: int) -> Iterator[str]:
    """Yield what a process holds of ours: whose it is, and how far it got."""
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError, PeerError):
                path = f"/proc/{pid}/fd/{name}"
                if "/memfd:outlive" not in os.readlink(path):
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    found = Transcript(fd)
                    facts, live = found.facts, found.live()
                    who = f"{facts.thread_id}/{facts.process_id} of call {facts.call_id}"
                    yield f"{who}, {live.outcome}, {live.delivered} of {found.written} bytes delivered"
                finally:
                    os.close(fd)
