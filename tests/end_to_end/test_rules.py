"""Wake rules on real processes: each wakes once, wherever these are held, asleep or awake, over every death.

The threads here have no program, so that what they are to be woken for stays to be looked at.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

import outlive
from outlive.common.program import WakeRow

from .conftest import HELD, PYTHON, Home, ended_within, eventually, state_of

Fifo = Callable[[str], Path]
# `python -c SAY FIFO`: says what is written into the named pipe, as soon as it comes; ends for the word `end`.
SAY = """
import os, sys
while True:
    with open(sys.argv[1], "rb", 0) as pipe:
        while said := pipe.read(4096):
            if said == b"end":
                sys.exit(5)
            os.write(1, said)
"""


class Sayer:
    """A process that says what it is told to, with rules."""

    def __init__(self, thread: outlive.Thread, pipe: Path) -> None:
        self.thread = thread
        self.pipe = pipe
        self.process_id = ""

    async def start(self, *rules: object) -> Sayer:
        command = [*PYTHON, SAY, str(self.pipe)]
        self.process_id = (await self.thread.exec_command(command, wake_on=rules, yield_time_ms=250)).process_id
        return self

    async def say(self, text: str) -> None:
        """Have it say something, and see that in its transcript."""
        before = (await self.thread.read_output(self.process_id)).written
        self.pipe.write_text(text)
        while (await self.thread.read_output(self.process_id)).written < before + len(text):
            await asyncio.sleep(0.005)

    async def woken(self, count: int = 1) -> list[tuple[str, str | None]]:
        """Return what the thread is to be woken for, once that is so many things: rule, and text of a match."""
        return [(row.rule, row.text) for row in await woken(self.thread, count)]


async def woken(thread: outlive.Thread, count: int = 1) -> list[WakeRow]:
    while len(rows := await thread.wakes(all=True)) < count or any(row.state == "new" for row in rows):
        await asyncio.sleep(0.005)
    return rows


@pytest.fixture
async def sayer(host: outlive.Host, fifo: Fifo) -> Sayer:
    return Sayer(await host.thread("t"), fifo("say"))


async def kill(home: Home, role: str) -> None:
    for pid in home.pids(role):
        os.kill(pid, signal.SIGKILL)
        assert ended_within(pid, 30)


async def test_a_watch_that_is_asked_again_under_an_older_id_takes_no_place_of_the_next(sayer: Sayer) -> None:
    await sayer.start()
    for number in (1, 2):
        await sayer.thread.watch(sayer.process_id, {"output": "error [0-9]"}, watch_id=f"w{number}")
        await sayer.say(f"error {number}, ")
        await sayer.woken(number)
    rows = [
        await sayer.thread.watch(sayer.process_id, {"output": "error [0-9]"}, watch_id=watch_id)
        for watch_id in ("w1", "w3", "w2")
    ]
    assert [row.open for (row,) in rows] == [False, True, False]
    await sayer.say("error 3, ")
    assert [text for _, text in await sayer.woken(3)] == ["error 1", "error 2", "error 3"]


async def test_a_setting_that_is_refused_leaves_what_matched_before_known(sayer: Sayer) -> None:
    await sayer.start()
    await sayer.thread.watch(sayer.process_id, {"output": "ready [0-9]"})
    await sayer.say("ready 1\n")
    await sayer.woken(1)
    await sayer.thread.watch(sayer.process_id, *({"output": f"never {number}"} for number in range(7)))
    with pytest.raises(outlive.LimitReached):
        await sayer.thread.watch(sayer.process_id, {"output": "ready [0-9]"}, {"output": "other"})
    await sayer.thread.watch(sayer.process_id, {"output": "ready [0-9]"})
    await sayer.say("ready 2\n")
    assert [text for _, text in await sayer.woken(2)] == ["ready 1", "ready 2"]


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
async def test_a_match_across_pieces_wakes_once_with_offset_and_text(sayer: Sayer, asleep: bool) -> None:
    await sayer.start({"output": "^all [a-z]+ passed"})
    if asleep:
        await sayer.thread.detach()
    for piece in ("1\nal", "l tes", "ts pas"):
        await sayer.say(piece)
    assert await sayer.thread.wakes() == []
    await sayer.say("sed, all tests passed")
    (row,) = await woken(sayer.thread)
    assert (row.rule, row.offset, row.text) == ("output=^all [a-z]+ passed", 2, "all tests passed")


async def test_a_match_and_an_end_in_the_same_breath_both_wake(host: outlive.Host, fifo: Fifo) -> None:
    thread, go = await host.thread("t"), fifo("go")
    await thread.exec_command(
        ["sh", "-c", HELD, str(go), "printf bye; exit 4"], wake_on=["exit", {"output": "bye$"}], yield_time_ms=250
    )
    await thread.detach()
    go.write_text("go\n")
    found, ended = await woken(thread, 2)
    assert (found.rule, found.text) == ("output=bye$", "bye")
    assert (ended.rule, ended.outcome) == ("exit", {"kind": "exited", "code": 4})


async def test_output_that_a_dead_worker_had_not_looked_at_is_looked_at_by_the_broker(
    home: Home, host: outlive.Host, sayer: Sayer
) -> None:
    await sayer.start({"output": "found"})
    worker = await home.worker(host, "t")
    os.kill(worker, signal.SIGSTOP)
    await eventually(lambda: state_of(worker) == "T")
    sayer.pipe.write_text("found by whom?")
    os.kill(worker, signal.SIGKILL)
    assert await sayer.woken() == [("output=found", "found")]


async def test_a_match_while_no_broker_is_there_wakes_once_it_is_back(home: Home, sayer: Sayer) -> None:
    await sayer.start({"output": "found"})
    (keeper,) = home.pids("broker.keeper")
    os.kill(keeper, signal.SIGSTOP)  # so that nobody starts the next one
    await kill(home, "broker")
    sayer.pipe.write_text("found")
    (worker,) = home.pids("worker")
    await eventually(lambda: state_of(worker) == "S")
    os.kill(keeper, signal.SIGCONT)
    assert await sayer.woken() == [("output=found", "found")]
    await kill(home, "broker")
    assert await sayer.woken() == [("output=found", "found")]


async def test_a_watched_process_wakes_by_any_end_while_a_rule_is_open(host: outlive.Host) -> None:
    thread = await host.thread("t")
    sleeper = await thread.exec_command(["sleep", "1000"], wake_on=[{"port": 1}], yield_time_ms=250)
    await thread.kill(sleeper.process_id, signal="KILL")
    (row,) = await woken(thread)
    assert (row.rule, row.outcome) == ("exit", {"kind": "signaled", "signal": 9, "by": "caller"})


async def test_clock_rules_count_on_while_the_broker_is_dead_and_from_the_last_output(
    home: Home, sayer: Sayer
) -> None:
    await sayer.start({"deadline": 4}, {"silence": 2})
    await sayer.thread.detach()
    await asyncio.sleep(1)  # of the clocks that are looked at here
    await sayer.say("not yet")
    said = datetime.now(UTC)
    await asyncio.sleep(1)
    await kill(home, "broker")
    silence, deadline = await woken(sayer.thread, 2)
    assert (silence.rule, deadline.rule) == ("silence=2", "deadline=4")
    (row,) = await sayer.thread.processes()
    seconds = [
        (datetime.fromisoformat(wake.at) - since).total_seconds()
        for wake, since in ((silence, said), (deadline, datetime.fromisoformat(row.started_at)))
    ]
    # Counted from zero again by the second broker, each would have been a second late, or two.
    assert 1.9 <= seconds[0] < 3
    assert 3.9 <= seconds[1] < 6


# Rules that are added.


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
async def test_a_rule_that_is_added_wakes_for_what_was_printed_or_will_be(sayer: Sayer, asleep: bool) -> None:
    await sayer.start()
    await sayer.say("early")
    if asleep:
        await sayer.thread.detach()
    rows = await sayer.thread.watch(sayer.process_id, {"output": "early"}, {"output": "late"}, "exit")
    assert [row.open for row in rows] == [False, True, True]
    assert await sayer.woken() == [("output=early", "early")]
    await sayer.say("late")
    assert (await sayer.woken(2))[1] == ("output=late", "late")
    sayer.pipe.write_text("end")
    assert (await sayer.woken(3))[2] == ("exit", None)


async def test_a_rule_that_was_added_survives_the_death_of_everybody_but_the_keeper(
    home: Home, host: outlive.Host, sayer: Sayer
) -> None:
    await sayer.start()
    await sayer.thread.watch(sayer.process_id, {"output": "found"})
    (keeper,) = home.pids("broker.keeper")
    os.kill(keeper, signal.SIGSTOP)
    for role in ("broker", "worker", "worker.spawner"):
        await kill(home, role)
    os.kill(keeper, signal.SIGCONT)
    await sayer.say("found")
    assert await sayer.woken() == [("output=found", "found")]


async def test_a_rule_that_was_added_goes_with_its_process_from_hand_to_hand(
    home: Home, host: outlive.Host, sayer: Sayer
) -> None:
    await sayer.start()
    await sayer.thread.watch(sayer.process_id, {"output": "found"})
    await sayer.thread.detach()
    await sayer.thread.resume()
    await home.kill_worker(host, "t")
    await kill(home, "broker")
    await sayer.say("found")
    assert await sayer.woken() == [("output=found", "found")]


async def test_a_rule_that_came_true_is_set_anew_and_the_same_watch_twice_is_one(sayer: Sayer) -> None:
    await sayer.start({"output": "error [0-9]"})
    await sayer.say("error 1, error 2, ")
    assert await sayer.woken() == [("output=error [0-9]", "error 1")]
    for _ in range(2):
        await sayer.thread.watch(sayer.process_id, {"output": "error [0-9]"}, watch_id="once")
    assert await sayer.woken(2) == [("output=error [0-9]", f"error {n}") for n in (1, 2)]
    await sayer.thread.watch(sayer.process_id, {"output": "error [0-9]"})
    await sayer.thread.watch(sayer.process_id, {"output": "error [0-9]"})  # it is open: the same
    await sayer.say("error 3, error 4")
    assert len(await sayer.woken(3)) == 3


async def test_rules_on_a_process_that_has_ended_or_gone_are_decided_at_once(
    host: outlive.Host, sayer: Sayer
) -> None:
    await sayer.start()
    await sayer.say("some last words")
    await sayer.thread.detach()
    sayer.pipe.write_text("end")
    await sayer.thread.wait(sayer.process_id)
    for number in range(2):
        rows = await sayer.thread.watch(sayer.process_id, {"output": "last words$"}, "exit", watch_id=str(number))
        assert not any(row.open for row in rows)
        told = await sayer.woken(2 * number + 2)
        assert told[2 * number :] == [("output=last words$", "last words"), ("exit", None)]
        await sayer.thread.write_stdin(sayer.process_id)  # it is collected now
    assert (await woken(sayer.thread, 4))[3].outcome == {"kind": "exited", "code": 5}


async def test_too_many_rules_are_refused_whole(sayer: Sayer) -> None:
    await sayer.start(*({"output": f"never {number}"} for number in range(7)))
    with pytest.raises(outlive.LimitReached, match="8 wake rules are about its output"):
        await sayer.thread.watch(sayer.process_id, {"output": "eighth"}, {"output": "ninth"})
    (row,) = await sayer.thread.watch(sayer.process_id, {"output": "ninth"})
    assert row.open
    await sayer.say("the ninth")
    assert await sayer.woken() == [("output=ninth", "ninth")]


async def test_rules_without_a_clock_cost_an_idle_broker_no_wake_up(home: Home, sayer: Sayer) -> None:
    await sayer.start("exit", {"output": "never"})
    await sayer.thread.detach()
    (broker,) = home.pids("broker")

    def switches() -> int:
        total = 0
        for task in os.listdir(f"/proc/{broker}/task"):
            status = Path(f"/proc/{broker}/task/{task}/status").read_text()
            total += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return total

    async def quiet() -> bool:
        before = switches()
        await asyncio.sleep(1)  # of the machine's time, in which nothing may happen
        return switches() == before

    while not await quiet():  # what was going on before comes to its end
        pass
