"""Whatever dies at whichever moment, between the end of a process and the acknowledged wake: one effect.

The journal and its file are real.  The worker is a record of what it was asked; a broker that dies leaves what it
has committed, and nothing else.  A moment is each side of each commit, and of each message; each is tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outlive.broker import delivery as module
from outlive.broker.delivery import Delivery
from outlive.broker.entries import Thread
from outlive.broker.journal import Journal
from outlive.broker.lifecycle import Life, Phase
from outlive.broker.peers import WorkerGone
from outlive.broker.records import Limits
from outlive.broker.watches import Match
from outlive.common import wire
from outlive.common.config import Config
from outlive.common.messages import Run, Start
from outlive.common.outcome import Outcome
from outlive.common.program import Program
from outlive.common.rules import Exit, Output

PROGRAM = Program(argv=[b"program"])
ENDED = Match(outcome=Outcome("exited", code=3))


class Worker:
    """What one worker process does; it may outlive its broker."""

    def __init__(self, machine: Machine) -> None:
        self.pid = machine.new_pid()
        self._machine = machine
        self._answers: dict[int, str] = {}

    def perform(self, body: Any) -> Any:
        if isinstance(body, Run) and body.wake.run not in self._answers:
            self._machine.runs.append(body)
            self._answers[body.wake.run] = self._machine.failures.pop() if self._machine.failures else ""
        return self._answers[body.wake.run] if isinstance(body, Run) else None


class Machine:
    """What outlives a broker: the file, the worker, processes that have ended; and when death comes.

    `at`: the number of the moment, counted from 0; `victim`: who dies then.
    """

    def __init__(self, path: Path, at: int = -1, victim: str = "") -> None:
        self.path = path
        self.at = at
        self.victim = victim
        self.moments = 0
        self.ended: list[str] = []
        self.worker: Worker | None = None
        self.runs: list[Run] = []
        self.failures: list[str] = []
        self.boot = "boot"
        self.dead = asyncio.Event()
        self._pids = 1000

    def new_pid(self) -> int:
        self._pids += 1
        return self._pids

    def moment(self) -> bool:
        """Something is about to happen, or has; tell whether the broker is dead."""
        if self.moments == self.at:
            if "worker" in self.victim:
                self.worker = None
            if "broker" in self.victim:
                self.dead.set()
        self.moments += 1
        return self.dead.is_set()


class Threads:
    """The broker's threads, as far as deliveries need them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.journal = Journal(machine.path, Limits(3600, 1000, 1 << 30), machine.boot, lambda text: None)
        self.journal._writer.shutdown()
        self.journal._writer = self  # type: ignore[assignment]
        self.watches = SimpleNamespace()
        self.threads: dict[str, Thread] = {}
        self.tasks: set[asyncio.Task[Any]] = set()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Commit at once; the dead neither do that nor hear of it."""
        future: Future[Any] = Future()
        if not self._machine.moment():
            result = work(*args)
            if not self._machine.moment():
                future.set_result(result)
        return future

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        return task

    def create(self, thread_id: str) -> Thread:
        if thread_id not in self.threads:
            thread = self.threads[thread_id] = Thread(thread_id, self.journal.thread(thread_id))
            thread.expected = self._machine.worker is not None
        return self.threads[thread_id]

    def get(self, thread_id: str) -> Thread:
        return self.create(thread_id)

    async def worker(self, thread: Thread) -> Any:
        if self._machine.worker is None:
            self._machine.worker = Worker(self._machine)
        thread.worker_pid = self._machine.worker.pid
        thread.life = Life(Phase.AWAKE)
        thread.worker = SimpleNamespace(pid=thread.worker_pid, call=self.call)  # type: ignore[assignment]
        return thread.worker

    async def call(self, body: Any, transmit: object, deadline: float | None = None) -> Any:
        worker = self._machine.worker
        dead = self._machine.moment()
        result = worker.perform(body) if worker and worker is self._machine.worker and not dead else None
        if self._machine.moment():
            await asyncio.Event().wait()
        if self._machine.worker is not worker or worker is None:
            raise WorkerGone("killed")
        return result

    async def handed_over(self, thread: Thread) -> None:
        """Nothing is held."""

    async def death_proved(self, thread: Thread, peer: Any) -> None:
        thread.failure = "SIGKILL"
        thread.worker, thread.worker_pid = None, None

    async def put_to_bed(self, thread: Thread) -> None:
        self._machine.worker = None
        thread.life = Life(Phase.ASLEEP)


class Broker:
    """One broker: what it finds came true is told again, as headers and records do."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.threads = Threads(machine)
        self.events: list[dict[str, Any]] = []
        self.delivery = Delivery(self, self.threads, Config())  # type: ignore[arg-type]
        for process_id in machine.ended:
            self.end(process_id)
        self.delivery.begin()

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        self.events.append(fields)

    def transmit(self, peer: object, frame: bytes) -> None:
        """Messages are calls here."""

    def log(self, text: str) -> None:
        raise AssertionError(text)

    def end(self, process_id: str) -> None:
        self.delivery.came_true(("t", process_id), Exit(), ENDED)

    async def start(self) -> None:
        await self.delivery.start(Start(thread="t", program=PROGRAM, call_id="c"))

    async def rest(self) -> None:
        """Wait until no wake is under way, and the thread is in bed; or until the broker is dead."""
        while not self.machine.dead.is_set() and (self.threads.journal.outbox.of("t") or self.machine.worker):
            await asyncio.sleep(0)

    async def die(self) -> None:
        """End without a last word."""
        self.delivery.close()
        for task in self.threads.tasks:
            task.cancel()
        await asyncio.gather(*self.threads.tasks, return_exceptions=True)
        if self.threads.journal._timer:
            self.threads.journal._timer.cancel()
        self.threads.journal._database.close()


async def story(machine: Machine) -> Broker:
    """A program is started, and while it sleeps two processes end, one after the other; return the last broker."""
    broker = Broker(machine)
    starting = asyncio.ensure_future(broker.start())
    stopped = asyncio.ensure_future(machine.dead.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    await broker.rest()
    for process_id in ("1000", "1001"):
        machine.ended.append(process_id)
        if not machine.dead.is_set():
            broker.end(process_id)
            await broker.rest()
    stopped.cancel()
    if machine.dead.is_set():
        starting.cancel()
        await broker.die()
        machine.dead.clear()
        broker = Broker(machine)
        await broker.start()  # the client asks again
        await broker.rest()
    return broker


def check(machine: Machine, broker: Broker) -> None:
    """Everything that came true was in an accepted run, and in no other but the same one begun again."""
    runs: dict[str, set[tuple[int, int]]] = {}
    for run in machine.runs:
        for match in run.wake.matches:
            runs.setdefault(match.process_id, set()).add((run.wake.run, run.wake.number))
    assert set(runs) == {"", "1000", "1001"}
    assert all(len(names) == 1 for names in runs.values()), runs
    rows = broker.delivery.rows("t", everything=True)
    assert sorted((row.process_id or "", row.state) for row in rows) == [(one, "done") for one in sorted(runs)]


async def moments(folder: Path) -> int:
    machine = Machine(folder / "undisturbed.db")
    broker = await story(machine)
    check(machine, broker)
    assert len(machine.runs) == 3
    await broker.die()
    return machine.moments


@pytest.mark.parametrize("victim", ["broker", "worker", "broker and worker"])
async def test_a_death_at_any_moment_costs_no_wake_and_doubles_none(tmp_path: Path, victim: str) -> None:
    count = await moments(tmp_path)
    assert count > 20
    for at in range(count):
        machine = Machine(tmp_path / f"{at}.db", at, victim)
        broker = await story(machine)
        check(machine, broker)
        begun = [run.wake.run for run in machine.runs]
        if victim == "broker":  # the worker knows what it has done
            assert len(begun) == len(set(begun)), f"moment {at}: {begun}"
        await broker.die()


async def test_a_wake_that_failed_is_run_again_with_what_came_meanwhile_as_another_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "journal.db")
    broker = Broker(machine)
    await broker.start()
    await broker.rest()
    machine.failures = ["no"]
    broker.end("1000")
    while not any(event["what"] == "failed" for event in broker.events):
        await asyncio.sleep(0)
    broker.end("1001")
    await broker.rest()
    _, first, second = machine.runs
    assert [match.process_id for match in first.wake.matches] == ["1000"]
    assert [match.process_id for match in second.wake.matches] == ["1000", "1001"]
    assert (first.wake.number, first.wake.attempt) == (second.wake.number, second.wake.attempt - 1)
    assert first.wake.run != second.wake.run
    await broker.die()


async def test_what_was_read_by_the_agent_is_not_run_unless_the_program_wants_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "journal.db")
    broker = Broker(machine)
    await broker.start()
    await broker.rest()
    broker.end("1000")
    broker.delivery.read(("t", "1000"))
    broker.threads.journal.flush()
    assert [row.state for row in broker.delivery.rows("t", everything=True)] == ["done", "read"]
    wants = Start(thread="t", program=Program(argv=[b"p"], even_read=True), call_id="d")
    await broker.delivery.start(wants)
    await broker.rest()
    broker.end("1001")
    broker.delivery.read(("t", "1001"))
    await broker.rest()
    (match,) = machine.runs[-1].wake.matches
    assert (match.process_id, match.read) == ("1001", True)
    await broker.die()


async def test_long_wakes_are_listed_fewer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_SIZE_MAX", 11_000)
    broker = Broker(Machine(tmp_path / "journal.db"))
    for number in range(3):
        broker.delivery.came_true(("t", "1000"), Output(str(number)), Match(text=b"x" * 1200, offset=number))
    broker.threads.journal.flush()
    first = broker.delivery.rows("t", everything=True, at_most=500)
    rest = broker.delivery.rows("t", everything=True, after=first[-1].number, at_most=500)
    assert ([row.offset for row in first], [row.offset for row in rest]) == ([0, 1], [2])
    assert len(broker.delivery.rows("t", everything=True)) == 3
    await broker.die()


async def test_wakes_of_a_thread_without_a_program_are_kept_for_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "journal.db")
    broker = Broker(machine)
    broker.end("1000")
    broker.threads.journal.flush()
    assert [row.state for row in broker.delivery.rows(None, everything=False)] == ["pending"]
    assert machine.worker is None
    await broker.start()
    await broker.rest()
    told = [match.process_id for run in machine.runs for match in run.wake.matches]
    assert sorted(told) == ["", "1000"]
    await broker.die()


def row(process_id: str, *rules: str) -> dict[str, Any]:
    """Return a process's line of `ps`."""
    return {
        "thread": "t",
        "process_id": process_id,
        "call_id": f"call-{process_id}",
        "pid": 4711,
        "state": "detached",
        "worker_pid": None,
        "command": ["x"],
        "cwd": "/",
        "tty": False,
        "started_at": "2023-11-14T22:13:20.123Z",
        "bytes_written": 0,
        "bytes_delivered": 0,
        "outcome": None,
        "wake_on": list(rules),
    }


async def test_after_a_reboot_what_was_watched_wakes_as_lost_and_nothing_else_does(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "journal.db")
    broker = Broker(machine)
    await broker.start()
    await broker.rest()
    thread = broker.threads.journal.thread("t")
    watched = {"1000": ["exit"], "1001": [], "1002": ["output=x"], "1003": ["exit"], "1004": ["output=y"]}
    for process_id, rules in watched.items():
        thread.use(process_id, f"call-{process_id}", partial(row, process_id, *rules))
    broker.end("1003")  # it had ended, and that was told
    broker.delivery.came_true(("t", "1004"), Output("y"), Match(offset=3, text=b"y"))
    await broker.rest()
    broker.threads.journal.flush()
    await broker.die()
    machine.boot, machine.runs = "another boot", []
    broker = Broker(machine)
    await broker.rest()
    (run,) = machine.runs
    lost = {"kind": "lost", "reason": "rebooted"}
    assert {match.process_id: match.outcome for match in run.wake.matches} == {"1000": lost, "1002": lost}
    states = {summary.process_id: summary.state for summary in run.wake.processes}
    assert states == dict.fromkeys(watched, "lost")
    await broker.die()


async def test_many_long_matches_are_several_runs_that_a_message_has_room_for(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "journal.db")
    broker = Broker(machine)
    for number in range(1000, 1600):
        text = Match(offset=0, text=b"x" * 4096)
        broker.delivery.came_true(("t", str(number)), Output("x+"), text)
    await broker.start()
    await broker.rest()
    sizes = [len(run.wake.matches) for run in machine.runs]
    assert sum(sizes) == 601
    assert 2 < len(sizes) < 6
    assert all(len(wire.encode(wire.request(run, id=1))) < wire.FRAME_MAX // 2 for run in machine.runs)
    await broker.die()
