"""What is run for the sake of its wakes: processes that are waited for, and whether each wake came, and came once.

A process waits at its gate; let through, it says something, or ends.  Rules are set when it is started, or later.
Its thread has a program (`woken`) that leaves a line for each run that it is woken in, and has one effect for each
wake.

Always true
    How often which rule has to come true, and with what, is known before the gate is opened.
    A wake is lost when it has no effect.  It is doubled when it has two, or when it was part of a second run though
    the first one had not failed.
    Nobody reads of an end before its wake has had its effect.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import outlive

from . import woken
from .scene import PATIENCE, Moment, Scene

# Seconds between two looks at what has come true.
_LOOK = 0.05
# Wait, say something if it is told to and wait again, end.
WATCHED = 'read go <"$1"; if [ "$2" ]; then echo "$2"; read go <"$1"; fi; exit "$3"'
SAYS = r"said-[0-9]+\."


@dataclass(slots=True)
class _Watched:
    """A process that is waited for."""

    who: str
    process_id: str
    # Each rule, and what has to be told of it.
    rules: dict[str, str]
    # Open for reading too, so that opening it waits for nobody, here or there.
    gate: int

    def let_through(self) -> None:
        os.write(self.gate, b"go\n")


@dataclass(slots=True)
class _Lines:
    """A file of lines that grows."""

    path: Path
    lines: list[list[str]] = field(default_factory=list)
    _at: int = 0

    def look(self) -> list[list[str]]:
        """Return all lines, in words."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._at)
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self._at += len(whole) + 1
                self.lines += [line.split(" ", 5) for line in whole.decode().split("\n")]
        return self.lines


class Watchers:
    """All processes that are waited for, in some threads."""

    def __init__(self, scene: Scene, threads: list[outlive.Thread]) -> None:
        self.scene = scene
        self.threads = threads
        self._numbers = itertools.count(1)
        self._effects = {one.thread_id: _Lines(scene.folder / f"{one.thread_id}.effects") for one in threads}

    async def begin(self) -> None:
        """Give every thread its program; every second one wants to be woken for what is read, too."""
        for number, thread in enumerate(self.threads):
            await thread.start(f"{woken.__name__}:main", workdir=self.scene.folder, even_read=number % 2 == 0)
        await self._at_rest()

    async def watching(self, thread: outlive.Thread, times: int) -> None:
        """Start one process after the other that is waited for, until there were `times` wakes in all."""
        scene = self.scene
        while not scene.over.is_set():
            number = next(self._numbers)
            await scene.guarded(f"watched {number}", self._watch(thread, number))
            if scene.tally.wakes_expected >= times:
                scene.over.set()

    async def _watch(self, thread: outlive.Thread, number: int) -> None:
        scene, roll = self.scene, self.scene.random
        one = await self._start(thread, number)
        try:
            if roll.random() < 0.5:
                await scene.until_done(thread.detach)
            for _ in one.rules:
                await scene.pause(0.5)
                scene.at(Moment.ENDING, thread.thread_id)
                one.let_through()
            await self._until_woken(thread, one)
        finally:
            os.close(one.gate)
        reply = await scene.until_done(thread.write_stdin, one.process_id, resume=roll.random() < 0.2)
        scene.tally.count(
            "outcomes_wrong", str(reply.exit_code) != one.rules["exit"], f"{one.who}: {reply.outcome}"
        )

    async def _start(self, thread: outlive.Thread, number: int) -> _Watched:
        """Start a process, and have it watched."""
        scene, roll = self.scene, self.scene.random
        path = scene.folder / f"{number}.gate"
        os.mkfifo(path)
        gate = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        text = f"said-{number}." if roll.random() < 0.5 else ""
        rules = {"exit": str(1 + number % 250)} | ({f"output={SAYS}": text} if text else {})
        wanted = ["exit", {"output": SAYS}][: len(rules)]
        at_once = roll.random() < 0.7
        try:
            reply = await scene.until_done(
                thread.exec_command,
                ["/bin/sh", "-c", WATCHED, "sh", str(path), text, rules["exit"]],
                tty=roll.random() < 0.5,
                yield_time_ms=250,
                call_id=f"watched-{number}",
                wake_on=wanted if at_once else [],
            )
            if not at_once:
                await scene.until_done(thread.watch, reply.process_id, *wanted, watch_id=f"watch-{number}")
        except BaseException:
            os.close(gate)
            raise
        scene.tally.wakes_expected += len(rules)
        who = f"watched {number} ({thread.thread_id}/{reply.process_id})"
        return _Watched(who, reply.process_id, rules, gate)

    async def _until_woken(self, thread: outlive.Thread, one: _Watched) -> None:
        """Wait until each of its wakes has had its effect."""
        began = time.monotonic()
        while set(one.rules) - (told := self._told(thread.thread_id, one.process_id)).keys():
            if time.monotonic() - began > PATIENCE:
                rows = [row for row in await thread.wakes(all=True) if row.process_id == one.process_id]
                for rule in set(one.rules) - told.keys():
                    self.scene.tally.count("wakes_lost", 1, f"{one.who}: {rule}; {rows}")
                return
            await asyncio.sleep(_LOOK)
        for rule, wanted in one.rules.items():
            wrong = told[rule] != wanted
            self.scene.tally.count(
                "outcomes_wrong", wrong, f"{one.who}: {rule} told {told[rule]!r}, not {wanted!r}"
            )
        self.scene.tally.woken(time.monotonic() - began)

    def _told(self, thread_id: str, process_id: str) -> dict[str, str]:
        """Return what the effects of a process's wakes tell, by rule."""
        return {words[4]: words[5] for words in self._effects[thread_id].look() if words[3] == process_id}

    async def close(self) -> None:
        """Wait until nothing is due, and count what came twice."""
        await self._at_rest()
        tally = self.scene.tally
        for thread in self.threads:
            effects = Counter((words[3], words[4]) for words in self._effects[thread.thread_id].look())
            for key, times in effects.items():
                tally.count("wakes_doubled", times - 1, f"{thread.thread_id}: {key} had its effect {times} times")
            deliveries = _Lines(self.scene.folder / f"{thread.thread_id}.deliveries").look()
            for why in _given_twice(deliveries):
                tally.count("wakes_doubled", 1, f"{thread.thread_id}: {why}")
            tally.runs += len({words[0] for words in deliveries})
            tally.wakes_delivered_again += len(deliveries) - len({words[2] for words in deliveries})
            for row in await self.scene.until_done(thread.wakes):
                tally.count("wakes_lost", 1, f"still {row.state}: {row}")

    async def _at_rest(self) -> None:
        """Wait until no program runs and nothing is due."""
        ours = {thread.thread_id for thread in self.threads}
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            rows = await self.scene.until_done(self.scene.host.threads)
            if not any(row.running or row.wakes for row in rows if row.thread in ours):
                return
            await asyncio.sleep(_LOOK)
        self.scene.tally.count("calls_failed", 1, f"not at rest after {PATIENCE:.0f} s: {rows}")


def _given_twice(deliveries: list[list[str]]) -> Iterator[str]:
    """Yield what is wrong when a wake was part of two runs: only a run that fails gives its wakes to another."""
    runs: dict[str, tuple[str, str]] = {}
    for run, failures, number, *what in deliveries:
        if runs.setdefault(number, (run, failures)) != (run, failures):
            yield f"wake {number} ({what}) was part of runs {runs[number][0]} and {run}, after {failures} failures"
