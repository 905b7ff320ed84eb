"""How long a caller waits: for a start, an echo, a handoff, a worker after a crash, a help text, a door.

Always true
    The caller is a client of the broker, as an agent is.  One exception: what a worker's memory adds to a start is
    measured with a `ProcessManager` in this process, since only our own memory can be filled at will.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common import kernel
from ..common.client import Thread, connect
from ..common.config import Config
from ..common.messages import Body, ExecCommand
from ..common.pump import PUMPS, Pumps
from .baselines import bare_descriptors, bare_spawner
from .measurement import ECHO, SLEEPER, TRUE, Bench, Row, first_output, row, start_all

# Bytes that the heavy process holds: a fork of it would cost 15 to 20 ms.
HEAVY = 500_000_000


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
                typing = asyncio.create_task(thread.write_stdin(echo, "x"))
                await _printed(thread, echo, offset)
                echoed.append((time.perf_counter() - start) * 1e3)
                await typing
                offset += 1
            up.append((await registered - start) * 1e3)
        await events.aclose()  # type: ignore[attr-defined]
    soon = "< 500 ms"
    return [
        row("kill -9 of a worker to the next one up", up, "ms"),
        row("kill -9 to exec /bin/true answered", ran, "ms", target=soon, holds=lambda value: value < 500),
        row("kill -9 to typed input echoed", echoed, "ms", target=soon, holds=lambda value: value < 500),
    ]


async def _printed(thread: Thread, process_id: str, offset: int) -> None:
    """Wait for output after `offset`; who waits for it is answered early when the process changes hands."""
    while (await thread.read_output(process_id, offset, wait_ms=30_000)).written <= offset:
        pass


async def broker_crash(bench: Bench) -> list[Row]:
    """`kill -9` of the broker until a call is answered; and an upgrade, as a caller feels it."""
    times: dict[str, list[float]] = {"status": [], "exec /bin/true": [], "typed input echoed": []}
    upgrades: list[float] = []
    async with connect() as host:
        thread = await host.thread("crash")
        (echo,) = await start_all(thread, ECHO, 1)
        await first_output(thread, [echo])
        for _ in bench.repeat(12, 3):
            for what, taken in times.items():
                broker: int = (await host.status())["broker_pid"]
                offset = (await thread.read_output(echo, 0)).written
                start = time.perf_counter()
                os.kill(broker, signal.SIGKILL)
                if what == "status":
                    await host.status()
                elif what == "exec /bin/true":
                    await thread.exec_command(TRUE)
                else:
                    typing = asyncio.create_task(thread.write_stdin(echo, "x"))
                    await _printed(thread, echo, offset)
                taken.append((time.perf_counter() - start) * 1e3)
                if what == "typed input echoed":
                    await typing
        for _ in bench.repeat(6, 2):
            upgrading = asyncio.create_task(host.upgrade())
            longest = 0.0
            while not upgrading.done():
                start = time.perf_counter()
                await thread.exec_command(TRUE)
                longest = max(longest, (time.perf_counter() - start) * 1e3)
            await upgrading
            upgrades.append(longest)
    return [
        *(
            row(
                f"kill -9 of the broker to {what}",
                taken,
                "ms",
                target="< 500 ms",
                holds=lambda value: value < 500,
            )
            for what, taken in times.items()
        ),
        row("slowest exec /bin/true beside an upgrade", upgrades, "ms"),
    ]


async def _worker_up(events: AsyncIterator[dict[str, Any]], epoch: int) -> float:
    async for event in events:
        if event["event"] == "worker" and event["what"] == "up" and event["epoch"] > epoch:
            break
    return time.perf_counter()


# Waits at a gate, says when it ended, ends.
ENDS = """
import os, sys, time
open(sys.argv[1]).readline()
open(sys.argv[2], "w").write(str(time.monotonic_ns()))
os._exit(3)
"""
# A program whose first line says when it was run.
WOKEN = """
import time

async def main(session, wake):
    now = time.monotonic_ns()
    with open(wake.reason, "a") as file:
        print(now, *(match.process_id for match in wake.matches), file=file, flush=True)
"""


async def wake(bench: Bench) -> list[Row]:
    """A process's end to the first line of its thread's program, which is asleep."""
    times: list[float] = []
    bare: list[float] = []
    gate, ended, woken = bench.folder / "gate", bench.folder / "ended", bench.folder / "wake"
    os.mkfifo(gate)
    (bench.folder / "woken.py").write_text(WOKEN)
    argv = [sys.executable, "-I", "-S", "-c", ENDS, str(gate), str(ended)]
    async with connect() as host:
        thread = await host.thread("wake")
        await thread.start("woken.py:main", workdir=bench.folder)
        with gate.open("r+b", buffering=0) as opened:
            for _ in bench.repeat(15, 4):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", ""], check=True)  # noqa: ASYNC221 - nothing else runs
                bare.append((time.perf_counter() - start) * 1e3)
                process = await thread.exec_command(argv, wake_on=["exit"], yield_time_ms=250)
                await thread.detach()
                opened.write(b"go\n")
                while not (line := _line_about(woken, process.process_id)):
                    await asyncio.sleep(0.02)
                times.append((int(line[0]) - int(ended.read_text())) / 1e6)
                await _asleep(thread)
    base = statistics.median(bare)
    return [
        row(
            "end of a process to its program's first line",
            times,
            "ms",
            baseline=base,
            ratio=base / statistics.median(times),
            target="< 400 ms",
            holds=lambda value: value < 400,
            note="no worker was up; the baseline is a Python that does nothing",
        )
    ]


def _line_about(file: Path, process_id: str) -> list[str]:
    """Return the words of the whole line that names a process, or none."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return next((words for line in lines if process_id in (words := line.split()) and line.endswith("\n")), [])


async def _asleep(thread: Thread) -> None:
    """Wait until a thread has gone to bed."""
    while any(row.worker_pid for row in await thread.host.threads() if row.thread == thread.thread_id):
        await asyncio.sleep(0.01)


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


async def doors(bench: Bench) -> list[Row]:
    """`outlive mcp` from its start to its first answer, against an empty Python."""
    program = Path(sys.executable).with_name("outlive")
    if not program.exists() or importlib.util.find_spec("mcp") is None:
        return [Row(name="outlive mcp, ready", target="< 1500 ms", note="skipped: outlive[mcp] is not installed")]
    client = {"name": "bench", "version": "0"}
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
    asked = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}).encode() + b"\n"
    ready: list[float] = []
    bare: list[float] = []
    for _ in bench.repeat(20, 5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", ""], check=True)  # noqa: ASYNC221 - nothing else runs
        between = time.perf_counter()
        with subprocess.Popen([program, "mcp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bridge:  # noqa: ASYNC220
            assert bridge.stdin is not None
            assert bridge.stdout is not None
            bridge.stdin.write(asked)
            bridge.stdin.flush()
            answer = json.loads(bridge.stdout.readline())
            ready.append((time.perf_counter() - between) * 1e3)
            bridge.stdin.close()
        bare.append((between - start) * 1e3)
        if answer["result"]["serverInfo"]["name"] != "outlive":
            raise RuntimeError(f"outlive mcp answered {answer}")
    best, base = min(ready), min(bare)
    return [
        Row(
            name="outlive mcp, from start to answer, best",
            value=best,
            unit="ms",
            low=best,
            high=max(ready),
            baseline=base,
            ratio=base / best,
            target="< 1500 ms",
            holds=best < 1500,
            note="the baseline is a Python that does nothing",
        )
    ]
