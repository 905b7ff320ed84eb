"""What a measurement of bench is given, and what it returns: lines of the result.

Not here
    What is measured: `flooded`, `latency`, `footprint`.  What it is compared with: `baselines`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.client import Thread
from .baselines import Flood, Programs

TRUE = ["/bin/true"]
SLEEPER = ["/bin/sleep", "86400"]
ECHO = ["/bin/sh", "-c", "stty raw -echo; printf r; exec cat"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result.

    `value`: the median, in `unit`.  `low`, `high`: the spread.  `baseline`: what it is compared with, in the same
    unit.  `ratio`: how many times as good as the baseline, where 1 is equal and more is better.  `holds`: whether
    the `target` is met; `None` without one, or when skipped (`note` says why).
    """

    name: str
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    target: str = ""
    holds: bool | None = None
    note: str = ""


def row(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    baseline: float | None = None,
    ratio: float | None = None,
    target: str = "",
    holds: Callable[[float], bool] | None = None,
    note: str = "",
) -> Row:
    """Return the line of `values`: their median and spread, and whether the median `holds`."""
    middle = statistics.median(values)
    verdict = holds(middle) if holds else None
    return Row(name, middle, unit, min(values), max(values), baseline, ratio, target, verdict, note)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a measurement gets: how thorough to be, a folder of its own, and the programs that flood and read."""

    quick: bool
    folder: Path
    programs: Programs

    def repeat(self, full: int, quick: int) -> range:
        """Return how often to measure."""
        return range(quick if self.quick else full)

    def flood(self, count: int, size: int) -> Flood:
        """Return a flood of `count` children, of `size` bytes each."""
        return Flood(self.programs, self.folder, count, size)


async def start_all(thread: Thread, argv: list[str], count: int) -> list[str]:
    """Start `count` processes on terminals, a few at a time, and return their ids."""
    started: list[str] = []
    while len(started) < count:
        some = min(32, count - len(started))
        answers = await asyncio.gather(
            *(thread.exec_command(argv, tty=True, yield_time_ms=250) for _ in range(some))
        )
        started += [answer.process_id for answer in answers]
    return started


async def first_output(thread: Thread, process_ids: list[str]) -> None:
    """Wait until each of these has printed something."""
    await asyncio.gather(*(thread.read_output(one, 0, wait_ms=30_000) for one in process_ids))
