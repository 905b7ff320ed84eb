"""What outlive takes while nothing happens: memory, and wake-ups of the processor.

Always true
    A page counts once, however many share it: ours by its share, a transcript's by its file.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

from ..common.client import Host, connect
from ..common.launch import ROLE
from .measurement import SLEEPER, Bench, Row, start_all

# Seconds of silence before wake-ups are counted: the last call's echoes are work, not timers.
SETTLE = 2.0
# Threads that start something at the same time: each is a worker for that moment.
STARTS_AT_ONCE = 8


async def memory(bench: Bench) -> list[Row]:
    """Of broker and worker, per idle process: own pages, and all of the transcripts'."""
    count = 100 if bench.quick else 500
    async with connect() as host:
        thread = await host.thread("memory")
        await start_all(thread, SLEEPER, 1)
        broker = (await host.status())["broker_pid"]
        worker = (await host.threads())[0].worker_pid
        assert worker is not None
        before = {pid: own_kib(pid) for pid in (broker, worker)}
        shared_before = transcripts_kib(broker)
        await start_all(thread, SLEEPER, count)
        attached = (own_kib(worker) - before[worker] + transcripts_kib(broker) - shared_before) / count
        await thread.detach()
        await thread.processes()
        detached = (own_kib(broker) - before[broker] + transcripts_kib(broker) - shared_before) / count
    note = f"{count} processes; anonymous and file pages, and the pages of the transcripts"
    return [
        Row(
            name="broker per detached process",
            value=detached,
            unit="KiB",
            target="≤ 40 KiB",
            holds=detached <= 40,
            note=note,
        ),
        Row(name="worker per attached process", value=attached, unit="KiB", note=note),
        Row(name="broker with one process", value=before[broker], unit="KiB"),
        Row(name="worker with one process", value=before[worker], unit="KiB"),
    ]


def own_kib(pid: int) -> float:
    """Return a process's share of anonymous and file pages; shared memory is counted by its files."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Pss_Anon:", "Pss_File:", "SwapPss:")):
            total += int(line.split()[1])
    return total


def transcripts_kib(pid: int) -> float:
    """Return the pages of all memfds that a process holds, each counted once."""
    pages = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:"):
                found = os.stat(path)
                pages[found.st_dev, found.st_ino] = found.st_blocks / 2
    return sum(pages.values())


async def sleepers(bench: Bench) -> list[Row]:
    """Threads that sleep until their one process ends: memory for each, and wake-ups of the processor."""
    return await sleeping(20 if bench.quick else 200, 3 if bench.quick else 10)


async def sleeping(count: int, seconds: float) -> list[Row]:
    """Measure `count` sleeping threads, for so many seconds."""
    async with connect() as host:
        await _to_bed(host, "first")
        broker, keeper = itemgetter("broker_pid", "keeper_pid")(await host.status())
        before, shared_before = own_kib(broker), transcripts_kib(broker)
        for first in range(0, count, STARTS_AT_ONCE):
            names = range(first, min(count, first + STARTS_AT_ONCE))
            await asyncio.gather(*(_to_bed(host, f"sleeper-{number}") for number in names))
        each = (own_kib(broker) - before + transcripts_kib(broker) - shared_before) / count
        await asyncio.sleep(SETTLE)
        woken = {pid: switches(pid) for pid in (broker, keeper)}
        await asyncio.sleep(seconds)
        wakes = sum(switches(pid) - before for pid, before in woken.items())
    note = f"{count} threads, each with a program and one idle process that it waits for"
    return [
        Row(
            name="broker per sleeping thread",
            value=each,
            unit="KiB",
            target="≤ 60 KiB",
            holds=each <= 60,
            note=note,
        ),
        Row(
            name="wake-ups of broker and keeper while they sleep",
            value=wakes,
            unit=f"in {seconds} s",
            target="0",
            holds=wakes == 0,
            note=note,
        ),
    ]


async def _to_bed(host: Host, name: str) -> None:
    """Have a thread start a process and sleep until it ends."""
    thread = await host.thread(name)
    await thread.start(["/bin/true"])
    await thread.exec_command(SLEEPER, wake_on=["exit"], yield_time_ms=250)
    await thread.detach()


async def wakeups(bench: Bench) -> list[Row]:
    """How often the processor was given to an idle broker, worker and spawner within 10 s."""
    seconds = 3 if bench.quick else 10
    async with connect() as host:
        asleep = await host.thread("asleep")
        await start_all(asleep, ["/bin/sh", "-i"], 1)
        await asleep.detach()
        awake = await host.thread("awake")
        await start_all(awake, ["/bin/sh", "-i"], 1)
        broker = (await host.status())["broker_pid"]
        (worker,) = [one.worker_pid for one in await host.threads() if one.worker_pid]
        pids = {"broker": broker, "worker": worker}
        (pids["spawner"],) = [pid for pid in children_of(worker) if role_of(pid) == b"worker.spawner"]
        await asyncio.sleep(SETTLE)
        before = {name: switches(pid) for name, pid in pids.items()}
        await asyncio.sleep(seconds)
        counts = {name: switches(pid) - before[name] for name, pid in pids.items()}
    return [
        Row(
            name=f"wake-ups of an idle {name}",
            value=count,
            unit=f"in {seconds} s",
            target="0",
            holds=count == 0,
            note="all threads; one shell attached, one detached",
        )
        for name, count in counts.items()
    ]


def switches(pid: int) -> int:
    """Return how often any thread of a process has left the processor."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total


def children_of(pid: int) -> list[int]:
    """Return the children of a process's main thread."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def role_of(pid: int) -> bytes:
    """Return which of our programs a process is, empty for any other."""
    for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if item.startswith(ROLE + b"="):
            return item[len(ROLE) + 1 :]
    return b""
