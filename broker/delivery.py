"""Deliveries: what came true is written down, and then the thread's program is run; does what `wakes` decides.

    came true    a rule of a process (`watches`), an end that nobody saw (`journal`), or `start`
    written      `outbox`: pending
    run          the thread is resumed, its processes are reattached, the run is written down, and its worker asked
    returned     written down; then the next run, or to bed

Always true
    A run is written down before its worker hears of it, and its end before the thread goes to bed: whoever dies in
    between, the next broker asks the same worker, or the next one, for the same run.
    A thread is not resumed while it goes to bed, nor sent there while a call needs its worker.
    While nothing is due there is no timer, but that of a thread that is awake and is to go to bed when it is idle.

Not here
    What a run is for a worker: `worker.programs`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..common import kernel
from ..common.config import Config
from ..common.errors import BadRequest, OutliveError, Unavailable
from ..common.messages import CancelRun, Load, Run, Start, ThreadRow
from ..common.program import Program, Wake, WakeMatch, WakeRow
from ..common.rules import Exit, Rule
from . import inventory, wakes
from .entries import Thread
from .lifecycle import Phase as Life
from .outbox import Letter
from .peers import WorkerGone
from .threads import ThreadManager
from .wakes import COURSES, FATES, IMPOSSIBLE_FATES, Course, Effect, Event, Happening, Phase, State
from .watches import Match
from .world import World

# Seconds that a program may take to be loaded.
LOAD_DEADLINE = 60.0
# Wakes in one run, and characters of what they say; more are the next one's.
RUN_MAX = 1000
RUN_SIZE_MAX = 1 << 20
# Seconds that a worker may take to end after its program failed, before the next is wanted.
CRASH_DEADLINE = 5.0
# Wakes that are kept for a thread without a program; then the oldest are dropped.
UNMANNED_MAX = 1000
# Seconds that a worker has to end a run that is not wanted any more.  A program that never awaits keeps its worker
# from hearing of it; what that holds, we hold too.
CANCEL_DEADLINE = 5.0
# Bytes of wakes in one answer, at most: half of what it can hold.
ROWS_SIZE_MAX = 2 << 20
# How a worker ends that was ended from outside, or was sent to bed; every other end is its program's doing.
_FROM_OUTSIDE = {"SIGKILL", "SIGTERM", "exit status 0", "gone"}


@dataclass(slots=True, eq=False)
class Box:
    """One thread's deliveries."""

    thread: Thread
    course: Course = field(default_factory=Course)
    # What fetches a worker or runs the program; and what sends the thread to bed.
    work: asyncio.Task[None] | None = None
    to_bed: asyncio.Task[None] | None = None
    pause: asyncio.TimerHandle | None = None
    # Calls that need the worker, since when there is none, and when to look at that.
    calls: int = 0
    idle_since: float = 0.0
    idle: asyncio.TimerHandle | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Delivery:
    """All deliveries of this broker, on top of its threads."""

    def __init__(self, world: World, threads: ThreadManager, config: Config) -> None:
        self._world = world
        self._threads = threads
        self._config = config
        self._outbox = threads.journal.outbox
        self._boxes: dict[str, Box] = {}
        self._closed = False
        threads.on_match = self.came_true
        threads.on_read = self.read
        threads.on_forget = self.forget
        threads.watches.fired = lambda key, rule, generation: self._outbox.knows((*key, generation, str(rule)))
        threads.journal.listen(self._lost)

    def begin(self) -> None:
        """Go on with what the former broker has left."""
        for thread_id in self._outbox.programs:
            with suppress(OutliveError):
                box = self._box(thread_id)
                self._happen(box, Happening.STARTED)
                if box.thread.expected and box.course.phase is Phase.RESTING:
                    self._send_to_bed(box)  # the former broker was about to
        for thread in self._threads.threads.values():
            if thread.expected:
                self._rest(self._box(thread.thread_id))

    def close(self) -> None:
        """Deliver nothing any more; what comes true is still written down."""
        self._closed = True
        for box in self._boxes.values():
            for timer in (box.pause, box.idle):
                if timer:
                    timer.cancel()
            if box.work:
                box.work.cancel()

    def _box(self, thread_id: str) -> Box:
        box = self._boxes.get(thread_id)
        if box is None:
            box = self._boxes[thread_id] = Box(self._threads.create(thread_id))
        return box

    def forget(self, thread: Thread) -> bool:
        """A thread is about to be forgotten: have nothing to do with it any more; `False` if we still have."""
        box = self._boxes.get(thread.thread_id)
        if box is None:
            return True
        under_way = any(task and not task.done() for task in (box.work, box.to_bed))
        if box.course.phase is not Phase.UNMANNED or box.calls or under_way or box.starting.locked():
            return False
        if box.idle:
            box.idle.cancel()
        del self._boxes[thread.thread_id]
        return True

    # What came true.

    def came_true(self, key: tuple[str, str], rule: Rule, match: Match) -> None:
        """A rule of a process came true; said again, it counts once."""
        detail: dict[str, Any] = {}
        if match.outcome:
            detail["outcome"] = match.outcome.to_wire()
        if match.offset is not None:
            detail |= {"offset": match.offset, "text": match.text.decode("utf-8", "replace")}
        self._post((*key, match.generation, str(rule)), detail)

    def _lost(self, row: dict[str, Any]) -> None:
        """A process was lost, so that its rules cannot come true any more: its end is told while one is open."""
        key = row["thread"], row["process_id"]
        end = str(Exit())
        still_open = [(rule, at) for rule, at in row["wake_on"] if not self._outbox.knows((*key, at, rule))]
        generations = [at for rule, at in still_open if rule == end] or [at for _, at in still_open]
        if generations:
            self._post((*key, max(generations), end), {"outcome": row["outcome"]})

    def _post(self, key: tuple[str, str, int, str], detail: dict[str, Any]) -> Letter | None:
        letter = self._outbox.new(key, detail, self._written)
        if letter is None:
            return None
        if key[0] not in self._outbox.programs:
            kept = [one for one in self._outbox.of(key[0]) if one.fate.is_due]
            for one in kept[: -(UNMANNED_MAX - 1)]:
                self._fate(one, Event.DROPPED)
        return letter

    def _written(self, letter: Letter) -> None:
        letter.fate = wakes.after(letter.fate, Event.COMMITTED)
        if letter.fate.is_due:
            self._tell(letter, "pending")
            with suppress(OutliveError):  # of a thread that cannot be served; it is kept
                self._happen(self._box(letter.thread_id), Happening.POSTED)

    def read(self, key: tuple[str, str]) -> None:
        """An answer has told the agent how a process ended."""
        program = self._outbox.programs.get(key[0])
        for letter in self._outbox.of(key[0]):
            its = letter.key[:2] == key and letter.rule == str(Exit())
            if its and letter.fate.state in (State.NEW, State.PENDING) and not letter.detail.get("read"):
                letter.detail["read"] = True
                if program and program.even_read:
                    self._outbox.changed(letter)
                else:
                    self._fate(letter, Event.READ)

    # What people want.

    async def start(self, call: Start) -> ThreadRow:
        """Give a thread a program; raises `BadRequest` for one that cannot be run."""
        program = call.program
        if bool(program.function) == bool(program.argv):
            raise BadRequest("program: give either a function or a command")
        if program.argv and (not program.argv[0] or b"\0" in b"".join(program.argv)):
            raise BadRequest("program: the command is empty or contains a NUL byte; give at least its name")
        thread = self._threads.create(call.thread)
        box = self._box(call.thread)
        key = call.thread, "", 0, f"start {call.call_id}"
        async with box.starting:
            if not self._outbox.knows(key):
                if box.course.phase in (Phase.RUNNING, Phase.WAKING):
                    raise BadRequest(
                        f"thread {call.thread}: its program runs at this moment; wait, or end it with "
                        f"`outlive stop {call.thread}`"
                    )
                former = self._outbox.programs.get(call.thread)
                if former:
                    self._happen(box, Happening.STOPPED)  # what comes true from here on is for the next
                try:
                    await self._check(box, program, former)
                except BaseException:
                    if former:
                        self._happen(box, Happening.STARTED)
                    raise
                for letter in self._outbox.of(call.thread):  # of the former program
                    if not letter.process_id and letter.fate.is_due:
                        self._fate(letter, Event.STOPPED)
                    elif letter.fate.state is State.DELIVERED:
                        self._fate(letter, Event.REPLACED)
                self._outbox.start(call.thread, program)
                written: asyncio.Future[Letter] = asyncio.get_running_loop().create_future()
                self._outbox.new(key, {}, written.set_result)
                await asyncio.shield(written)
                self._happen(box, Happening.STARTED)
                self._written(written.result())
        return self.row(thread)

    async def _check(self, box: Box, program: Program, former: Program | None) -> None:
        """Have a worker load the program; one that has loaded another is sent to bed first."""
        thread = box.thread
        if former:
            await self._sleep(box)
        if box.to_bed:
            await asyncio.wait({box.to_bed})
        while True:
            peer = await self._threads.worker(thread)
            try:
                await peer.call(Load(program=program), self._world.transmit, kernel.boottime() + LOAD_DEADLINE)
                return
            except WorkerGone:
                await self._threads.death_proved(thread, peer)
                if thread.worker_pid == peer.pid or thread.failure in _FROM_OUTSIDE:
                    continue
                self._send_to_bed(box)
                raise BadRequest(
                    f"program {program.label}: loading it ended its worker ({thread.failure}); see the log"
                ) from None
            except OutliveError:
                self._send_to_bed(box)  # what was loaded of it must not be there when it is repaired
                raise

    async def stop(self, thread_id: str) -> ThreadRow:
        """Take a thread's program away, and what it would have been woken for; one that runs is ended."""
        thread = self._threads.get(thread_id)
        box = self._box(thread_id)
        if thread_id in self._outbox.programs:
            for letter in self._outbox.of(thread_id):
                if letter.fate.is_due or letter.fate.state is State.NEW:
                    self._fate(letter, Event.STOPPED)
            written = asyncio.get_running_loop().create_future()
            self._outbox.stop(thread_id, lambda: written.set_result(None))
            self._happen(box, Happening.STOPPED)
            await asyncio.shield(written)
        if box.to_bed:
            await asyncio.wait({box.to_bed})
        return self.row(thread)

    async def retry(self, number: int) -> Letter:
        """Deliver a dead letter once more, or one that the agent had read."""
        return await self._by_hand(number, Event.RETRIED, Happening.RETRIED)

    async def drop(self, number: int) -> Letter:
        """Do not deliver a wake."""
        return await self._by_hand(number, Event.DROPPED, None)

    async def _by_hand(self, number: int, event: Event, happening: Happening | None) -> Letter:
        letter = self._outbox.revive(number)
        if letter is None:
            raise BadRequest(f"wake {number} is not known; see `outlive wakes --all`")
        state = letter.fate.state
        if event not in FATES[state]:
            raise BadRequest(f"wake {number} is {state.value}: {IMPOSSIBLE_FATES[state, event]}")
        await self._committed([letter], event)
        if happening:
            self._happen(self._box(letter.thread_id), happening)
        return letter

    def rows(
        self, thread_id: str | None, *, everything: bool, after: int = 0, at_most: int | None = None
    ) -> list[WakeRow]:
        """Return lines of `outlive wakes`, see `Outbox.rows`; with `at_most`, fewer where they are long."""
        rows: list[WakeRow] = []
        room = ROWS_SIZE_MAX
        for letter in self._outbox.rows(thread_id, everything, after, at_most):
            row = letter.row()
            # Of up to four bytes; the rest of a line is short.
            room -= 500 + 4 * (len(row.rule) + len(row.text or "") + len(row.failure or ""))
            if rows and room < 0 and at_most is not None:
                break
            rows.append(row)
        return rows

    def row(self, thread: Thread) -> ThreadRow:
        """Return a thread's line of `threads`."""
        program = self._outbox.programs.get(thread.thread_id)
        box = self._boxes.get(thread.thread_id)
        return msgspec.structs.replace(
            thread.row(),
            program=program.label if program else None,
            running=box is not None and box.course.phase is Phase.RUNNING,
            wakes=sum(letter.fate.is_due for letter in self._outbox.of(thread.thread_id)),
        )

    # What is decided.

    def _fate(
        self, letter: Letter, event: Event, failure: str = "", then: Callable[[], None] = lambda: None
    ) -> None:
        """Let this happen to a wake; once that is written, it is told, and `then` called."""
        letter.fate = wakes.after(letter.fate, event)
        if failure:
            letter.failure = failure

        def written() -> None:
            fields = {"failure": failure} if failure else {}
            what = "failed" if event is Event.FAILED and state is State.PENDING else state.value
            self._tell(letter, what, **fields)
            then()

        state = letter.fate.state
        self._outbox.changed(letter, written)

    async def _committed(self, letters: list[Letter], event: Event, failure: str = "") -> None:
        """Let this happen to wakes, and wait until it is written."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for letter in letters[:-1]:
            self._fate(letter, event, failure)
        if letters:
            self._fate(letters[-1], event, failure, lambda: done.set_result(None))
            await asyncio.shield(done)

    def _tell(self, letter: Letter, what: str, **fields: Any) -> None:
        self._world.publish(
            "wake",
            letter.thread_id,
            letter.process_id or None,
            what=what,
            number=letter.number,
            rule=letter.row().rule,
            **fields,
        )

    def _happen(self, box: Box, happening: Happening) -> None:
        thread = box.thread
        due = [letter for letter in self._outbox.of(thread.thread_id) if letter.fate.is_due]
        if happening not in COURSES[box.course.phase]:
            self._world.log(f"thread {thread.thread_id}: {happening} in {box.course} ignored")
            return
        former = box.course.phase
        box.course, effects = wakes.step(box.course, happening, due=bool(due))
        if box.pause and box.course.phase is not Phase.PAUSING:
            box.pause.cancel()
            box.pause = None
        if happening is Happening.STOPPED and former in (Phase.WAKING, Phase.RUNNING) and box.work:
            box.work.cancel()
        if not self._closed:
            for effect in effects:
                self._do(box, effect)
        thread.tell()

    def _do(self, box: Box, effect: Effect) -> None:
        if effect is Effect.WANT_WORKER:
            box.work = self._threads.spawn(self._fetch(box))
        elif effect is Effect.RUN:
            box.work = self._threads.spawn(self._run(box))
        elif effect is Effect.PAUSE:
            loop = asyncio.get_running_loop()
            box.pause = loop.call_later(box.course.pause, self._happen, box, Happening.PAUSE_OVER)
        elif effect is Effect.SLEEP:
            self._send_to_bed(box)
        elif effect is Effect.CANCEL:
            self._send_to_bed(box, cancel=True)

    # What is done.

    async def _fetch(self, box: Box) -> None:
        """Have the thread's worker up, with its processes."""
        if box.to_bed:
            await asyncio.wait({box.to_bed})
        try:
            await self._threads.worker(box.thread)
            await self._threads.handed_over(box.thread)
        except OutliveError:
            self._happen(box, Happening.UNREACHABLE)
        else:
            self._happen(box, Happening.WORKER_UP)

    async def _run(self, box: Box) -> None:
        thread = box.thread
        program = self._outbox.programs[thread.thread_id]
        due = [letter for letter in self._outbox.of(thread.thread_id) if letter.fate.is_due]
        # A start names its run (`Wake.number`): what the former program had begun for the others is not this one's.
        due.sort(key=lambda letter: bool(letter.process_id))
        letters = [letter for letter in due if letter.fate.state is State.DELIVERED]
        if not letters:
            letters, number = _that_fit(due), self._outbox.new_run()
            for letter in letters:
                letter.run = number
            await self._committed(letters, Event.DELIVERED)
        letters = [letter for letter in letters if letter.fate.state is State.DELIVERED]
        if not letters:  # somebody read or dropped them meanwhile
            self._happen(box, Happening.RETURNED)
            return
        failure = await self._ask(thread, Run(program=program, wake=self._wake(thread, letters)))
        letters = [letter for letter in letters if letter.fate.state is State.DELIVERED]
        if failure is None:
            self._happen(box, Happening.WORKER_DIED)
        elif failure:
            await self._committed(letters, Event.FAILED, failure)
            self._happen(box, Happening.FAILED)
        else:
            await self._committed(letters, Event.ACKNOWLEDGED)
            self._happen(box, Happening.RETURNED)

    async def _ask(self, thread: Thread, run: Run) -> str | None:
        """Return how a run failed, or that it did not; `None` when its worker died by no fault of the program."""
        while True:
            peer = thread.worker
            if peer is None:
                if thread.worker_pid is None:
                    return None
                await thread.changed()  # it is coming back, or about to be found dead
                continue
            try:
                failure = str(await peer.call(run, self._world.transmit))
                if failure and run.program.function:  # its worker ends, too
                    with suppress(TimeoutError):
                        async with asyncio.timeout(CRASH_DEADLINE):
                            await self._threads.death_proved(thread, peer)
                return failure
            except WorkerGone:
                await self._threads.death_proved(thread, peer)
                if thread.worker_pid == peer.pid:
                    continue  # it lives, and knows the run
                return None if thread.failure in _FROM_OUTSIDE else f"it ended its worker: {thread.failure}"
            except OutliveError as error:
                return str(error)

    def _wake(self, thread: Thread, letters: list[Letter]) -> Wake:
        """Return what a program is woken with."""
        named = [letter.process_id for letter in letters if letter.process_id]
        first = letters[0]
        return Wake(
            thread=thread.thread_id,
            reason="start" if any(not letter.process_id for letter in letters) else "wake",
            number=first.number,
            run=first.run,
            attempt=first.fate.failures,
            matches=[self._match(thread, letter) for letter in letters],
            processes=inventory.of(thread, named),
        )

    def _match(self, thread: Thread, letter: Letter) -> WakeMatch:
        entry = thread.entries.get(letter.process_id)
        read = bool(letter.detail.get("read"))
        row = letter.row()
        if entry and entry.transcript and row.text is not None and row.offset is not None:
            read = entry.transcript.live().delivered >= row.offset + len(row.text.encode())
        return WakeMatch(
            number=letter.number,
            process_id=letter.process_id,
            rule=row.rule,
            at=row.at,
            outcome=row.outcome,
            text=row.text,
            offset=row.offset,
            read=read,
        )

    # To bed.

    async def rested(self, thread: Thread) -> None:
        """Wait while the thread's program runs: who sent it to bed then would have it begin anew."""
        box = self._boxes.get(thread.thread_id)
        while box and box.course.phase is Phase.RUNNING:
            await thread.changed()

    @contextmanager
    def busy(self, thread: Thread) -> Iterator[None]:
        """For a call that needs the thread's worker: it is not sent to bed meanwhile."""
        box = self._box(thread.thread_id)
        box.calls += 1
        try:
            yield
        finally:
            box.calls -= 1
            if not box.calls:
                box.thread.tell()
                self._rest(box)

    def _rest(self, box: Box) -> None:
        """Nobody needs the worker from now on; when that lasts, the thread goes to bed."""
        loop = asyncio.get_running_loop()
        box.idle_since = loop.time()
        if self._config.idle_sleep_s and box.idle is None and not self._closed:
            box.idle = loop.call_later(self._config.idle_sleep_s, self._look_at, box)

    def _look_at(self, box: Box) -> None:
        box.idle = None
        left = box.idle_since + self._config.idle_sleep_s - asyncio.get_running_loop().time()
        if box.calls:
            return  # their end begins it anew
        if left > 0:
            box.idle = asyncio.get_running_loop().call_later(left, self._look_at, box)
        elif box.course.phase in (Phase.UNMANNED, Phase.RESTING):
            self._send_to_bed(box)

    def _send_to_bed(self, box: Box, *, cancel: bool = False) -> None:
        box.to_bed = self._threads.spawn(self._to_bed(box, cancel=cancel))

    async def _to_bed(self, box: Box, *, cancel: bool) -> None:
        with suppress(OutliveError):
            if cancel and (peer := box.thread.worker):
                try:
                    await peer.call(CancelRun(), self._world.transmit, kernel.boottime() + CANCEL_DEADLINE)
                except Unavailable:
                    self._world.log(f"thread {box.thread.thread_id}: its program blocks its worker, which is ended")
                    self._world.kill_worker(peer.pid)
            await self._sleep(box)

    async def _sleep(self, box: Box) -> None:
        """Send the thread to bed once no call needs its worker, unless a program does."""
        while True:
            while box.calls and box.thread.life.phase is not Life.ASLEEP:
                await box.thread.changed()
            if box.course.phase not in (Phase.UNMANNED, Phase.RESTING, Phase.PAUSING):
                return
            with suppress(Unavailable):  # it is stopped, or stuck; that took a while
                await self._threads.put_to_bed(box.thread)
                return


def _that_fit(letters: list[Letter]) -> list[Letter]:
    """Return the first of them, at least one, that a message has room for."""
    size, taken = 0, 0
    for letter in letters[:RUN_MAX]:
        size += len(letter.rule) + sum(len(str(value)) for value in letter.detail.values())
        if taken and size > RUN_SIZE_MAX:
            break
        taken += 1
    return letters[:taken]
