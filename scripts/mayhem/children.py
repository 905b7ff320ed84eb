"""What is run while others die: floods, short commands, a shell that counts, sleepers; and how each is verified.

    flood       numbered lines, so that the bytes at any offset are known; compared while it grows and at its end
    command     short, with known output and exit code; leaves a trace, so that a second run would show
    shell       counts its inputs, each of which is numbered; some are asked for twice, with the same write id
    sleepers    processes of a thread that sleeps; they end when a broker was just killed, and nobody held them
    handoffs    detach, resume, reattach, of a thread that all of this goes on in

Always true
    Each child's outcome, output and number of runs are known before it starts, and compared after its end.
    Every call is repeated until it is answered, with the same id.

Not here
    The flooding program: `flood`.  Who dies: `mischief`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

import outlive

from .. import flood
from .scene import Moment, Scene

# Lines in all, and at once, of a flooding child; and the longest pause between two bursts.
FLOOD_LINES = (100_000, 600_000)
BURSTS = (200, 1_000, 5_000)
PAUSES_MS = (2, 10, 30)
# Lines of a flood in a thread that sleeps: about two seconds.
DOZING_LINES = (50_000, 200_000)
# Sleepers at a time, and for how many seconds at most they wait for a broker's death.
SLEEPERS = 3
DOZE = 3.0
# Seconds from a broker's death to a sleeper's end, at most: before, while, and just after there is a next one.
UNHELD = 0.3
# Bytes from the end of a growing transcript that a look takes in.
LOOK = 128 << 10
# Signals by which a child may end itself; none that dumps core.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)

# Leave a trace, print, end.
COMMAND = 'echo run >>"$1"; printf %s "$2"; exit "$3"'
# Leave a trace, wait for a line on a named pipe, print, end; by a signal when there is a fourth word.
SLEEPER = 'echo run >>"$1"; read go <"$4"; printf %s "$2"; [ "$5" ] && kill -"$5" $$; exit "$3"'


def right_outcome(end: int) -> outlive.Outcome:
    """Return the outcome of a child told to end by exit code `end`, or by signal -`end`."""
    return outlive.Outcome("exited", code=end) if end >= 0 else outlive.Outcome("signaled", signal=-end)


@dataclass(slots=True)
class _Sleeper:
    """A process that waits to be woken, and how it will then end."""

    who: str
    process_id: str
    text: bytes
    end: int
    number: int
    # Where it listens.
    bed: int

    def wake(self) -> None:
        """Let it print and end."""
        os.write(self.bed, b"go\n")

    def close(self) -> None:
        os.close(self.bed)


class Children:
    """All that goes on in one broker, apart from the dying."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.tally = scene.tally
        self.random = scene.random
        self.until_done = scene.until_done
        self._traces = scene.folder / "runs"
        self._traces.mkdir(exist_ok=True)
        self._numbers = itertools.count(1)
        self._pids: dict[tuple[str, str], int | None] = {}

    # Floods.

    async def flooding(self, thread: outlive.Thread, slot: int) -> None:
        """Start one flooding child after the other."""
        while not self.scene.over.is_set():
            number = next(self._numbers)
            await self.scene.guarded(f"flood {number}", self._flood(thread, number, pipes=slot % 4 == 1))

    async def _flood(self, thread: outlive.Thread, number: int, *, pipes: bool, asleep: bool = False) -> None:
        """Run one; `asleep`: in a thread that nothing of this wakes."""
        tally, roll = self.tally, self.random
        tag = number & 0xFFFF
        count = roll.randrange(*(DOZING_LINES if asleep else FLOOD_LINES))
        end = -roll.choice(SIGNALS) if number % 5 == 0 else 1 + number % 250
        numbers = (tag, count, roll.choice(BURSTS), roll.choice(PAUSES_MS), end)
        argv = [sys.executable, "-I", "-S", flood.__file__, *map(str, numbers)]

        async def start() -> outlive.Response:
            self.scene.at(Moment.DEPOSIT, thread.thread_id)
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
                if (
                    turn % 4 == 0 and not asleep
                ):  # the same call again is the same process; and it moves what counts as delivered
                    again = (await self.until_done(start)).process_id
                    tally.count("commands_run_twice", again != process_id, f"{who}: again as {again}")
            outcome = await waiting
        finally:
            waiting.cancel()
        tally.children += 1
        tally.bytes_expected += count * flood.WIDTH
        self._check_outcome(who, outcome, end)
        if roll.random() < 0.5:
            await self._compare(thread, process_id, who, tag, count)
        reply = await self.until_done(thread.write_stdin, process_id, resume=not asleep)
        code = right_outcome(end).exit_code
        tally.count("outcomes_wrong", reply.exit_code != code, f"{who}: poll says {reply.exit_code}")
        await self._compare(thread, process_id, who, tag, count)  # from the archive

    async def _look(self, thread: outlive.Thread, process_id: str, who: str, tag: int) -> None:
        """Compare the end of a growing transcript, before it is punched out."""
        written = (await self.until_done(thread.read_output, process_id, 1 << 60)).written
        output = await self.until_done(thread.read_output, process_id, max(0, written - LOOK))
        for offset, data in output.pieces:
            self.tally.check_piece(who, tag, offset, data)

    async def _compare(self, thread: outlive.Thread, process_id: str, who: str, tag: int, count: int) -> None:
        """Compare all that is kept."""
        at = 0
        while True:
            output = await self.until_done(thread.read_output, process_id, at)
            for offset, data in output.pieces:
                self.tally.check_piece(who, tag, offset, data)
            at = output.next_offset
            if at >= output.written:
                break
        self.tally.check_output(who, count * flood.WIDTH, output.written)

    def _check_outcome(self, who: str, found: outlive.Outcome, end: int) -> None:
        right, lost = right_outcome(end), found.kind == "lost"
        self.tally.count("processes_lost", lost, f"{who}: {found.sentence()}")
        self.tally.count("outcomes_wrong", found != right and not lost, f"{who}: {found}, not {right}")

    def _check_runs(self, who: str, trace: str) -> None:
        path = self._traces / trace
        runs = path.read_text().count("run") if path.exists() else 0
        self.tally.count("commands_run_twice", max(0, runs - 1), f"{who}: ran {runs} times")
        self.tally.count("processes_lost", runs == 0, f"{who}: never ran, though it was answered")

    # Short commands.

    async def churning(self, thread: outlive.Thread) -> None:
        """Run short commands whose output, exit code and number of runs are known."""
        while not self.scene.over.is_set():
            number = next(self._numbers)
            await self.scene.guarded(f"command {number}", self._command(thread, number))
            await self.scene.pause(0.2)

    async def _command(self, thread: outlive.Thread, number: int) -> None:
        tally, roll = self.tally, self.random
        text = f"<{number}>" * roll.choice((1, 10, 500))
        code = 1 + number % 250
        argv = ["/bin/sh", "-c", COMMAND, "sh", str(self._traces / str(number)), text, str(code)]
        tty = roll.random() < 0.5
        call = f"command-{number}"
        self.scene.at(Moment.DEPOSIT, thread.thread_id)
        reply = await self.until_done(thread.exec_command, argv, tty=tty, call_id=call)
        who = f"command {number} ({thread.thread_id}/{reply.process_id}, {'tty' if tty else 'pipes'})"
        printed = reply.output
        for poll in itertools.count():
            if reply.session_id is None:
                break
            reply = await self.until_done(thread.write_stdin, reply.process_id, write_id=f"{call}-poll-{poll}")
            printed += reply.output
        tally.commands += 1
        tally.check_text(who, text.encode(), printed.encode())
        tally.count("outcomes_wrong", reply.exit_code != code, f"{who}: {reply.outcome}, not {code}")
        self._check_runs(who, str(number))

    # A shell.

    async def typing(self, thread: outlive.Thread) -> None:
        """Type into a shell that counts its inputs, then end it."""
        await self.scene.guarded(f"shell of {thread.thread_id}", self._shell(thread))

    async def _shell(self, thread: outlive.Thread) -> None:
        tally = self.tally
        argv = ["/bin/sh", "-c", "stty -echo; echo ready; exec /bin/sh -i 2>/dev/null"]
        reply = await self.until_done(thread.exec_command, argv, tty=True, yield_time_ms=250, call_id="shell")
        process_id = reply.process_id
        while b"ready" not in await self._shown(thread, process_id):
            await asyncio.sleep(0.02)
        who = f"shell ({thread.thread_id}/{process_id})"
        sure: set[int] = set()
        number = 0
        while not self.scene.over.is_set():
            number += 1
            resume = self.random.random() < 0.8
            text, write_id = f"n=$((n+1)); echo n=$n,{number}.\n", f"input-{number}"
            tally.inputs += 1
            # The second time as a caller does who died and does not know what he was answered.
            for again in range(1 + (self.random.random() < 0.2)):
                tally.inputs_asked_again += again
                self.scene.at(Moment.TYPING, thread.thread_id)
                reply = await self.until_done(
                    thread.write_stdin, process_id, text, resume=resume, write_id=write_id
                )
                tally.count("processes_lost", reply.session_id is None, f"{who}: ended, {reply.outcome}")
                if reply.session_id is None:
                    return
                short = reply.typed != len(text)
                tally.count("inputs_lost_or_repeated", short, f"{who}: {reply.typed} bytes of {text!r}")
            sure.add(number)
            await self.scene.pause(0.3)
        await self._farewell(thread, process_id, who)
        found = re.findall(rb"n=(\d+),(\d+)\.", await self._shown(thread, process_id))
        typed = [int(name) for _, name in found]
        repeated = len(typed) - len(set(typed))
        missing = sure - set(typed)
        tally.count("inputs_lost_or_repeated", repeated, f"{who}: typed more than once: {found[-20:]}")
        tally.count(
            "inputs_lost_or_repeated", len(missing), f"{who}: never typed: {sorted(missing)[:10]} of {number}"
        )
        tally.count("out_of_order", typed != sorted(typed), f"{who}: inputs out of order")
        kept = [int(n) for n, _ in found] == list(range(1, len(found) + 1))
        tally.count("processes_lost", not kept, f"{who}: it did not keep its count")

    async def _farewell(self, thread: outlive.Thread, process_id: str, who: str) -> None:
        """End the shell by its input; by now nobody kills workers any more, so that it is typed."""
        await self.until_done(thread.write_stdin, process_id, "exit 77\n")
        self._check_outcome(who, await self.until_done(thread.wait, process_id), 77)
        await self.until_done(thread.write_stdin, process_id)

    async def _shown(self, thread: outlive.Thread, process_id: str) -> bytes:
        return await self.until_done(thread.output, process_id)

    # Handoffs.

    async def moving(self, thread: outlive.Thread) -> None:
        """Detach, resume and reattach."""
        while not self.scene.over.is_set():
            await self.scene.pause(2.0)
            await self.scene.guarded(f"handoff of {thread.thread_id}", self._move(thread))

    async def _move(self, thread: outlive.Thread) -> None:
        keep = self.random.random() < 0.5
        self.scene.at(Moment.DETACH, thread.thread_id)
        await self.until_done(thread.detach, keep_worker=keep)
        await self.scene.pause(0.2)
        if keep:
            self.scene.at(Moment.REATTACH, thread.thread_id)
            with suppress(outlive.BadRequest):  # its worker has died meanwhile
                await self.until_done(thread.reattach)
        self.scene.at(Moment.RESUME, thread.thread_id)
        await self.until_done(thread.resume)
        self.tally.handoffs += 1

    # Sleepers.

    async def dozing(self, thread: outlive.Thread) -> None:
        """Start processes in a thread, send it to bed, and let them end when nobody holds them."""
        while not self.scene.over.is_set():
            number = next(self._numbers)
            await self.scene.guarded(f"sleepers {number}", self._doze(thread, number))

    async def _doze(self, thread: outlive.Thread, number: int) -> None:
        flooding = asyncio.create_task(
            self.scene.guarded(f"flood {number}", self._flood(thread, number, pipes=False, asleep=True))
        )
        sleepers: list[_Sleeper] = []
        try:
            for slot in range(SLEEPERS):
                sleepers.append(await self._fall_asleep(thread, tty=slot % 2 == 0))
            self.scene.at(Moment.DETACH, thread.thread_id)
            await self.until_done(thread.detach)
            unheld = await self._broker_killed()
            for sleeper in sleepers:
                await asyncio.sleep(self.random.uniform(0, UNHELD / SLEEPERS))
                sleeper.wake()
            for sleeper in sleepers:
                await self._woken(thread, sleeper)
                self.tally.ended_unheld += unheld
        finally:
            for sleeper in sleepers:
                sleeper.close()
            await flooding

    async def _broker_killed(self) -> bool:
        """Wait a while for a broker's death; tell whether there was one."""
        killed = asyncio.Event()
        self.scene.on_broker_killed.add(killed.set)
        waiting = {asyncio.create_task(killed.wait()), asyncio.create_task(self.scene.over.wait())}
        try:
            await asyncio.wait(waiting, timeout=self.random.uniform(0, DOZE), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.scene.on_broker_killed.remove(killed.set)
            for task in waiting:
                task.cancel()
        return killed.is_set()

    async def _fall_asleep(self, thread: outlive.Thread, *, tty: bool) -> _Sleeper:
        """Start a process that waits to be woken."""
        number = next(self._numbers)
        end = -self.random.choice(SIGNALS) if number % 3 == 0 else 1 + number % 250
        text = f"<{number}>" * self.random.choice((1, 10, 500))
        trace, bed = self._traces / str(number), self._traces / f"{number}.bed"
        os.mkfifo(bed)
        # For reading too, so that opening it waits for nobody, here or there.
        fd = os.open(bed, os.O_RDWR | os.O_CLOEXEC)
        try:
            by_signal = str(-end) if end < 0 else ""
            words = (str(trace), text, str(max(0, end)), str(bed), by_signal)
            self.scene.at(Moment.DEPOSIT, thread.thread_id)
            reply = await self.until_done(
                thread.exec_command,
                ["/bin/sh", "-c", SLEEPER, "sh", *words],
                tty=tty,
                yield_time_ms=250,
                call_id=f"sleeper-{number}",
            )
        except BaseException:
            os.close(fd)
            raise
        who = f"sleeper {number} ({thread.thread_id}/{reply.process_id}, {'tty' if tty else 'pipes'})"
        return _Sleeper(who, reply.process_id, text.encode(), end, number, fd)

    async def _woken(self, thread: outlive.Thread, sleeper: _Sleeper) -> None:
        """Compare a sleeper's end with what it should be."""
        outcome = await self.until_done(thread.wait, sleeper.process_id)
        self._check_outcome(sleeper.who, outcome, sleeper.end)
        self.tally.check_text(sleeper.who, sleeper.text, await self._shown(thread, sleeper.process_id))
        resume = self.random.random() < 0.5
        reply = await self.until_done(thread.write_stdin, sleeper.process_id, resume=resume)
        code = right_outcome(sleeper.end).exit_code
        self.tally.count("outcomes_wrong", reply.exit_code != code, f"{sleeper.who}: poll says {reply.exit_code}")
        self._check_runs(sleeper.who, str(sleeper.number))

    # Accounts.

    async def auditing(self) -> None:
        """See that no process becomes another one."""
        while not self.scene.over.is_set():
            for row in await self.until_done(self.scene.host.processes):
                key = row.thread, row.process_id
                pid = self._pids.setdefault(key, row.pid) or row.pid
                self._pids[key] = pid
                self.tally.count("processes_lost", row.pid != pid, f"{key}: pid {pid} became {row.pid}")
            await self.scene.pause(1.0)
