"""Threads go to bed, and are woken once: programs and their wakes, with real processes, and deaths at each moment.

A program's effect is a line in its log; so `lines` tells how often it ran, and with what.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outlive
from outlive.broker.wakes import FAILURES_MAX
from outlive.common import client

from .conftest import HELD, Home, eventually, lives

# Starts what `todo` says, and waits for its end; each run leaves a line.  A run waits while there is a file `hold`.
AGENT = """
import asyncio, json, os, signal, sys

async def main(session, wake):
    if os.path.exists("kill"):
        os.unlink("kill")
        os.kill(os.getpid(), signal.SIGKILL)
    ends = [match for match in wake.matches if match.outcome]
    told = [f"{end.process_id} {end.rule} {end.outcome.get('code', end.outcome['kind'])}" for end in ends]
    with open("log", "a") as log:
        log.write(f"{wake.reason}: {', '.join(sorted(told)) or len(wake.processes)}\\n")
    if os.path.exists("fail"):
        raise ValueError("told to fail")
    if wake.reason == "start" and os.path.exists("todo"):
        calls = [
            session.exec_command(argv, wake_on=["exit"], yield_time_ms=250) for argv in json.load(open("todo"))
        ]
        started = await asyncio.gather(*calls)
        with open("ids", "a") as ids:
            ids.writelines(one.process_id + "\\n" for one in started)
    while os.path.exists("hold"):
        await asyncio.sleep(0.01)
"""


class Agent:
    """A thread with AGENT in a folder of its own."""

    def __init__(self, home: Home, host: outlive.Host, folder: Path) -> None:
        self.home = home
        self.host = host
        self.folder = folder
        self.thread = outlive.Thread(host, "a")
        (folder / "agent.py").write_text(AGENT)

    def lines(self, name: str = "log") -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    async def start(self, *commands: list[str], rest: bool = True) -> list[str]:
        """Start it with these commands, see it in bed, and return their ids."""
        (self.folder / "todo").write_text(json.dumps(commands))
        await self.thread.start("agent.py:main", workdir=self.folder)
        if rest:
            await self.asleep()
        return self.lines("ids")

    async def asleep(self) -> None:
        """Wait until nothing is due and nothing of ours is up."""
        while True:
            (row,) = [row for row in await self.host.threads() if row.thread == "a"]
            if row.state == "asleep" and not row.wakes:
                return
            await asyncio.sleep(0.01)

    async def states(self) -> list[str]:
        return [row.state for row in await self.thread.wakes(all=True)]


@pytest.fixture
def agent(home: Home, host: outlive.Host, tmp_path: Path) -> Agent:
    folder = tmp_path / "agent"
    folder.mkdir()
    return Agent(home, host, folder)


def held(gate: Path, line: str) -> list[str]:
    return ["sh", "-c", HELD, str(gate), line]


def let_go(gate: Path) -> None:
    with open(gate, "w") as file:
        file.write("go\n")


async def kill_broker(home: Home) -> None:
    (pid,) = home.pids("broker")
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not lives(pid))


async def test_a_thread_sleeps_without_a_process_of_ours_and_is_woken_once_with_the_outcome(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    (process_id,) = await agent.start(held(gate, "echo done; exit 3"))
    assert agent.home.pids("worker") == []
    assert agent.home.pids("worker.spawner") == []
    (row,) = await agent.thread.processes()
    assert (row.process_id, row.state) == (process_id, "detached")
    let_go(gate)
    await agent.home.until(agent.host, event="wake", what="done", process_id=process_id)
    await agent.asleep()
    assert agent.lines() == ["start: 0", f"wake: {process_id} exit 3"]
    assert await agent.states() == ["done", "done"]


async def test_what_comes_true_while_the_program_runs_is_the_next_run(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gates = [fifo("one"), fifo("two")]
    first, second = await agent.start(*(held(gate, "exit 4") for gate in gates))
    (agent.folder / "hold").touch()
    let_go(gates[0])
    await eventually(lambda: len(agent.lines()) == 2)
    let_go(gates[1])
    await agent.home.until(agent.host, event="wake", what="pending", process_id=second)
    assert len(agent.lines()) == 2
    (agent.folder / "hold").unlink()
    await agent.asleep()
    assert agent.lines()[1:] == [f"wake: {first} exit 4", f"wake: {second} exit 4"]
    ups = [e for e in await agent.host.recent_events() if e["event"] == "worker" and e["what"] == "up"]
    assert len(ups) == 2  # it did not go to bed in between


async def test_more_wakes_than_one_answer_can_hold_are_all_listed(
    agent: Agent, fifo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = [fifo("one"), fifo("two")]
    ids = await agent.start(*(held(gate, "exit 4") for gate in gates))
    for gate, process_id in zip(gates, ids, strict=True):
        let_go(gate)
        await agent.home.until(agent.host, event="wake", what="pending", process_id=process_id)
    await agent.asleep()
    for at_once in (1, 2, 3, 4):
        monkeypatch.setattr(client, "ROWS_AT_ONCE", at_once)
        assert [row.number for row in await agent.thread.wakes(all=True)] == [1, 2, 3]
        assert await agent.host.wakes() == []


async def test_an_end_while_the_thread_is_being_resumed_is_told_with_the_first_or_next(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gates = [fifo("one"), fifo("two")]
    first, second = await agent.start(*(held(gate, "exit 4") for gate in gates))
    let_go(gates[0])
    await agent.home.until(agent.host, event="wake", what="pending", process_id=first)
    let_go(gates[1])
    await eventually(lambda: sum(line.count(" exit ") for line in agent.lines()) == 2)
    await agent.asleep()
    told = ", ".join(line.removeprefix("wake: ") for line in agent.lines()[1:])
    assert sorted(told.split(", ")) == sorted([f"{first} exit 4", f"{second} exit 4"])


async def test_detach_waits_for_a_program_that_runs(agent: Agent) -> None:
    (agent.folder / "hold").touch()
    await agent.start(rest=False)
    await eventually(lambda: len(agent.lines()) == 1)
    detaching = asyncio.ensure_future(agent.thread.detach())
    await agent.thread.processes()  # requests are taken in order
    assert not detaching.done()
    (agent.folder / "hold").unlink()
    await detaching
    await agent.asleep()
    assert len(agent.lines()) == 1


async def test_an_end_while_the_broker_is_down_wakes_once_it_is_back(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    (process_id,) = await agent.start(held(gate, "exit 5"))
    (keeper,), (broker,) = agent.home.pids("broker.keeper"), agent.home.pids("broker")
    os.kill(keeper, signal.SIGSTOP)
    os.kill(broker, signal.SIGKILL)
    let_go(gate)
    os.kill(keeper, signal.SIGCONT)
    await eventually(lambda: len(agent.lines()) == 2)
    await agent.asleep()
    assert agent.lines()[1:] == [f"wake: {process_id} exit 5"]


async def test_an_end_that_nobody_was_there_to_see_wakes_as_lost(agent: Agent, fifo: Callable[[str], Path]) -> None:
    """Everything of ours dies at once; the process has nobody who knows it, as after a reboot."""
    gate = fifo("gate")
    (process_id,) = await agent.start(held(gate, "exit 6"))
    pids = [*agent.home.pids("broker.keeper"), *agent.home.pids("broker")]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # neither starts the other anew
        for pid in pids:
            os.kill(pid, number)
    let_go(gate)
    await eventually(lambda: agent.home.pids() == [])
    await agent.host.threads()  # a new broker comes with the first call
    await eventually(lambda: agent.lines()[1:])
    await agent.asleep()
    assert agent.lines()[1:] == [f"wake: {process_id} exit lost"]


async def test_a_worker_that_is_killed_in_its_run_is_followed_by_another_and_that_is_no_failure(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    (process_id,) = await agent.start(held(gate, "exit 7"))
    (agent.folder / "kill").touch()
    let_go(gate)
    await agent.home.until(agent.host, event="worker", what="died", how="SIGKILL")
    await agent.home.until(agent.host, event="wake", what="done", process_id=process_id)
    await agent.asleep()
    assert agent.lines()[1:] == [f"wake: {process_id} exit 7"]
    assert [row.failures for row in await agent.thread.wakes(all=True)] == [0, 0]


async def test_a_run_goes_on_and_counts_once_when_the_broker_is_killed_within_it(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    (process_id,) = await agent.start(held(gate, "exit 8"))
    (agent.folder / "hold").touch()
    let_go(gate)
    await eventually(lambda: len(agent.lines()) == 2)
    await kill_broker(agent.home)
    (agent.folder / "hold").unlink()
    await agent.asleep()
    assert agent.lines()[1:] == [f"wake: {process_id} exit 8"]
    assert await agent.states() == ["done", "done"]


async def test_a_program_that_runs_again_since_its_worker_died_finds_what_it_had_started(agent: Agent) -> None:
    (agent.folder / "hold").touch()
    await agent.start(["sh", "-c", "echo >>ran; exec sleep 60"], rest=False)
    await eventually(lambda: len(agent.lines("ids")) == 1)
    (worker,) = agent.home.pids("worker")
    os.kill(worker, signal.SIGKILL)
    await eventually(lambda: len(agent.lines("ids")) == 2)
    (agent.folder / "hold").unlink()
    await agent.asleep()
    first, again = agent.lines("ids")
    assert first == again
    assert len(agent.lines("ran")) == 1


TYPIST = """
import asyncio, os

async def main(session, wake):
    cat = await session.exec_command("stty -echo; echo ready; exec cat", tty=True, yield_time_ms=1000)
    answers = [await session.write_stdin(cat.process_id, "again\\n") for _ in range(2)]
    with open("answers", "a") as file:
        file.write(repr([answer.output for answer in answers]) + "\\n")
    while os.path.exists("hold"):
        await asyncio.sleep(0.01)
    print(await session.write_stdin(cat.process_id, "\\x04"))
"""


async def test_a_program_that_runs_again_since_its_worker_died_types_nothing_twice(agent: Agent) -> None:
    (agent.folder / "typist.py").write_text(TYPIST)
    (agent.folder / "hold").touch()
    await agent.thread.start("typist.py:main", workdir=agent.folder)
    await eventually(lambda: len(agent.lines("answers")) == 1)
    (cat,) = await agent.thread.processes()
    (worker,) = agent.home.pids("worker")
    os.kill(worker, signal.SIGKILL)
    await eventually(lambda: len(agent.lines("answers")) == 2)
    typed = await agent.thread.output(cat.process_id)
    (agent.folder / "hold").unlink()
    await agent.asleep()
    assert typed.split() == [b"ready", b"again", b"again"]
    first, second = agent.lines("answers")
    assert first.count("again") == 2
    assert second.count("again") >= 2


# At its start it waits for the end of what it runs; woken, it does something and fails.
FORMER = """
import os, signal

async def main(session, wake):
    if wake.reason == "start":
        await session.exec_command(["sh", "-c", "read go <gate"], wake_on=["exit"], yield_time_ms=250)
    else:
        await session.exec_command("echo again >>ran")
        FAIL
"""
LATTER = """
async def main(session, wake):
    await session.exec_command("echo again >>ran")
    with open("log", "a") as log:
        print(wake.reason, *(match.rule for match in wake.matches), file=log)
"""


@pytest.mark.parametrize("failing", ["os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError"])
async def test_a_program_that_takes_anothers_place_is_started_with_what_was_left_and_repeats_none_of_its_calls(
    agent: Agent, fifo: Callable[[str], Path], failing: str
) -> None:
    gate = fifo("gate")
    (agent.folder / "gate").symlink_to(gate)
    (agent.folder / "former.py").write_text(FORMER.replace("FAIL", failing))
    (agent.folder / "latter.py").write_text(LATTER)
    await agent.thread.start("former.py:main", workdir=agent.folder)
    await agent.asleep()
    let_go(gate)
    await eventually(lambda: agent.lines("ran"))
    while True:
        try:
            await agent.thread.start("latter.py:main", workdir=agent.folder)
            break
        except outlive.BadRequest:  # it runs at this moment
            await asyncio.sleep(0.01)
    await agent.asleep()
    assert agent.lines() == ["start start exit"]
    assert agent.lines("ran") == ["again", "again"]
    assert await agent.states() == ["done", "done", "done"]


async def test_fifty_ends_at_once_are_a_few_runs_and_none_is_lost(agent: Agent, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    line = 'until [ -e "$0" ]; do sleep 0.05; done'
    ids = await agent.start(*[["sh", "-c", f"{line}; exit {number}", str(gate)] for number in range(50)])
    gate.touch()
    await eventually(lambda: sum(line.count(" exit ") for line in agent.lines()) == 50)
    await agent.asleep()
    told = sorted(end for line in agent.lines()[1:] for end in line.removeprefix("wake: ").split(", "))
    assert told == sorted(f"{process_id} exit {number}" for number, process_id in enumerate(ids))
    assert len(agent.lines()) < 15


async def test_a_program_that_fails_five_times_leaves_dead_letters_and_its_processes_unharmed(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate, other = fifo("gate"), fifo("other")
    process_id, unharmed = await agent.start(held(gate, "exit 9"), held(other, "exit 0"))
    (agent.folder / "fail").touch()
    let_go(gate)
    await agent.home.until(agent.host, event="wake", what="dead", process_id=process_id)
    await agent.asleep()
    assert len(agent.lines()) == 1 + FAILURES_MAX
    (dead,) = await agent.thread.wakes()
    assert (dead.state, dead.failures, dead.process_id) == ("dead", FAILURES_MAX, process_id)
    assert "ValueError: told to fail" in (dead.failure or "")
    assert [row.process_id for row in await agent.thread.processes()] == [unharmed]
    (agent.folder / "fail").unlink()
    await agent.host.retry_wake(dead.number)
    await agent.asleep()
    assert agent.lines()[-1] == f"wake: {process_id} exit 9"
    assert await agent.thread.wakes() == []


@pytest.mark.parametrize("action", ["raise GeneratorExit", "raise BaseException('odd')"])
async def test_a_program_that_raises_what_is_no_exception_has_failed_all_the_same(
    agent: Agent, action: str
) -> None:
    (agent.folder / "odd.py").write_text(f"async def main(session, wake):\n    {action}\n")
    await agent.thread.start("odd.py:main", workdir=agent.folder)
    event = await agent.home.until(agent.host, event="wake", what="failed")
    assert action.split()[1].split("(")[0] in event["failure"]


async def test_a_command_that_cannot_be_executed_is_no_program(agent: Agent) -> None:
    (agent.folder / "agent.py").chmod(0o644)
    for command in (["agent.py"], ["./agent.py"], ["/no/such/program"]):
        with pytest.raises(outlive.BadRequest, match="cannot be executed, or is not in PATH"):
            await agent.thread.start(command, workdir=agent.folder)
    (agent.folder / "run").write_text("#!/bin/sh\nexit 0\n")
    (agent.folder / "run").chmod(0o755)
    await agent.thread.start(["./run"], workdir=agent.folder)
    await agent.asleep()
    assert await agent.states() == ["done"]


async def test_a_program_that_never_awaits_is_ended_when_it_is_stopped_and_its_processes_live(agent: Agent) -> None:
    process_id = (await agent.thread.exec_command(["sleep", "1000"], yield_time_ms=250)).process_id
    (agent.folder / "stuck.py").write_text("import time\nasync def main(session, wake):\n    time.sleep(1000)\n")
    await agent.thread.start("stuck.py:main", workdir=agent.folder)
    await agent.home.until(agent.host, event="wake", what="delivered")
    row = await agent.thread.stop()
    assert (row.program, row.running) == (None, False)
    await agent.asleep()
    assert [one.process_id for one in await agent.thread.processes()] == [process_id]
    assert agent.home.pids("worker") == []


async def test_what_the_agent_has_read_by_itself_is_not_delivered(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    await agent.start()
    gate = fifo("gate")
    started = await agent.thread.exec_command(held(gate, "exit 1"), wake_on=["exit"], yield_time_ms=250)
    (agent.folder / "hold").touch()
    let_go(gate)
    await agent.thread.wait(started.process_id)
    quick = await agent.thread.exec_command("true", wake_on=["exit"])
    assert quick.exit_code == 0
    states = {row.process_id: row.state for row in await agent.thread.wakes(all=True)}
    assert states[quick.process_id] == "read"
    (agent.folder / "hold").unlink()
    await agent.asleep()
    assert [line for line in agent.lines() if quick.process_id in line] == []


async def test_stop_ends_a_program_drops_what_is_due_and_leaves_processes_alone(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    (process_id,) = await agent.start(held(gate, "exit 1"))
    (agent.folder / "hold").touch()
    await agent.start(rest=False)
    await eventually(lambda: len(agent.lines()) == 2)
    row = await agent.thread.stop()
    assert (row.program, row.state, row.wakes, row.detached) == (None, "asleep", 0, 1)
    assert await agent.states() == ["done", "dropped"]
    let_go(gate)
    assert (await agent.thread.wait(process_id)).code == 1
    await agent.home.until(agent.host, event="wake", what="pending", process_id=process_id)  # for the next program
    assert len(agent.lines()) == 2


@pytest.mark.parametrize(
    ("text", "program", "wanted"),
    [
        ("import nothing_of_the_kind", "broken.py:main", "ModuleNotFoundError"),
        ("def other(): ...", "broken.py:main", "has nothing called main"),
        ("def main(session, wake): ...", "broken.py:main", "async def main"),
        ("async def main(): ...", "broken.py:main", "session and a wake"),
        ("raise SystemExit(3)", "broken.py:main", "SystemExit: 3"),
        ("import os; os._exit(3)", "broken.py:main", "exit status 3"),
        ("", "absent.py:main", "is no file"),
        ("", "absent_module:main", "absent_module cannot be imported"),
        ("", "broken.py", "MODULE:FUNCTION"),
    ],
)
async def test_a_broken_program_is_refused_with_its_reason(
    agent: Agent, text: str, program: str, wanted: str
) -> None:
    (agent.folder / "broken.py").write_text(text)
    with pytest.raises(outlive.BadRequest, match=program.replace(".", r"\.")) as refused:
        await agent.thread.start(program, workdir=agent.folder)
    assert wanted in str(refused.value)
    assert await agent.states() == []
    (agent.folder / "broken.py").write_text("async def main(session, wake): ...")
    await agent.thread.start("broken.py:main", workdir=agent.folder)
    await agent.asleep()


async def test_a_command_is_woken_with_json_and_survives_the_death_of_its_worker(
    agent: Agent, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    line = 'cat >>got; printf %s "$OUTLIVE_WAKE" >>variable; echo >>runs; read go <"$0"; exit 0'
    await agent.thread.start(["sh", "-c", line, str(gate)], workdir=agent.folder)
    await eventually(lambda: len(agent.lines("runs")) == 1)
    (worker,) = agent.home.pids("worker")
    os.kill(worker, signal.SIGKILL)
    await agent.home.until(agent.host, event="worker", what="died", how="SIGKILL")
    let_go(gate)
    await agent.asleep()
    assert len(agent.lines("runs")) == 1
    assert agent.lines("got") == agent.lines("variable")
    assert '"reason":"start"' in agent.lines("got")[0]
    assert await agent.states() == ["done"]


async def test_a_wake_too_long_for_a_variable_is_on_standard_input_alone_and_tells_what_was_not_read(
    agent: Agent, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    line = 'until [ -e "$0" ]; do sleep 0.05; done; head -c 20000 /dev/zero | tr "\\0" x; exit 2'
    calls = [agent.thread.exec_command(["sh", "-c", line, str(gate)], yield_time_ms=250) for _ in range(12)]
    ended = [one.process_id for one in await asyncio.gather(*calls)]
    alive = (await agent.thread.exec_command(["sleep", "60"], yield_time_ms=250)).process_id
    await agent.thread.detach()
    gate.touch()
    await asyncio.gather(*(agent.thread.wait(process_id) for process_id in ended))
    command = 'cat >got; echo "${OUTLIVE_WAKE-none}" >variable'
    await agent.thread.start(["sh", "-c", command], workdir=agent.folder)
    await agent.home.until(agent.host, event="wake", what="done")
    assert agent.lines("variable") == ["none"]
    found = {one["process_id"]: one for one in json.loads((agent.folder / "got").read_text())["processes"]}
    assert {process_id: one["state"] for process_id, one in found.items() if process_id in (*ended, alive)} == {
        **dict.fromkeys(ended, "ended"),
        alive: "alive",
    }
    assert all(found[one]["unread"] == 20000 and found[one]["outcome"]["code"] == 2 for one in ended)
    assert all("tokens truncated" in found[one]["output"] for one in ended)


async def test_a_command_that_fails_is_run_again(agent: Agent) -> None:
    await agent.thread.start(["sh", "-c", "echo >>runs; [ $(wc -l <runs) = 3 ]"], workdir=agent.folder)
    await agent.home.until(agent.host, event="wake", what="done")
    await agent.asleep()
    assert len(agent.lines("runs")) == 3


async def test_an_idle_thread_goes_to_bed_and_wakes_when_it_is_called(home: Home) -> None:
    home.write_config("idle_sleep_s = 0.2")
    async with outlive.connect() as host:
        thread = await host.thread("t")
        shell = await thread.exec_command("bash", tty=True, yield_time_ms=250)
        await home.until(host, event="worker", what="died", how="exit status 0")
        (row,) = await host.threads()
        assert (row.state, row.detached) == ("asleep", 1)
        answer = await thread.write_stdin(shell.process_id, "echo $((6 * 7))\n", yield_time_ms=1000)
        assert "42" in answer.output


async def test_programs_and_wakes_on_the_command_line(agent: Agent, fifo: Callable[[str], Path]) -> None:
    async def outlive_(*words: str, status: int = 0) -> Any:
        command = [str(Path(sys.executable).parent / "outlive"), *words]
        done = await asyncio.create_subprocess_exec(*command, cwd=agent.folder, stdout=PIPE, stderr=PIPE)
        out, err = await done.communicate()
        assert done.returncode == status, err
        return json.loads(out) if "--json" in words and not status else (out + err).decode()

    (agent.folder / "todo").write_text("[]")
    row = await outlive_("start", "a", "agent.py:main", "--json")
    assert (row["thread"], row["program"]) == ("a", "agent.py:main")
    await agent.asleep()
    gate = fifo("gate")
    (agent.folder / "fail").touch()
    started = await agent.thread.exec_command(held(gate, "exit 1"), wake_on=["exit"], yield_time_ms=250)
    let_go(gate)
    await agent.home.until(agent.host, event="wake", what="dead")
    (wake,) = await outlive_("wakes", "-t", "a", "--json")
    assert (wake["state"], wake["process_id"], wake["rule"]) == ("dead", started.process_id, "exit")
    assert wake["outcome"] == {"kind": "exited", "code": 1}
    shown = await outlive_("wakes")
    assert "told to fail" in shown
    (thread,) = await outlive_("threads", "--json")
    assert (thread["program"], thread["running"], thread["wakes"]) == ("agent.py:main", False, 0)
    assert "agent.py:main" in await outlive_("threads")
    assert (await outlive_("wakes", "--drop", str(wake["number"]), "--json"))["state"] == "dropped"
    assert "is dropped: nothing is left" in await outlive_("wakes", "--retry", str(wake["number"]), status=1)
    assert "wake 99 is not known" in await outlive_("wakes", "--retry", "99", status=1)
    assert "use its number" in await outlive_("wakes", "--drop", "x", status=2)
    assert [row["state"] for row in await outlive_("wakes", "--all", "--json")] == ["done", "dropped"]
    assert (await outlive_("stop", "a", "--json"))["program"] is None
    assert "thread nobody is not known" in await outlive_("stop", "nobody", status=1)
    events = await outlive_("events")
    assert '"dead"' in events
    line = "touch done-by-a-line"
    assert (await outlive_("start", "a", "--json", "--", line))["program"] == f"/bin/sh -c '{line}'"
    await eventually((agent.folder / "done-by-a-line").exists)


SOURCES = Path(__file__).parents[2] / "scripts" / "examples"


@pytest.mark.parametrize(
    "program",
    [f"{SOURCES / 'babysitter.py'}:main", ["sh", str(SOURCES / "babysitter.sh")]],
    ids=["function", "command"],
)
async def test_the_babysitter_does_its_work_though_the_broker_is_killed(
    agent: Agent, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SUITE_PAUSE", "0.3")
    await agent.host.down()  # programs have the environment of their broker
    async with outlive.connect() as host:
        thread = await host.thread("a")
        await thread.start(program, workdir=agent.folder)
        await eventually(lambda: agent.lines("babysitter.log"))
        await kill_broker(agent.home)
        await eventually(lambda: "all is well" in agent.lines("babysitter.log"))
    log = agent.lines("babysitter.log")
    assert [line for line in log if "started" in line] == ["started everything", "started parser"]
    assert "1 failed" in log[1]
    assert "0 failed" in log[3]
    assert log[4:] == ["all is well"]
