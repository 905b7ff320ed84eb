"""Speed and memory of outlive, as ratios against baselines measured in the same run.

    drain       flooding children: bytes per second against a bare C loop of read().
    control     `status` and `ps` while a child floods.
    exec        /bin/true from a client against a bare ptyprocess spawn; and from a process that holds 500 MB.
    roundtrip   input typed until its echo is seen.
    handoff     detach and reattach of 1, 64 and 500 processes of one thread.
    crash       kill -9 of a worker until its successor answers.
    memory      broker and worker, per idle process, its transcript included.
    wakeups     of an idle broker and worker.
    help        `outlive --help`.

Always true
    What is compared is measured alternately, so that a machine that is busy for a while is busy for both.
    Each measurement has an OUTLIVE_HOME of its own, and what it started is gone afterwards.
    A number is what was measured: what cannot be measured here is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..common import kernel
from ..common.client import Host, Thread, connect
from ..common.config import Config
from ..common.errors import Interrupted, OutliveError
from ..common.launch import PROCESS, ROLE
from ..common.launch import THREAD as THREAD_NAME
from ..common.messages import Body, ExecCommand
from ..common.pump import PUMPS, Pumps

# Seconds that one measurement may take before it counts as broken.
DEADLINE = 300.0
# Seconds that what a measurement started may take to be gone.
GONE_WITHIN = 10.0
# Bytes that a flooding child prints without end, for measurements beside the flood.
ENDLESS = 1 << 50
# Bytes that the heavy process holds: a fork of it would cost 15 to 20 ms.
HEAVY = 500_000_000
# Seconds of silence before wake-ups are counted: the last call's echoes are work, not timers.
SETTLE = 2.0
TRUE = ["/bin/true"]
SLEEPER = ["/bin/sleep", "86400"]
ECHO = ["/bin/sh", "-c", "stty raw -echo; printf r; exec cat"]

# Both ends of a flood.  `flood BYTES GATE RESULT`: make the terminal raw, print one byte, wait until the GATE (a
# FIFO) is opened, print BYTES, append "START END" in nanoseconds to RESULT.  `read N BYTES GATE RESULT`: N floods,
# each on a terminal of its own, read to their ends; one byte is printed when all of them wait.
FLOOD_C = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static char block[65536];

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int flood(long long bytes, const char *gate, const char *result) {
    struct termios mode;
    tcgetattr(1, &mode);
    cfmakeraw(&mode);
    tcsetattr(1, TCSANOW, &mode);
    memset(block, 'x', sizeof block);
    if (write(1, "r", 1) != 1 || open(gate, O_RDONLY) < 0) return 1;
    long long start = now();
    while (bytes > 0) {
        ssize_t n = write(1, block, bytes < (long long)sizeof block ? (size_t)bytes : sizeof block);
        if (n < 0) return 1;
        bytes -= n;
    }
    char line[64];
    int length = snprintf(line, sizeof line, "%lld %lld\n", start, now());
    return write(open(result, O_WRONLY | O_APPEND | O_CREAT, 0600), line, length) != length;
}

int main(int argc, char **argv) {
    if (argc == 5) return flood(atoll(argv[2]), argv[3], argv[4]);
    int count = atoi(argv[2]), left = count, silent = count;
    struct pollfd *terminals = calloc(count, sizeof *terminals);
    char *seen = calloc(count, 1);
    for (int i = 0; i < count; i++) {
        if (forkpty(&terminals[i].fd, 0, 0, 0) == 0)
            execl(argv[0], argv[0], "flood", argv[3], argv[4], argv[5], (char *)0);
        terminals[i].events = POLLIN;
    }
    while (left > 0) {
        if (count > 1) poll(terminals, count, -1);
        for (int i = 0; i < count; i++) {
            if (terminals[i].fd < 0 || (count > 1 && !terminals[i].revents)) continue;
            if (read(terminals[i].fd, block, sizeof block) <= 0) {
                terminals[i].fd = -1;
                left--;
            } else if (!seen[i]) {
                seen[i] = 1;
                if (--silent == 0 && write(1, "r", 1) != 1) return 1;
            }
        }
    }
    return 0;
}
"""

# The same without a compiler; then the baseline is only as fast as Python's read().
FLOOD_PYTHON = r"""
import os, pty, select, sys, time, tty

def flood(left, gate, result):
    tty.setraw(1)
    block = b"x" * 65536
    os.write(1, b"r")
    os.open(gate, os.O_RDONLY)
    start = time.monotonic_ns()
    while left > 0:
        left -= os.write(1, block[:left])
    line = b"%d %d\n" % (start, time.monotonic_ns())
    os.write(os.open(result, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), line)

def read(count, arguments):
    terminals = {}
    poll = select.poll()
    for _ in range(count):
        pid, fd = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, sys.argv[0], "flood", *arguments])
        terminals[fd] = False
        poll.register(fd, select.POLLIN)
    left, silent = count, count
    while left:
        for fd, _ in poll.poll():
            try:
                data = os.read(fd, 65536)
            except OSError:
                data = b""
            if not data:
                poll.unregister(fd)
                left -= 1
            elif not terminals[fd]:
                terminals[fd] = True
                silent -= 1
                if not silent:
                    os.write(1, b"r")

if sys.argv[1] == "flood":
    flood(int(sys.argv[2]), *sys.argv[3:])
else:
    read(int(sys.argv[2]), sys.argv[3:])
"""

# For each line of input: spawn /bin/true, read to the end, wait; print the seconds.  In a process of its own,
# because a fork costs what the forking process weighs.
SPAWN_PYTHON = r"""
import sys, time
from ptyprocess import PtyProcess

for line in sys.stdin:
    start = time.perf_counter()
    child = PtyProcess.spawn(["/bin/true"])
    try:
        while True:
            child.read(65536)
    except EOFError:
        pass
    child.wait()
    print(time.perf_counter() - start, flush=True)
    child.delayafterclose = child.delayafterterminate = 0
    child.close()
"""


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


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@dataclass(slots=True)
class Bench:
    """What a measurement gets: how thorough to be, a folder of its own, and the programs."""

    quick: bool
    folder: Path
    flood: list[str] = field(default_factory=list)
    baseline: str = ""

    def repeat(self, full: int, quick: int) -> range:
        """Return how often to measure."""
        return range(quick if self.quick else full)

    def build(self, where: Path) -> None:
        """Compile what floods and reads, or fall back to Python."""
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler:
            source, program = where / "flood.c", where / "flood"
            source.write_text(FLOOD_C)
            built = subprocess.run([compiler, "-O2", "-o", program, source, "-lutil"], stderr=subprocess.PIPE)
            if built.returncode == 0:
                self.flood, self.baseline = [str(program)], "C reader"
                return
            say(f"{compiler} failed: {built.stderr.decode(errors='replace').strip()[:300]}")
        source = where / "flood.py"
        source.write_text(FLOOD_PYTHON)
        self.flood, self.baseline = [sys.executable, str(source)], "Python reader, no compiler found"


class Flood:
    """One flood of `count` children: the gate they wait at, and how long they took."""

    def __init__(self, bench: Bench, count: int, size: int) -> None:
        self.count = count
        self.folder = Path(tempfile.mkdtemp(dir=bench.folder))
        self._gate = self.folder / "gate"
        self._result = self.folder / "result"
        os.mkfifo(self._gate)
        self.arguments = [str(size), str(self._gate), str(self._result)]
        self.child = [*bench.flood, "flood", *self.arguments]
        self.reader = [*bench.flood, "read", str(count), *self.arguments]
        self._open = -1

    def let_go(self) -> None:
        """Open the gate."""
        self._open = os.open(self._gate, os.O_WRONLY)

    def seconds(self) -> float:
        """Return the time from the first byte of the first child to the last byte of the last one."""
        times = [[int(word) for word in line.split()] for line in self._result.read_text().splitlines()]
        if len(times) != self.count:
            raise RuntimeError(f"{len(times)} of {self.count} floods reported their end")
        return (max(end for _, end in times) - min(start for start, _ in times)) / 1e9

    def close(self) -> None:
        """Close the gate."""
        if self._open >= 0:
            os.close(self._open)

    def run_baseline(self) -> float:
        """Let the bare reader drain it, and return the seconds."""
        with subprocess.Popen(self.reader, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.read(1)
            self.let_go()
            process.wait(DEADLINE)
        self.close()
        return self.seconds()


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


async def drain(bench: Bench) -> list[Row]:
    """Drain of one and of 16 flooding children, attached and detached."""
    rows: list[Row] = []
    total = (64 if bench.quick else 128) << 20
    for count in (1, 16):
        bare: list[float] = []
        ours: dict[str, list[float]] = {"attached": [], "detached": []}
        async with connect() as host:
            for turn in bench.repeat(7, 3):
                bare.append(Flood(bench, count, total // count).run_baseline())
                for mode, seconds in ours.items():
                    seconds.append(await _drained(bench, host, f"{mode}-{count}-{turn}", count, total, mode))
        for mode, seconds in ours.items():
            rates = [total / 1e6 / one for one in seconds]
            # The share of each pair, so that a slow moment of the machine counts on both sides.
            shares = [base / own for base, own in zip(bare, seconds, strict=True)]
            share = statistics.median(shares)
            wanted = count == 1
            rows.append(
                Row(
                    name=f"drain {count} {mode}",
                    value=statistics.median(rates),
                    unit="MB/s",
                    low=min(rates),
                    high=max(rates),
                    baseline=statistics.median(total / 1e6 / one for one in bare),
                    ratio=share,
                    target="ratio ≥ 0.9" if wanted else "",
                    holds=share >= 0.9 if wanted else None,
                    note=f"{bench.baseline}; ratios {min(shares):.2f}–{max(shares):.2f}",
                )
            )
    return rows


async def _drained(bench: Bench, host: Host, name: str, count: int, total: int, mode: str) -> float:
    flood = Flood(bench, count, total // count)
    thread = await host.thread(name)
    ids = await start_all(thread, flood.child, count)
    await first_output(thread, ids)
    if mode == "detached":
        await thread.detach()
    flood.let_go()
    outcomes = await asyncio.gather(*(thread.wait(one) for one in ids))
    flood.close()
    if any(outcome.exit_code != 0 for outcome in outcomes):
        raise RuntimeError(f"{name}: the floods ended with {outcomes}")
    for one in await thread.processes(ended=True):
        if one.bytes_written != total // count + 1:
            raise RuntimeError(f"{name}: {one.bytes_written} bytes of {total // count + 1} arrived")
    await thread.shutdown(all=True)
    return flood.seconds()


async def control(bench: Bench) -> list[Row]:
    """`status` and `ps` while one child floods, attached and detached."""
    rows = []
    async with connect() as host:
        for mode in ("attached", "detached"):
            flood = Flood(bench, 1, ENDLESS)
            thread = await host.thread(mode)
            ids = await start_all(thread, flood.child, 1)
            await first_output(thread, ids)
            if mode == "detached":
                await thread.detach()
            flood.let_go()
            calls: dict[str, Callable[[], Awaitable[object]]] = {"status": host.status, "ps": host.processes}
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for _ in bench.repeat(1000, 200):
                for name, call in calls.items():
                    start = time.perf_counter()
                    await call()
                    taken[name].append((time.perf_counter() - start) * 1e3)
                await asyncio.sleep(0.001)  # a caller that never pauses measures only its own load
            await thread.kill(*ids, signal="KILL")
            await thread.shutdown(all=True)
            flood.close()
            for name, times in taken.items():
                slow = percentile(times, 0.99)
                rows.append(
                    Row(
                        name=f"{name} under flood, {mode}, p99",
                        value=slow,
                        unit="ms",
                        low=min(times),
                        high=max(times),
                        target="< 10 ms",
                        holds=slow < 10,
                        note=f"p50 {statistics.median(times):.2f} ms, {len(times)} calls",
                    )
                )
    return rows


async def exec_true(bench: Bench) -> list[Row]:
    """`exec_command` of /bin/true over a bare ptyprocess spawn; and how much 500 MB add to it."""
    kinds: dict[str, list[float]] = {"terminal": [], "pipes": []}
    bare: list[float] = []
    with bare_spawner() as spawn:
        async with connect() as host:
            thread = await host.thread("exec")
            await thread.exec_command(TRUE, tty=True)
            spawn()
            for _ in bench.repeat(100, 20):
                bare.append(spawn())
                for kind, times in kinds.items():
                    start = time.perf_counter()
                    await thread.exec_command(TRUE, tty=kind == "terminal")
                    times.append((time.perf_counter() - start) * 1e3)
    base = statistics.median(bare)
    rows = []
    for kind, times in kinds.items():
        over = [own - one for own, one in zip(times, bare, strict=True)]
        rows.append(
            row(
                f"exec /bin/true, {kind}, over bare spawn",
                over,
                "ms",
                baseline=base,
                ratio=base / statistics.median(times),
                target="≤ 2.5 ms",
                holds=lambda value: value <= 2.5,
                note=f"{statistics.median(times):.2f} ms in all; the baseline is the bare spawn",
            )
        )
    return [*rows, await _exec_heavy(bench)]


async def _exec_heavy(bench: Bench) -> Row:
    """Run a worker's `ProcessManager` here, where we can make the process heavy, and let it start commands."""
    from ..worker.nursery import Nursery
    from ..worker.processes import ProcessManager

    pumps = Pumps(asyncio.get_running_loop())
    nursery = Nursery()
    mode = "spliced" if kernel.can_splice_terminals() else "copied"
    manager = ProcessManager("heavy", 1, nursery, pumps, PUMPS[mode], _to_nobody, Config())
    light: list[float] = []
    heavy: list[float] = []
    spawners: list[int] = []
    try:
        await _time_manager(manager, 3)
        for _ in bench.repeat(4, 1):
            light += await _time_manager(manager, 15)
            ballast = bytearray(HEAVY)
            ballast[::4096] = b"x" * len(range(0, HEAVY, 4096))
            heavy += await _time_manager(manager, 15)
            del ballast
    finally:
        spawners = nursery.pids
        manager.close()
        nursery.close()
        pumps.close()
        for pid in spawners:
            with suppress(ChildProcessError):
                await asyncio.to_thread(os.waitpid, pid, 0)
    before = statistics.median(light)
    return row(
        "exec /bin/true, what 500 MB add",
        [one - before for one in heavy],
        "ms",
        baseline=before,
        ratio=before / statistics.median(heavy),
        target="≤ 1 ms",
        holds=lambda value: value <= 1,
        note="in a process of 500 MB; the baseline is without them",
    )


async def _time_manager(manager: object, count: int) -> list[float]:
    from ..worker.processes import ProcessManager

    assert isinstance(manager, ProcessManager)
    times = []
    for _ in range(count):
        call = ExecCommand(
            thread="heavy",
            cmd=[os.fsencode(word) for word in TRUE],
            workdir=b"/",
            environment=dict(os.environb),
            overrides={},
            call_id=os.urandom(8).hex(),
            shell=None,
            login=False,
            tty=True,
            columns=80,
            rows=24,
            yield_time_ms=10_000,
            max_output_tokens=100,
        )
        start = time.perf_counter()
        await manager.exec_command(call)
        times.append((time.perf_counter() - start) * 1e3)
        manager.settle()
    return times


def _to_nobody(body: Body) -> None:
    """Stand in for a broker that does not listen."""


@contextmanager
def bare_spawner() -> Iterator[Callable[[], float]]:
    """Give a function that lets a small process spawn /bin/true, and returns the milliseconds."""
    argv = [sys.executable, "-c", SPAWN_PYTHON]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def spawn() -> float:
            assert process.stdin
            assert process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline()) * 1e3

        try:
            yield spawn
        finally:
            process.kill()


@contextmanager
def bare_descriptors() -> Iterator[Callable[[], float]]:
    """Give a function that sends a descriptor to another process and back, and returns the milliseconds."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            ours.close()
            while True:
                data, fds, _, _ = socket.recv_fds(theirs, 16, 1)
                if not data:
                    break
                socket.send_fds(theirs, [data], fds)
                os.close(fds[0])
        os._exit(0)
    theirs.close()
    subject = os.open(os.devnull, os.O_RDONLY)

    def round_trip() -> float:
        start = time.perf_counter()
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [subject]))])
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
        taken = time.perf_counter() - start
        os.close(fds[0])
        return taken * 1e3

    try:
        yield round_trip
    finally:
        ours.close()
        os.close(subject)
        os.waitpid(pid, 0)


async def roundtrip(bench: Bench) -> list[Row]:
    """A byte typed into a raw `cat` until its echo is seen by the client."""
    times: list[float] = []
    bare: list[float] = []
    with bare_descriptors() as descriptor:  # forks: before there are threads
        async with connect() as host:
            thread = await host.thread("echo")
            (echo,) = await start_all(thread, ECHO, 1)
            await first_output(thread, [echo])
            offset = 1
            for _ in bench.repeat(40, 10):
                bare.append(descriptor())
                start = time.perf_counter()
                typing = asyncio.create_task(thread.write_stdin(echo, "x"))
                output = await thread.read_output(echo, offset, wait_ms=10_000)
                times.append((time.perf_counter() - start) * 1e3)
                offset = output.next_offset
                await typing
    base = statistics.median(bare)
    return [
        row(
            "write_stdin to its echo",
            times,
            "ms",
            baseline=base,
            ratio=base / statistics.median(times),
            note="the baseline is one descriptor sent to and fro",
        )
    ]


async def handoff(bench: Bench) -> list[Row]:
    """Detach and reattach of 1, 64 and 500 processes of one thread; its worker stays up."""
    rows = []
    with bare_descriptors() as descriptor:
        bare = statistics.median(descriptor() for _ in range(200))
        async with connect() as host:
            for count in (1, 64, 500):
                thread = await host.thread(f"many-{count}")
                await start_all(thread, SLEEPER, count)
                detached: list[float] = []
                reattached: list[float] = []
                for _ in bench.repeat(9, 3):
                    start = time.perf_counter()
                    given = await thread.detach(keep_worker=True)
                    between = time.perf_counter()
                    taken = await thread.reattach()
                    detached.append((between - start) * 1e3)
                    reattached.append((time.perf_counter() - between) * 1e3)
                    if (given.process_count, taken.reattached_count) != (count, count):
                        raise RuntimeError(f"of {count} processes {given} were detached and {taken} came back")
                for name, times in (("detach", detached), ("reattach", reattached)):
                    wanted = name == "reattach" and count == 500
                    rows.append(
                        row(
                            f"{name} {count}",
                            times,
                            "ms",
                            baseline=bare * count,
                            ratio=bare * count / statistics.median(times),
                            target="< 150 ms" if wanted else "",
                            holds=(lambda value: value < 150) if wanted else None,
                            note="the baseline is as many single descriptors sent to and fro",
                        )
                    )
                await thread.shutdown(all=True)
    return rows


async def crash(bench: Bench) -> list[Row]:
    """`kill -9` of a worker until its successor is up, and until a call is answered."""
    up: list[float] = []
    ran: list[float] = []
    echoed: list[float] = []
    async with connect() as host:
        thread = await host.thread("crash")
        (echo,) = await start_all(thread, ECHO, 1)
        await first_output(thread, [echo])
        offset = 1
        events = host.events()
        # The subscription works once the first event has come.
        listening = asyncio.ensure_future(anext(events))
        while not listening.done():
            await thread.exec_command(TRUE)
        for turn in bench.repeat(20, 6):
            (before,) = [one for one in await host.threads() if one.thread == "crash"]
            assert before.worker_pid is not None
            registered = asyncio.create_task(_worker_up(events, before.epoch))
            start = time.perf_counter()
            os.kill(before.worker_pid, signal.SIGKILL)
            if turn % 2:
                await thread.exec_command(TRUE, tty=True)
                ran.append((time.perf_counter() - start) * 1e3)
            else:
                typing = asyncio.create_task(_type(thread, echo))
                output = await thread.read_output(echo, offset, wait_ms=30_000)
                echoed.append((time.perf_counter() - start) * 1e3)
                await typing
                # Input that was typed again has more than one echo.
                offset = (await thread.read_output(echo, output.next_offset)).written
            up.append((await registered - start) * 1e3)
        await events.aclose()  # type: ignore[attr-defined]
    soon = "< 500 ms"
    return [
        row("kill -9 of a worker to the next one up", up, "ms"),
        row("kill -9 to exec /bin/true answered", ran, "ms", target=soon, holds=lambda value: value < 500),
        row("kill -9 to typed input echoed", echoed, "ms", target=soon, holds=lambda value: value < 500),
    ]


async def _worker_up(events: object, epoch: int) -> float:
    async for event in events:  # type: ignore[attr-defined]
        if event["event"] == "worker" and event["what"] == "up" and event["epoch"] > epoch:
            break
    return time.perf_counter()


async def _type(thread: Thread, process_id: str) -> None:
    """Type one byte, again if the worker died while it typed: this child cannot tell, and does not mind."""
    while True:
        try:
            await thread.write_stdin(process_id, "x")
        except Interrupted:
            continue
        return


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


async def help_text(bench: Bench) -> list[Row]:
    """`outlive --help`: the best of ten, against an empty Python."""
    if importlib.util.find_spec("outlive.scripts.cli") is None:
        return [Row(name="outlive --help", target="< 100 ms", note="skipped: the command line is not there yet")]
    program = Path(sys.executable).with_name("outlive")
    if not program.exists():
        return [Row(name="outlive --help", target="< 100 ms", note=f"skipped: {program} is not installed")]
    times: dict[str, list[float]] = {"bare": [], "help": []}
    for _ in range(10):
        for name, argv in (("bare", [sys.executable, "-c", ""]), ("help", [str(program), "--help"])):
            start = time.perf_counter()
            subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)  # noqa: ASYNC221 - nothing else runs
            times[name].append((time.perf_counter() - start) * 1e3)
    best, bare = min(times["help"]), min(times["bare"])
    return [
        Row(
            name="outlive --help, best of 10",
            value=best,
            unit="ms",
            low=best,
            high=max(times["help"]),
            baseline=bare,
            ratio=bare / best,
            target="< 100 ms",
            holds=best < 100,
            note="the baseline is a Python that does nothing",
        )
    ]


MEASUREMENTS: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "drain": drain,
    "control": control,
    "exec": exec_true,
    "roundtrip": roundtrip,
    "handoff": handoff,
    "crash": crash,
    "memory": memory,
    "wakeups": wakeups,
    "help": help_text,
}


@contextmanager
def own_home() -> Iterator[Path]:
    """Set OUTLIVE_HOME to a new folder; afterwards nothing that runs there is left."""
    before = dict(os.environ)
    for name in [THREAD_NAME.decode(), PROCESS.decode(), "OUTLIVE_MARK"]:
        os.environ.pop(name, None)  # we may run inside a process of outlive
    folder = Path(tempfile.mkdtemp(prefix="outlive-bench-"))
    os.environ["OUTLIVE_HOME"] = str(folder)
    (folder / "config.toml").write_text("max_processes = 1000\nwarn_at = 1000\n")
    try:
        yield folder
    finally:
        try:
            asyncio.run(_down())
        finally:
            deadline = time.monotonic() + GONE_WITHIN
            while left := residents(folder):
                if time.monotonic() > deadline:
                    for pid in left:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            os.environ.clear()
            os.environ.update(before)
            shutil.rmtree(folder, ignore_errors=True)


async def _down() -> None:
    with suppress(OutliveError, TimeoutError):
        async with asyncio.timeout(60), connect(start=False) as host:
            await host.down(force=True)


def residents(home: Path) -> list[int]:
    """Return the processes that live in a home, by their environment."""
    wanted = b"OUTLIVE_HOME=" + os.fsencode(home)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def measure(name: str, quick: bool) -> list[Row]:
    """Run one measurement in a home of its own."""
    with own_home() as home, tempfile.TemporaryDirectory(prefix="outlive-bench-") as tools:
        bench = Bench(quick, home)
        bench.build(Path(tools))

        async def run() -> list[Row]:
            async with asyncio.timeout(DEADLINE):
                return await MEASUREMENTS[name](bench)

        return asyncio.run(run())


def say(text: str) -> None:
    """Tell how far we are; standard output is for the result."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    """Print the result for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="outlive, against baselines of the same run", title_justify="left")
    for heading in ("measurement", "median", "spread", "baseline", "ratio", "target", "holds", "note"):
        table.add_column(
            heading, justify="right" if heading in ("median", "spread", "baseline", "ratio") else "left"
        )
    for one in rows:
        spread = "" if one.low is None or one.high is None else f"{_short(one.low)}–{_short(one.high)}"
        table.add_row(
            one.name,
            "–" if one.value is None else f"{_short(one.value)} {one.unit}",
            spread,
            "" if one.baseline is None else _short(one.baseline),
            "" if one.ratio is None else f"{one.ratio:.2f}",
            one.target,
            {True: "yes", False: "[bold red]NO[/]", None: ""}[one.holds],
            one.note,
        )
    console = Console()
    # A table that is cut at 80 columns says nothing; a file takes any width.
    Console(width=None if console.is_terminal else 200).print(table)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def main() -> int:
    """Measure, print; the exit status tells only whether everything could be measured."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Speed and memory of outlive, as ratios against baselines measured in the same run.",
        epilog="\n".join(f"{name:<10}  {(what.__doc__ or '').strip()}" for name, what in MEASUREMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one list of objects instead of a table")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions: about two minutes, and rougher numbers"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MEASUREMENTS, help="measure only these")
    options = parser.parse_args()
    rows: list[Row] = []
    broken = 0
    for name in options.only or MEASUREMENTS:
        say(f"{name} …")
        start = time.monotonic()
        try:
            rows += measure(name, options.quick)
        except (OutliveError, OSError, RuntimeError, TimeoutError) as error:
            broken += 1
            rows.append(Row(name=name, note=f"could not be measured: {error!r}"))
        say(f"{name}: {time.monotonic() - start:.1f} s")
    if options.json:
        print(json.dumps([asdict(one) for one in rows], indent=2))
    else:
        print_table(rows)
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
