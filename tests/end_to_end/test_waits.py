"""Waiting by rules, with real processes: true wherever these are held, over every death, and waking nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import outlive
from outlive.common.messages import WaitRow

from .conftest import HELD, PYTHON, Home, ended_within

Fifo = Callable[[str], Path]
# `python -c SAY FIFO`: says each line of the named pipe, without its end, as soon as it comes.
SAY = """
import os, sys
while True:
    for line in open(sys.argv[1], "rb"):
        os.write(1, line[:-1].decode("unicode_escape").encode())
"""


async def sayer(thread: outlive.Thread, pipe: Path) -> str:
    """Start what says what is written into `pipe`."""
    return (await thread.exec_command([*PYTHON, SAY, str(pipe)], yield_time_ms=250)).process_id


async def kill_broker(home: Home) -> None:
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGKILL)
    assert ended_within(broker, 30)


async def begun(wait: asyncio.Task[WaitRow], home: Home) -> None:
    """Let a wait reach the broker: it answers in order, so that a later request shows that."""
    await asyncio.sleep(0)
    async with outlive.connect(home.paths) as other:
        await other.status()
    assert not wait.done()


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
async def test_only_what_was_printed_from_the_byte_that_is_named_counts(
    home: Home, host: outlive.Host, fifo: Fifo, asleep: bool
) -> None:
    thread, pipe = await host.thread("t"), fifo("say")
    process_id = await sayer(thread, pipe)
    if asleep:
        await thread.detach()
    prompt = {"output": "> "}
    pipe.write_text("> one \n")
    assert (await thread.wait_until(process_id, prompt)).offset == 0
    wait = asyncio.create_task(thread.wait_until(process_id, prompt, since=1))
    await begun(wait, home)
    pipe.write_text("> two\n")
    assert (await wait).offset == 6
    await thread.kill(process_id, signal="KILL")
    await thread.wait(process_id)
    # The same of one that has ended, and of which only the record is left.
    for _ in range(2):
        found = [(await thread.wait_until(process_id, prompt, since=since)).offset for since in (0, 1, 6, 7)]
        assert found == [0, 6, 6, None]
        await thread.write_stdin(process_id)


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
async def test_output_is_found_across_pieces_and_a_sleeping_thread_stays_asleep(
    home: Home, host: outlive.Host, fifo: Fifo, asleep: bool
) -> None:
    thread, pipe = await host.thread("t"), fifo("say")
    process_id = await sayer(thread, pipe)
    if asleep:
        await thread.detach()
    wait = asyncio.create_task(thread.wait_until(process_id, {"output": "^ready to serve$"}))
    await begun(wait, home)
    size = 0
    for piece in ("not re", "ady\\nrea", "dy to ", "serve"):
        pipe.write_text(piece + "\n")
        size += len(piece.encode().decode("unicode_escape"))
        while (await thread.processes())[0].bytes_written < size:
            await asyncio.sleep(0.005)
    await begun(wait, home)  # it may be `ready to serve you` yet
    pipe.write_text("\\n\n")
    row = await wait
    assert (row.rule, row.offset, row.text, row.outcome) == ("output=^ready to serve$", 10, b"ready to serve", None)
    (thread_row,) = await host.threads()
    assert thread_row.state == ("asleep" if asleep else "awake")


async def test_what_was_printed_before_counts_also_of_a_process_that_has_ended_or_gone(host: outlive.Host) -> None:
    thread = await host.thread("t")
    done = await thread.exec_command(["sh", "-c", "printf 'all done'; exit 3"])
    assert done.exit_code == 3
    for _ in range(2):  # the first time it may still be held
        assert (await thread.wait_until(done.process_id, {"output": "done$"})).text == b"done"
    ended = await thread.wait_until(done.process_id, {"output": "failed"}, {"port": 1})
    assert (ended.rule, ended.outcome) == (None, {"kind": "exited", "code": 3})
    assert (await thread.wait_until(done.process_id, "exit")).rule == "exit"


async def test_a_match_and_an_end_in_the_same_breath_is_a_match(host: outlive.Host, fifo: Fifo) -> None:
    thread, go = await host.thread("t"), fifo("go")
    held = await thread.exec_command(["sh", "-c", HELD, str(go), "printf bye; exit 4"], yield_time_ms=250)
    wait = asyncio.create_task(thread.wait_until(held.process_id, "exit", {"output": "bye$"}))
    end = asyncio.create_task(thread.wait(held.process_id))
    go.write_text("go\n")
    assert (await wait).rule == "output=bye$"
    assert (await end).code == 4


async def test_a_wait_goes_on_over_the_deaths_of_worker_and_broker(
    home: Home, host: outlive.Host, fifo: Fifo
) -> None:
    thread, pipe = await host.thread("t"), fifo("say")
    process_id = await sayer(thread, pipe)
    wait = asyncio.create_task(thread.wait_until(process_id, {"output": "over all"}))
    await begun(wait, home)
    await home.kill_worker(host, "t")
    await kill_broker(home)
    pipe.write_text("over all\n")
    assert (await wait).text == b"over all"


async def test_silence_and_deadline_count_from_the_beginning_over_a_broker_that_is_killed(
    home: Home, host: outlive.Host, fifo: Fifo
) -> None:
    thread, pipe = await host.thread("t"), fifo("say")
    process_id = await sayer(thread, pipe)
    await thread.detach()
    waits = [
        asyncio.create_task(thread.wait_until(process_id, rule)) for rule in ({"silence": 1.5}, {"deadline": 1.5})
    ]
    began = asyncio.get_running_loop().time()
    await begun(waits[0], home)
    await asyncio.sleep(1)  # of the clock that is measured here
    await kill_broker(home)
    assert [(await wait).rule for wait in waits] == ["silence=1.5", "deadline=1.5"]
    assert asyncio.get_running_loop().time() - began < 1 + 1.5


async def test_a_port_is_found_when_something_listens_on_it(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("t")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = f"import socket; s = socket.socket(); s.bind(('127.0.0.1', {port})); input(); s.listen(); input()"
    server = await thread.exec_command([*PYTHON, serve], tty=True, yield_time_ms=250)
    wait = asyncio.create_task(thread.wait_until(server.process_id, {"port": port}))
    await begun(wait, home)
    await thread.write_stdin(server.process_id, "\n")
    assert (await wait).rule == f"port={port}"


async def test_a_pathological_expression_holds_nobody_up(host: outlive.Host) -> None:
    thread = await host.thread("t")
    flood = await thread.exec_command([*PYTHON, "while True: print('a' * 999, end='!')"], yield_time_ms=250)
    wait = asyncio.create_task(thread.wait_until(flood.process_id, {"output": "(a+)+$"}))
    other = await thread.exec_command(["echo", "quick"])
    assert other.output == "quick\n"
    assert not wait.done()
    wait.cancel()
    await thread.kill(flood.process_id, signal="KILL")


async def test_callers_that_have_gone_leave_room_for_others(home: Home, host: outlive.Host, fifo: Fifo) -> None:
    thread, pipe = await host.thread("t"), fifo("say")
    process_id = await sayer(thread, pipe)
    for number in range(20):
        with pytest.raises(TimeoutError):
            await thread.wait_until(process_id, {"output": f"never {number}"}, timeout=0.05)
        async with outlive.connect(home.paths) as other:  # one that goes, with its wait
            rules = [{"output": f"{letter} never {number}"} for letter in "abc"]
            with pytest.raises(TimeoutError):
                await outlive.Thread(other, "t").wait_until(process_id, *rules, timeout=0.05)
    pipe.write_text("now\n")
    assert (await thread.wait_until(process_id, {"output": "now"})).text == b"now"


async def test_a_wrong_rule_is_refused_before_anything_is_started(host: outlive.Host) -> None:
    thread = await host.thread("t")
    with pytest.raises(outlive.BadRequest, match="no expression of RE2's"):
        await thread.exec_command(["true"], wake_on=[{"output": "("}])
    assert await thread.processes(ended=True) == []
