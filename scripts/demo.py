"""What outlive is for, as a story on the terminal: two threads, five processes, and who is killed under them.

Every claim is checked by what can be seen from outside, and printed with what was seen; the first that fails
ends the story with exit status 1.  Nothing is left running, whatever happens.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import outlive

from . import home

# The build: so many numbered lines, in bursts, for about twelve seconds; slow enough to be read as it prints.
LINES = 600_000
BURSTS = 300
EXIT_CODE = 43
# A number of 15 digits, and the CR LF that a terminal makes of a newline.
WIDTH = 17
BUILD = f"""
import time
for burst in range({BURSTS}):
    step = range(burst * {LINES // BURSTS}, (burst + 1) * {LINES // BURSTS})
    print("".join(f"{{n:015d}}\\n" for n in step), end="", flush=True)
    time.sleep(0.04)
raise SystemExit({EXIT_CODE})
"""
# Seconds between two requests to the server.
POLL = 0.02
# Seconds in which what a claim waits for must happen.
PATIENCE = 20.0

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class ClaimFailed(Exception):
    """Something is not as it was promised."""


def paint(text: str, colour: int) -> str:
    """Return `text` in an ANSI colour, where colours are shown."""
    return f"\x1b[{colour}m{text}\x1b[0m" if COLOUR else text


def chapter(title: str) -> None:
    """Begin the next part of the story."""
    print(f"\n{paint(title, 1)}", flush=True)


def tell(text: str) -> None:
    """Say what is done."""
    print(f"  {text}", flush=True)


def claim(promise: str, holds: bool, seen: object) -> None:
    """Print a promise with what was seen; raises `ClaimFailed` when it does not hold."""
    print(f"  {paint('✓', 32) if holds else paint('✗', 31)} {promise}: {seen}", flush=True)
    if not holds:
        raise ClaimFailed(promise)


class Visitor:
    """Asks the server for a page again and again, and counts what it gets."""

    def __init__(self, port: int, page: bytes) -> None:
        self.port = port
        self.page = page
        self.answered = 0
        self.failures: list[str] = []
        self.longest = 0.0

    async def visit(self) -> None:
        """Ask once; raises `OSError` when nobody answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"GET /page.txt HTTP/1.0\r\n\r\n")
            answer = await reader.read()
        finally:
            writer.close()
        if not (answer.startswith(b"HTTP/1.0 200") and answer.endswith(self.page)):
            raise OSError(f"answered {answer[:40]!r}")

    async def stay(self) -> None:
        """Ask until cancelled."""
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.visit()
                self.answered += 1
            except (OSError, TimeoutError) as error:
                self.failures.append(repr(error))
            self.longest = max(self.longest, time.monotonic() - began)
            await asyncio.sleep(POLL)


class Reader:
    """Reads the build's transcript while it runs, and checks each line by its place: line n is at n × WIDTH."""

    def __init__(self, thread: outlive.Thread, process_id: str) -> None:
        self.thread = thread
        self.process_id = process_id
        self.read = 0
        self.passed_over = 0
        self.written = 0

    async def follow(self) -> None:
        """Read to the end; raises `ClaimFailed` at the first line out of place."""
        offset, ended = 0, False
        while not ended:
            output = await self.thread.read_output(self.process_id, offset, wait_ms=1000)
            for at, data in output.pieces:
                self._check(at, data)
            # Too slow a reader: later lines still stand in their places, so none of these can be missing.
            self.passed_over += sum(end - start for start, end in output.gaps)
            offset, ended, self.written = output.next_offset, output.ended, output.written

    def _check(self, at: int, data: bytes) -> None:
        first = at // WIDTH
        count = (at + len(data)) // WIDTH - first + 1
        lines = b"".join(b"%015d\r\n" % number for number in range(first, first + count))
        if lines[at - first * WIDTH :][: len(data)] != data:
            raise ClaimFailed(f"the lines from offset {at} on are not what the build printed there")
        self.read += len(data)


async def worker_of(thread: outlive.Thread) -> int | None:
    """Return the pid of a thread's worker."""
    return next(row.worker_pid for row in await thread.host.threads() if row.thread == thread.thread_id)


async def pids_of(host: outlive.Host) -> dict[str, int | None]:
    """Return the pid of every live process, by thread and id."""
    return {f"{row.thread}/{row.process_id}": row.pid for row in await host.processes()}


class Flood:
    """The build, and how much it had printed when that was last asked."""

    def __init__(self, thread: outlive.Thread, process_id: str) -> None:
        self.thread = thread
        self.process_id = process_id
        self.written = 0

    async def printed(self) -> int:
        """Wait until it has printed more than when this was last asked, and return how much."""
        deadline = time.monotonic() + PATIENCE
        before = self.written
        while self.written <= before and time.monotonic() < deadline:
            await asyncio.sleep(POLL)
            rows = await self.thread.processes()
            self.written = sum(row.bytes_written for row in rows if row.process_id == self.process_id)
        return self.written


async def ask(thread: outlive.Thread, process_id: str, line: str, *, resume: bool = True) -> str:
    """Type a line and return what was printed since the last call, on one line."""
    reply = await thread.write_stdin(process_id, f"{line}\n", yield_time_ms=400, resume=resume)
    return " ".join(reply.output.split())


async def kill_worker(thread: outlive.Thread) -> int:
    """Kill a thread's worker the hard way and return its pid."""
    pid = await worker_of(thread)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    tell(f"kill -9 {pid}, the worker of thread {thread.thread_id}")
    return pid


async def nobody_noticed(host: outlive.Host, pids: dict[str, int | None], flood: Flood) -> None:
    """Claim that every child is the process it was, and that the build prints on."""
    now = await pids_of(host)
    same = {name: pid for name, pid in pids.items() if name in now}
    claim("every child is the process it was", len(now) == 4 and now == same, f"pids {[*now.values()]}")
    written, later = await flood.printed(), await flood.printed()
    claim("the build prints on", 0 < written < later, f"{written} bytes, then {later}")


@asynccontextmanager
async def in_background(visitor: Visitor, reader: Reader) -> AsyncIterator[asyncio.Task[None]]:
    """Keep visiting and reading; yields the reading, which ends with the build."""
    visiting, reading = asyncio.create_task(visitor.stay()), asyncio.create_task(reader.follow())
    try:
        yield reading
    finally:
        visiting.cancel()
        reading.cancel()
        await asyncio.gather(visiting, reading, return_exceptions=True)


async def story(host: outlive.Host, folder: Path) -> None:
    """Tell the story; raises `ClaimFailed`."""
    page = b"still here\n"
    (folder / "page.txt").write_bytes(page)

    chapter("Two threads start what agents start")
    build, web = await host.thread("build"), await host.thread("web")
    python = sys.executable
    server = await web.exec_command(
        [python, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"], workdir=folder, yield_time_ms=1000
    )
    port = re.search(r"port (\d+)", server.output)
    claim("web: an http.server serves", port is not None, server.output.strip())
    assert port is not None
    shell = await web.exec_command(["bash", "--norc", "-i"], tty=True, yield_time_ms=300)
    await ask(web, shell.process_id, "cd /usr/lib; word=kept")
    tell(f"web: a bash, process {shell.process_id}, with a variable and a directory of its own")
    repl = await build.exec_command([python, "-q", "-i"], tty=True, yield_time_ms=500)
    await ask(build, repl.process_id, "x = 6 * 7")
    tell(f"build: a Python REPL, process {repl.process_id}, where x = 6 * 7")
    started = await build.exec_command([python, "-c", BUILD], tty=True, yield_time_ms=250)
    flood = Flood(build, started.process_id)
    tell(f"build: a build, process {flood.process_id}, that prints {LINES} numbered lines")
    pids = await pids_of(host)

    visitor, reader = Visitor(int(port[1]), page), Reader(build, flood.process_id)
    async with in_background(visitor, reader) as reading:
        chapter("Their workers are killed, in the middle of everything")
        await flood.printed()
        dead = [await kill_worker(build), await kill_worker(web)]
        began = time.monotonic()
        row = await build.resume()
        tell(f"thread build has its next worker, {row.worker_pid}, after {time.monotonic() - began:.2f} s")
        await nobody_noticed(host, pids, flood)
        answer = await ask(build, repl.process_id, "print('x is', x)")
        claim(f"the REPL knows its variable, as process {repl.process_id}", "x is 42" in answer, answer)
        answer = await ask(web, shell.process_id, 'echo "$word in $PWD"')
        claim(f"the shell knows its own, as process {shell.process_id}", "kept in /usr/lib" in answer, answer)
        alive = [await worker_of(build), await worker_of(web)]
        claim("the workers are new ones", not set(dead) & set(alive), f"{dead} → {alive}")

        chapter("The broker is killed, while one thread works and the other sleeps")
        await web.detach()
        tell("web sleeps: it has no worker, and only the broker holds its server and its shell")
        before = await host.status()
        os.kill(before["broker_pid"], signal.SIGKILL)
        tell(f"kill -9 {before['broker_pid']}, the broker")
        began = time.monotonic()
        after = await host.status()
        tell(f"the next one answers after {time.monotonic() - began:.2f} s")
        kept = before["keeper_pid"] == after["keeper_pid"] and before["broker_pid"] != after["broker_pid"]
        claim("its keeper has started it", kept, f"broker {after['broker_pid']}, keeper {after['keeper_pid']}")
        await nobody_noticed(host, pids, flood)
        worker = await worker_of(build)
        claim("build has the worker it had", worker == alive[0], worker)
        answer = await ask(build, repl.process_id, "print('x was', x)")
        claim("its REPL answers", "x was 42" in answer, answer)
        await ask(web, shell.process_id, "word=typed", resume=False)
        claim("web's shell takes input, and nobody is woken", await worker_of(web) is None, "word=typed")

        chapter("outlive is upgraded, under all of them")
        before, after = after, await host.upgrade()
        new = before["keeper_pid"] == after["keeper_pid"] and before["broker_pid"] != after["broker_pid"]
        claim("a new broker has taken over", new, f"broker {before['broker_pid']} → {after['broker_pid']}")
        await nobody_noticed(host, pids, flood)
        worker = await worker_of(build)
        claim("build has the worker it had", worker == alive[0], worker)
        answer = await ask(web, shell.process_id, 'echo "$word in $PWD"')
        claim("web's shell knows what was typed before, and wakes up", "typed in /usr/lib" in answer, answer)

        chapter("The build ends")
        outcome = await build.wait(flood.process_id, PATIENCE + 20)
        real = outlive.Outcome("exited", code=EXIT_CODE)
        claim("its exit code is the real one", outcome == real, outcome.sentence())
        await asyncio.wait_for(reading, PATIENCE)
        lines = reader.written // WIDTH
        seen = f"{lines} lines; {reader.read} bytes read, {reader.passed_over} known by their place"
        whole = reader.written == LINES * WIDTH == reader.read + reader.passed_over
        claim("every numbered line is there, once and in order", whole, seen)

        chapter("The thread goes to bed, its processes do not")
        sleeper = await worker_of(build)
        summary = await build.detach()
        asleep = await worker_of(build) is None and sleeper not in home.residents(folder)
        seen = f"processes {summary.process_ids}"
        claim("build is detached and has no worker", asleep and summary.process_count >= 1, seen)
        await ask(build, repl.process_id, "y = x + 1", resume=False)
        claim("the REPL takes input meanwhile, and nobody is woken", await worker_of(build) is None, "y = x + 1")
        row = await build.resume()
        answer = await ask(build, repl.process_id, "print('y is', y)")
        claim(f"resumed, in epoch {row.epoch}, it knows what was typed", "y is 43" in answer, answer)
        await web.detach(keep_worker=True)
        back = await web.reattach()
        seen = f"{back.reattached_count} taken back, {back.skipped_count} skipped"
        claim("web is detached and reattached under a living worker", back.reattached_count == 2, seen)

        chapter("What the server did in all this")
        claim("it never stopped answering", visitor.answered > 0 and not visitor.failures, visits(visitor))

    chapter("Clean up")
    await web.detach()
    cleaned = await web.clean()
    claim("clean ends what is detached", cleaned.process_count == 2, f"processes {cleaned.process_ids}")
    outcome = await web.wait(server.process_id, PATIENCE)
    claim("the server's end says why", outcome.by == "cleaned", f"{outcome.sentence()}, by: {outcome.by}")
    log = (await web.output(server.process_id)).count(b'"GET /page.txt HTTP/1.0" 200')
    claim("its log has a line for each request", log >= visitor.answered, f"{log} lines")
    await build.shutdown()
    outcome = await build.wait(repl.process_id, PATIENCE)
    claim("shutdown ends what is attached", outcome.by == "shutdown", f"{outcome.sentence()}, by: {outcome.by}")
    down = await host.down()
    claim("nothing lives, so the broker goes down", down["ended"] == [], f"broker {after['broker_pid']}")


def visits(visitor: Visitor) -> str:
    """Return what the visitor saw."""
    failures = f"{len(visitor.failures)} failed {visitor.failures[:1]}" if visitor.failures else "none failed"
    return f"{visitor.answered} requests, {failures}, the slowest took {visitor.longest * 1000:.0f} ms"


async def perform(folder: Path) -> int:
    """Tell the story and return the exit status."""
    began = time.monotonic()
    async with outlive.connect() as host:
        try:
            await story(host, folder)
        except BaseException as error:
            if isinstance(error, ClaimFailed):
                print(f"\n{paint('The demo failed', 31)}: {error}", flush=True)
            await home.emptied()
            raise
    left = await home.deserted(folder)
    claim("nothing is left running", not left, f"{len(left)} processes")
    print(f"\n{paint('Everything held', 32)}, in {time.monotonic() - began:.0f} s.", flush=True)
    return 0


def main() -> None:
    """Run the demo in a home of its own."""
    with home.temporary_home() as folder:
        try:
            status = home.run(perform(folder))
        except ClaimFailed:
            status = 1
    raise SystemExit(status)


if __name__ == "__main__":
    main()
