"""Random deaths under flood: what was lost must be nothing.

    scripts/chaos worker --kills 2000 --children 4

Threads whose workers are killed with SIGKILL at random moments: while they start, take their processes back,
start commands, type, detach and reattach.  Meanwhile in each thread children flood numbered lines (`flood`), short
commands come and go, and somebody types into a shell that counts.  In the end every byte, outcome, process id and
descriptor is accounted for, and the exit status says whether all was right.

A check that cannot fail proves nothing.  `--copied` forces the fallback pump, which holds bytes in its hands,
under a killer of real-time priority on a core of its own; it succeeds when it has *seen* a loss.  Without the
rights for that the check is void, and it exits with 77.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

import outlive
from outlive.common import kernel

from . import flood, home

T = TypeVar("T")
P = ParamSpec("P")

VOID = 77
# Seconds that one call may take, repeated as often as it has to be; then it counts as failed.
PATIENCE = 60.0
# Seconds that everything under way may take once the killing is over.
WIND_UP = 120.0
# Seconds until the broker must have closed what the last process left it.
SETTLED_WITHIN = 10.0
# Lines in all, and at once, of a flooding child; and the longest pause between two bursts.
FLOOD_LINES = (100_000, 600_000)
BURSTS = (200, 1_000, 5_000)
PAUSES_MS = (2, 10, 30)
# Bytes from the end of a growing transcript that a look takes in.
LOOK = 128 << 10
# Signals by which a child may end itself; none that dumps core.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
# Complaints kept as evidence.
EVIDENCE = 40
# Deaths in a row before a worker is up that are mere chance: with each the broker waits longer before the next.
HASTY_MAX = 2
# How often a thread comes under siege, and for how many kills: then it is given up, until the next call.
SIEGE = 0.01
SIEGE_KILLS = 6
# Seconds between two looks for the next worker to kill.
_WATCH = 0.002
# Rounds in which the copying pump must be seen to lose something, and kills in each.
COPIED_ROUNDS = 10
COPIED_KILLS = 30


@dataclass
class Toll:
    """What happened, then what must be zero."""

    kills: int = 0
    kills_before_up: int = 0
    kills_per_second: float = 0.0
    seconds: float = 0.0
    children: int = 0
    commands: int = 0
    inputs: int = 0
    inputs_interrupted: int = 0
    handoffs: int = 0
    bytes_expected: int = 0
    bytes_compared: int = 0
    lost: int = 0
    repeated: int = 0
    out_of_order: int = 0
    processes_lost: int = 0
    outcomes_wrong: int = 0
    descriptors_leaked: int = 0
    commands_run_twice: int = 0
    inputs_lost_or_repeated: int = 0
    calls_failed: int = 0
    left_running: int = 0
    evidence: list[str] = field(default_factory=list)

    ZEROS = (
        "lost",
        "repeated",
        "out_of_order",
        "processes_lost",
        "outcomes_wrong",
        "descriptors_leaked",
        "commands_run_twice",
        "inputs_lost_or_repeated",
        "calls_failed",
        "left_running",
    )

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return not any(getattr(self, name) for name in self.ZEROS)

    def count(self, name: str, amount: int, why: str) -> None:
        """Count something that must not happen, if it did, and keep the evidence."""
        if amount:
            setattr(self, name, getattr(self, name) + amount)
            if len(self.evidence) < EVIDENCE:
                self.evidence.append(f"{name} +{amount}: {why}")

    def check_output(self, who: str, expected: int, written: int) -> None:
        """Compare how much a child printed with how much it should have."""
        self.count("lost", max(0, expected - written), f"{who}: {written} bytes of {expected}")
        self.count("repeated", max(0, written - expected), f"{who}: {written} bytes of {expected}")

    def check_piece(self, who: str, tag: int, offset: int, data: bytes) -> None:
        """Compare a piece of a transcript with what the child printed there."""
        self.bytes_compared += len(data)
        if wrong := flood.misplaced(tag, offset, data):
            # A loss or a repetition shifts what follows; only its size tells how much was lost.
            wrong = flood.disordered(tag, data) or wrong
            self.count("out_of_order", wrong, f"{who}: at offset {offset} of {len(data)} bytes")


class Mayhem:
    """One run: everything that goes on at once in one broker."""

    def __init__(self, host: outlive.Host, folder: Path, toll: Toll, seed: int | None, children: int) -> None:
        self.host = host
        self.toll = toll
        self.random = random.Random(seed)
        self.children = children
        self.over = asyncio.Event()
        self._folder = folder / "runs"
        self._numbers = itertools.count(1)
        # Thread → the epoch of the last worker that came up.
        self._up: dict[str, int] = {}
        self._pids: dict[tuple[str, str], int | None] = {}

    async def until_done(self, call: Callable[P, Awaitable[T]], *arguments: P.args, **options: P.kwargs) -> T:
        """Repeat a call that is safe to repeat until there is a worker for it; raises what else goes wrong."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await call(*arguments, **options)
            except outlive.Unavailable:
                if time.monotonic() > deadline:
                    raise

    async def guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run one of the parts; what it does not foresee is a failed call."""
        try:
            await work
        except outlive.UnknownProcess as error:
            self.toll.count("processes_lost", 1, f"{name}: {error}")
        except (outlive.OutliveError, TimeoutError) as error:
            rows = await self.host.threads()
            self.toll.count("calls_failed", 1, f"{name}: {error!r}; {rows}")

    async def pause(self, longest: float) -> None:
        """Wait for a random while, or until the killing is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), self.random.uniform(0, longest))

    # Flood.

    async def flooding(self, thread: outlive.Thread, slot: int) -> None:
        """Start one flooding child after the other."""
        while not self.over.is_set():
            number = next(self._numbers)
            await self.guarded(f"flood {number}", self._flood(thread, number, pipes=slot % 4 == 1))

    async def _flood(self, thread: outlive.Thread, number: int, *, pipes: bool) -> None:
        toll, roll = self.toll, self.random
        tag = number & 0xFFFF
        count = roll.randrange(*FLOOD_LINES)
        end = -roll.choice(SIGNALS) if number % 5 == 0 else 1 + number % 250
        numbers = (tag, count, roll.choice(BURSTS), roll.choice(PAUSES_MS), end)
        argv = [sys.executable, "-I", "-S", flood.__file__, *map(str, numbers)]

        async def start() -> outlive.Response:
            return await thread.exec_command(argv, tty=not pipes, yield_time_ms=250, call_id=f"flood-{number}")

        process_id = (await self.until_done(start)).process_id
        who = f"flood {number} ({thread.thread_id}/{process_id}, {'pipes' if pipes else 'tty'})"
        waiting = asyncio.create_task(self.until_done(thread.wait, process_id))
        try:
            for turn in itertools.count(1):
                done, _ = await asyncio.wait({waiting}, timeout=roll.uniform(0.1, 0.5))
                if done:
                    break
                await self._look(thread, process_id, who, tag)
                if turn % 4 == 0:  # the same call again is the same process; and it moves what counts as delivered
                    again = (await self.until_done(start)).process_id
                    toll.count("commands_run_twice", again != process_id, f"{who}: again as {again}")
            outcome = await waiting
        finally:
            waiting.cancel()
        toll.children += 1
        toll.bytes_expected += count * flood.WIDTH
        right = outlive.Outcome("exited", code=end) if end >= 0 else outlive.Outcome("signaled", signal=-end)
        toll.count("processes_lost", outcome.kind == "lost", f"{who}: {outcome.sentence()}")
        toll.count("outcomes_wrong", outcome != right and outcome.kind != "lost", f"{who}: {outcome}, not {right}")
        if roll.random() < 0.5:
            await self._compare(thread, process_id, who, tag, count)
        reply = await self.until_done(thread.write_stdin, process_id)
        toll.count("outcomes_wrong", reply.exit_code != right.exit_code, f"{who}: poll says {reply.exit_code}")
        await self._compare(thread, process_id, who, tag, count)  # from the journal

    async def _look(self, thread: outlive.Thread, process_id: str, who: str, tag: int) -> None:
        """Compare the end of a growing transcript, before it is punched out."""
        written = (await self.until_done(thread.read_output, process_id, 1 << 60)).written
        output = await self.until_done(thread.read_output, process_id, max(0, written - LOOK))
        for offset, data in output.pieces:
            self.toll.check_piece(who, tag, offset, data)

    async def _compare(self, thread: outlive.Thread, process_id: str, who: str, tag: int, count: int) -> None:
        """Compare all that is kept."""
        at = 0
        while True:
            output = await self.until_done(thread.read_output, process_id, at)
            for offset, data in output.pieces:
                self.toll.check_piece(who, tag, offset, data)
            at = output.next_offset
            if at >= output.written:
                break
        self.toll.check_output(who, count * flood.WIDTH, output.written)

    # Short commands.

    async def churning(self, thread: outlive.Thread) -> None:
        """Run short commands whose output, exit code and number of runs are known."""
        self._folder.mkdir(exist_ok=True)
        while not self.over.is_set():
            number = next(self._numbers)
            await self.guarded(f"command {number}", self._command(thread, number))
            await self.pause(0.2)

    async def _command(self, thread: outlive.Thread, number: int) -> None:
        toll, roll = self.toll, self.random
        trace = self._folder / str(number)
        text = f"<{number}>" * roll.choice((1, 10, 500))
        code = 1 + number % 250
        script = 'echo run >>"$1"; printf %s "$2"; exit "$3"'
        argv = ["/bin/sh", "-c", script, "sh", str(trace), text, str(code)]
        tty = roll.random() < 0.5
        call = f"command-{number}"
        reply = await self.until_done(thread.exec_command, argv, tty=tty, call_id=call)
        who = f"command {number} ({thread.thread_id}/{reply.process_id}, {'tty' if tty else 'pipes'})"
        printed = reply.output
        while reply.session_id is not None:
            reply = await self.until_done(thread.write_stdin, reply.process_id)
            printed += reply.output
        toll.commands += 1
        toll.bytes_expected += len(text)
        toll.bytes_compared += len(printed)
        toll.count("lost", max(0, len(text) - len(printed)), f"{who}: {len(printed)} of {len(text)} delivered")
        toll.count("repeated", max(0, len(printed) - len(text)), f"{who}: {len(printed)} of {len(text)} delivered")
        if len(text) == len(printed):
            toll.count("out_of_order", len(text) * (printed != text), f"{who}: other output")
        toll.count("outcomes_wrong", reply.exit_code != code, f"{who}: {reply.outcome}, not {code}")
        runs = trace.read_text().count("run") if trace.exists() else 0
        toll.count("commands_run_twice", max(0, runs - 1), f"{who}: ran {runs} times")
        toll.count("processes_lost", runs == 0, f"{who}: never ran, though it was answered")

    # A shell.

    async def typing(self, thread: outlive.Thread) -> None:
        """Type into a shell that counts its inputs, then end it."""
        await self.guarded(f"shell of {thread.thread_id}", self._shell(thread))

    async def _shell(self, thread: outlive.Thread) -> None:
        toll = self.toll
        argv = ["/bin/sh", "-c", "stty -echo; echo ready; exec /bin/sh -i 2>/dev/null"]
        reply = await self.until_done(thread.exec_command, argv, tty=True, yield_time_ms=250, call_id="shell")
        process_id = reply.process_id
        while b"ready" not in await self._shown(thread, process_id):
            await asyncio.sleep(0.02)
        who = f"shell ({thread.thread_id}/{process_id})"
        sure: set[int] = set()
        number = 0
        while not self.over.is_set():
            number += 1
            resume = self.random.random() < 0.8
            try:
                reply = await self.until_done(
                    thread.write_stdin, process_id, f"n=$((n+1)); echo n=$n,{number}.\n", resume=resume
                )
            except outlive.Interrupted:
                toll.inputs_interrupted += 1
                continue
            finally:
                toll.inputs += 1
            toll.count("processes_lost", reply.session_id is None, f"{who}: ended, {reply.outcome}")
            if reply.session_id is None:
                return
            sure.add(number)
            await self.pause(0.3)
        await self._farewell(thread, process_id, who)
        found = re.findall(rb"n=(\d+),(\d+)\.", await self._shown(thread, process_id))
        typed = [int(name) for _, name in found]
        repeated = len(typed) - len(set(typed))
        missing = sure - set(typed)
        toll.count("inputs_lost_or_repeated", repeated, f"{who}: typed more than once: {found[-20:]}")
        toll.count(
            "inputs_lost_or_repeated", len(missing), f"{who}: never typed: {sorted(missing)[:10]} of {number}"
        )
        toll.count("out_of_order", typed != sorted(typed), f"{who}: inputs out of order")
        kept = [int(n) for n, _ in found] == list(range(1, len(found) + 1))
        toll.count("processes_lost", not kept, f"{who}: it did not keep its count")

    async def _farewell(self, thread: outlive.Thread, process_id: str, who: str) -> None:
        """End the shell by its input; by now nobody kills workers any more, so that it is typed."""
        await self.until_done(thread.write_stdin, process_id, "exit 77\n")
        outcome = await self.until_done(thread.wait, process_id)
        right = outlive.Outcome("exited", code=77)
        self.toll.count("outcomes_wrong", outcome != right, f"{who}: {outcome}, not {right}")
        await self.until_done(thread.write_stdin, process_id)

    async def _shown(self, thread: outlive.Thread, process_id: str) -> bytes:
        return await self.until_done(thread.output, process_id)

    # Handoffs.

    async def moving(self, thread: outlive.Thread) -> None:
        """Detach, resume and reattach."""
        while not self.over.is_set():
            await self.pause(2.0)
            await self.guarded(f"handoff of {thread.thread_id}", self._move(thread))

    async def _move(self, thread: outlive.Thread) -> None:
        keep = self.random.random() < 0.5
        await self.until_done(thread.detach, keep_worker=keep)
        await self.pause(0.2)
        if keep:
            with suppress(outlive.BadRequest):  # its worker has died meanwhile
                await self.until_done(thread.reattach)
        await self.until_done(thread.resume)
        self.toll.handoffs += 1

    # Deaths.

    async def killing(self, thread: outlive.Thread, kills: int) -> None:
        """Kill the thread's workers until `kills` were killed in all threads."""
        note = self.host.paths.workers / thread.thread_id
        killed, hasty, siege = 0, 0, 0
        while not self.over.is_set():
            worker = _worker(note)
            if worker is None or worker["epoch"] == killed:
                await asyncio.sleep(_WATCH)
                continue
            kind = self.random.random()
            if not siege and kind < SIEGE:
                siege = SIEGE_KILLS
            if siege or (kind < 0.3 and hasty < HASTY_MAX):
                await asyncio.sleep(self.random.uniform(0, 0.03))
            elif kind < 0.4 and hasty < HASTY_MAX:
                await asyncio.sleep(self.random.uniform(0.03, 0.25))
            else:
                await self._until_up(thread, worker["epoch"], note)
                await asyncio.sleep(self.random.uniform(0, 0.05 if kind < 0.7 else 0.5))
            if self.toll.kills >= kills:
                self.over.set()
            if self.over.is_set():
                return
            killed = worker["epoch"]
            if _kill(worker["pid"], worker["start"]):
                early = self._up.get(thread.thread_id) != killed
                hasty, siege = hasty + 1 if early else 0, max(0, siege - 1)
                self.toll.kills += 1
                self.toll.kills_before_up += early

    async def _until_up(self, thread: outlive.Thread, epoch: int, note: Path) -> None:
        """Wait until a worker is up, or gone by itself."""
        while self._up.get(thread.thread_id) != epoch and not self.over.is_set():
            await asyncio.sleep(_WATCH)
            if (_worker(note) or {}).get("epoch") != epoch:
                return

    async def watching(self) -> None:
        """Note which workers are up."""
        async for event in self.host.events():
            if event["event"] == "worker" and event["what"] == "up":
                self._up[event["thread"]] = event["epoch"]

    # Accounts.

    async def auditing(self) -> None:
        """See that no process becomes another one."""
        while not self.over.is_set():
            for row in await self.until_done(self.host.processes):
                key = row.thread, row.process_id
                pid = self._pids.setdefault(key, row.pid) or row.pid
                self._pids[key] = pid
                self.toll.count("processes_lost", row.pid != pid, f"{key}: pid {pid} became {row.pid}")
            await self.pause(1.0)

    async def run(self, threads: int, kills: int, seconds: float, show: Callable[[int], None]) -> None:
        """Let everything go on until the killing is over, and then to its end; count what is left."""
        self.toll.evidence.clear()
        names = [f"t{number}" for number in range(threads)]
        all_threads = [await self.host.thread(name) for name in names]
        broker = (await self.host.status())["broker_pid"]
        before = await self._at_rest(all_threads, broker)
        began = time.monotonic()
        parts = {"audit": self.auditing()}
        for thread in all_threads:
            parts[f"kills in {thread.thread_id}"] = self.killing(thread, kills)
            parts[f"commands in {thread.thread_id}"] = self.churning(thread)
            parts[f"shell of {thread.thread_id}"] = self.typing(thread)
            parts[f"handoffs of {thread.thread_id}"] = self.moving(thread)
        for slot in range(self.children):
            parts[f"flood {slot}"] = self.flooding(all_threads[slot % threads], slot)
        watch = asyncio.create_task(self.watching())
        tasks = {asyncio.create_task(self.guarded(name, part), name=name) for name, part in parts.items()}
        try:
            while not self.over.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.over.wait(), 0.2)
                show(self.toll.kills)
                if time.monotonic() - began > seconds or any(task.done() and task.exception() for task in tasks):
                    self.over.set()
            self.toll.seconds = round(time.monotonic() - began, 1)
            self.toll.kills_per_second = round(self.toll.kills / self.toll.seconds, 2)
            done, late = await asyncio.wait(tasks, timeout=WIND_UP)
            for task in late:
                self.toll.count("calls_failed", 1, f"not finished {WIND_UP:.0f} s after the end: {task.get_name()}")
            for task in done:
                task.result()
        finally:
            for task in (watch, *tasks):
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)
        await self._account(all_threads, broker, before)

    async def _account(self, threads: list[outlive.Thread], broker: int, before: dict[str, int]) -> None:
        toll = self.toll
        for row in await self.host.processes(ended=False):
            toll.count("left_running", 1, f"{row.thread}/{row.process_id} {row.state}: {row.command}")
        now = (await self.host.status())["broker_pid"]
        toll.count("processes_lost", now != broker, f"broker {broker} became {now}")
        deadline = time.monotonic() + SETTLED_WITHIN
        while (after := await self._at_rest(threads, now)) != before and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        leaked = max(0, sum(after.values()) - sum(before.values()))
        toll.count("descriptors_leaked", leaked, f"broker: {before} became {after}")
        log = self.host.paths.log.read_text(errors="replace")
        for found in re.finditer(r"Traceback.*?\n(?=\S)[^\n]*", log, re.S):
            toll.count("calls_failed", 1, found.group()[-600:])

    async def _at_rest(self, threads: list[outlive.Thread], broker: int) -> dict[str, int]:
        """Put all threads to bed, having had a worker, and return the broker's descriptors by kind."""
        for thread in threads:
            await self.until_done(thread.resume)
            await self.until_done(thread.detach)
        kinds: dict[str, int] = {}
        for name in os.listdir(f"/proc/{broker}/fd"):
            with suppress(OSError):
                kind = re.sub(r"\d+", "N", os.readlink(f"/proc/{broker}/fd/{name}"))
                kinds[kind] = kinds.get(kind, 0) + 1
        return kinds


def _worker(path: Path) -> dict[str, Any] | None:
    """Return pid, start time and epoch of a thread's worker, as the broker notes them; cheaper than asking it."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or half written
        return None
    return facts if isinstance(facts, dict) else None


def _kill(pid: int, start: int) -> bool:
    """Kill a process unless it has gone; never a stranger with its number."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if kernel.is_dead(pid, start):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


async def worker_chaos(
    folder: Path, toll: Toll, *, kills: int, seconds: float, children: int, threads: int, seed: int | None
) -> int:
    """Run once, with a progress bar; return the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("kills", total=kills)
        try:
            async with outlive.connect() as host:
                mayhem = Mayhem(host, folder, toll, seed, children)
                await mayhem.run(threads, kills, seconds, lambda done: progress.update(bar, completed=done))
                await host.down(force=True)
        except BaseException:
            await home.emptied()
            raise
    left = await home.deserted(folder)
    toll.count("left_running", len(left), f"after the broker went down: {left}")
    return 0 if toll.clean else 1


class Copied:
    """The copying pump, several children that flood without a pause, and a killer who meets it at work."""

    def __init__(self, host: outlive.Host, toll: Toll, seed: int | None) -> None:
        self.host = host
        self.toll = toll
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
            self.toll.kills += 1
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
            self.toll.bytes_compared += len(data)
            if flood.misplaced(tag, offset, data):
                lost = flood.lost_until(tag, offset, data)
                self.toll.count("lost", lost, f"child {tag} of {thread.thread_id}, before offset {offset}")
                return True
        return False


async def copied_chaos(toll: Toll, *, children: int, seed: int | None) -> int:
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
            rounds = Copied(host, toll, seed)
            seen = False
            for number in range(COPIED_ROUNDS):
                if seen := await rounds.round(f"t{number}", children):
                    break
            await host.down(force=True)
            return 0 if seen else 1
    except BaseException:
        await home.emptied()
        raise


@click.group()
def main() -> None:
    """Kill what can be killed while outlive works, and look for losses."""


@main.command()
@click.option("--kills", default=100, show_default=True, help="Stop after so many kills,")
@click.option("--seconds", default=3600.0, show_default=True, help="or after so long; children are let finish.")
@click.option("--children", default=4, show_default=True, help="Children that flood at any time.")
@click.option("--threads", default=2, show_default=True, help="Threads that share them, each with its worker.")
@click.option("--copied", is_flag=True, help="See the copying pump lose something; 77: void without real time.")
@click.option("--seed", type=int, help="Make the choices repeatable; not the moments.")
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def worker(
    kills: int, seconds: float, children: int, threads: int, copied: bool, seed: int | None, as_json: bool
) -> None:
    """Kill workers."""
    toll = Toll()
    with home.temporary_home('pump = "copied"\n' if copied else "") as folder:
        if copied:
            status = home.run(copied_chaos(toll, children=children, seed=seed))
        else:
            run = worker_chaos(
                folder, toll, kills=kills, seconds=seconds, children=children, threads=threads, seed=seed
            )
            status = home.run(run)
    report(toll, as_json)
    raise SystemExit(status)


def report(toll: Toll, as_json: bool) -> None:
    """Print the counts on stdout and the evidence on stderr."""
    table = asdict(toll)
    evidence = table.pop("evidence")
    if as_json:
        print(json.dumps({**table, "evidence": evidence}))
    else:
        for name, value in table.items():
            print(f"{name.replace('_', ' '):26}{value:>14}")
    for line in evidence:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main(prog_name="scripts/chaos")
