"""What a caller sees while the broker is killed under its call: at most a delay.

The broker is killed at a moment that the kernel or the transcript shows, with the call under way at the worker.
Who starts the next one, a keeper or the client that asks again, makes no difference to these tests.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest

import outlive

from .conftest import HELD, Home, eventually, lives

T = TypeVar("T")

# Types nothing by itself: what it says, it says for a line that it was given.
LINES = ["sh", "-c", "stty -echo; echo ready; while read line; do echo got $line; done"]


async def readable(pidfd: int) -> None:
    """Wait for the end of the process behind `pidfd`."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    await ended.wait()
    asyncio.get_running_loop().remove_reader(pidfd)


async def kill_broker(home: Home) -> int:
    """Kill the broker, see all its threads dead and so its sockets closed, and return its pid."""
    (broker,) = home.pids("broker")
    pidfd = os.pidfd_open(broker)
    os.kill(broker, signal.SIGKILL)
    await readable(pidfd)
    os.close(pidfd)
    return broker


async def until_said(home: Home, thread_id: str, process_id: str, text: bytes) -> None:
    """Wait until a process has printed `text`, on a connection of its own."""
    async with outlive.connect(home.paths) as host:
        thread = outlive.Thread(host, thread_id)
        at = 0
        while text not in await thread.output(process_id):
            at = (await thread.read_output(process_id, at, wait_ms=60_000)).written


async def lines(home: Home, thread: outlive.Thread) -> str:
    shell = await thread.exec_command(LINES, tty=True, yield_time_ms=250)
    await until_said(home, thread.thread_id, shell.process_id, b"ready")
    await thread.write_stdin(shell.process_id, "\n")  # deliver what was printed so far
    return shell.process_id


async def test_an_exec_that_waits_is_answered_in_full_and_started_once(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path], tmp_path: Path
) -> None:
    thread = await host.thread("exec")
    go, runs = fifo("go"), tmp_path / "runs"
    line = f"echo first >>{runs}; {HELD}; exit 3"
    call = asyncio.create_task(
        thread.exec_command(["sh", "-c", line, str(go), "echo second"], yield_time_ms=30_000)
    )
    await eventually(runs.exists)
    await kill_broker(home)
    go.write_text("go\n")
    response = await call
    assert (response.exit_code, response.output) == (3, "second\n")
    assert runs.read_text() == "first\n"


async def test_input_of_a_call_that_waits_is_typed_once_and_answered(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("write")
    process_id = await lines(home, thread)
    call = asyncio.create_task(thread.write_stdin(process_id, "once\n", yield_time_ms=3_000))
    await until_said(home, "write", process_id, b"got once")
    await kill_broker(home)
    response = await call
    assert (response.output.split(), response.typed) == (["got", "once"], 5)
    await thread.write_stdin(process_id, "end\n", yield_time_ms=250)
    await until_said(home, "write", process_id, b"got end")
    assert (await thread.output(process_id)).count(b"got once") == 1


async def test_input_is_typed_once_whenever_the_broker_dies(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("often")
    process_id = await lines(home, thread)
    words = [f"word-{number}" for number in range(6)]
    for word in words:
        call = asyncio.create_task(thread.write_stdin(process_id, f"{word}\n", yield_time_ms=250))
        for _ in words[: words.index(word)]:  # a turn later each time: before it is sent, on its way, typed
            await asyncio.sleep(0)
        await kill_broker(home)
        assert (await call).typed == len(word) + 1
    await until_said(home, "often", process_id, words[-1].encode())
    said = (await thread.output(process_id)).decode().split()
    assert [word for word in said if word.startswith("word")] == words


async def test_the_end_that_a_lost_answer_told_is_told_again(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("last")
    process_id = await lines(home, thread)
    (worker,) = home.pids("worker")
    call = asyncio.create_task(thread.write_stdin(process_id, "x\n", yield_time_ms=30_000))
    await until_said(home, "last", process_id, b"got x")
    (row,) = await thread.processes()
    await kill_broker(home)
    os.kill(row.pid or 0, signal.SIGKILL)  # the worker answers a broker that is not there
    response = await call
    assert (response.exit_code, response.output.split(), response.typed) == (137, ["got", "x"], 2)
    assert home.pids("worker") == [worker]


async def test_input_is_typed_once_and_answered_when_worker_and_broker_die_at_once(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("both")
    process_id = await lines(home, thread)
    call = asyncio.create_task(thread.write_stdin(process_id, "once\n", yield_time_ms=30_000))
    await until_said(home, "both", process_id, b"got once")
    (worker,) = home.pids("worker")
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGSTOP)  # else it sends the call to the next worker
    os.kill(worker, signal.SIGKILL)
    os.kill(broker, signal.SIGKILL)
    answer = asyncio.create_task(thread.write_stdin(process_id, "end\n"))
    await until_said(home, "both", process_id, b"got end")
    assert (await answer).typed == 4
    await thread.kill(process_id)
    response = await call
    assert (response.typed, response.exit_code) == (5, 143)
    assert response.output.split()[:2] == ["got", "once"]
    assert (await thread.output(process_id)).count(b"got once") == 1


async def test_the_answer_to_a_former_broker_is_not_taken_for_one_to_the_next(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("mixed")
    process_id = await lines(home, thread)
    call = asyncio.create_task(thread.write_stdin(process_id, "x\n", yield_time_ms=2_500))
    await until_said(home, "mixed", process_id, b"got x")
    await kill_broker(home)
    # Each broker counts its requests from 1: one of these has the number that the worker still has to answer.
    waiting = [asyncio.create_task(thread.exec_command(["sleep", "1000"], yield_time_ms=6_000)) for _ in range(8)]
    assert process_id not in {answer.process_id for answer in await asyncio.gather(*waiting)}
    assert (await call).process_id == process_id


@pytest.mark.parametrize("ask", ["wait", "follow"])
async def test_a_wait_and_a_follow_go_on_to_the_end_of_the_process(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path], ask: str
) -> None:
    thread = await host.thread("wait")
    go = fifo("go")
    child = await thread.exec_command(
        ["sh", "-c", f"echo first; {HELD}; exit 4", str(go), "echo second"], yield_time_ms=250
    )

    async def wait() -> outlive.Outcome:
        return await thread.wait(child.process_id)

    async def follow() -> outlive.Outcome:
        printed = b""
        async for output in thread.follow(child.process_id):
            printed += b"".join(data for _, data in output.pieces)
            if output.ended:
                assert printed == b"first\nsecond\n"
                assert output.outcome is not None
                return outlive.Outcome(**output.outcome)
        raise AssertionError("it ended without an outcome")

    asked: dict[str, Callable[[], Awaitable[outlive.Outcome]]] = {"wait": wait, "follow": follow}
    call = asyncio.ensure_future(asked[ask]())
    # An answer to a later request says that the broker has this one.
    await host.status()
    for _ in range(2):
        await kill_broker(home)
        await host.status()
    go.write_text("go\n")
    assert await call == outlive.Outcome("exited", code=4)


@pytest.mark.skipif(
    find_spec("outlive.broker.keeper") is None, reason="nobody else holds what a worker gives to a dying broker"
)
async def test_a_detach_is_carried_to_its_end_by_the_next_broker(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("detach")
    go = fifo("go")
    child = await thread.exec_command(["sh", "-c", f"{HELD}; exit 5", str(go), "echo done"], yield_time_ms=250)
    (worker,) = home.pids("worker")
    os.kill(worker, signal.SIGSTOP)  # so that the broker dies while it waits for it
    call = asyncio.create_task(thread.detach())
    await host.status()
    await kill_broker(home)
    os.kill(worker, signal.SIGCONT)
    assert (await call).process_ids == [child.process_id]
    await eventually(lambda: not lives(worker))
    go.write_text("go\n")
    assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=5)


async def test_a_signal_that_may_have_been_sent_is_sent_again_only_if_that_changes_nothing(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("kill")
    child = await thread.exec_command(
        ["sh", "-c", "trap 'echo got it' USR1; echo ready; while :; do sleep 0.01; done"], yield_time_ms=250
    )
    for name in ("USR1", "TERM"):
        call = await _asked_of_a_stopped_broker(home, thread.kill(child.process_id, signal=name))
        with pytest.raises(outlive.Interrupted):
            await call
        await host.status()
    call = await _asked_of_a_stopped_broker(home, thread.kill(child.process_id, signal="KILL"))
    await call
    assert (await thread.wait(child.process_id)).signal == 9
    assert await thread.output(child.process_id) == b"ready\n"


async def _asked_of_a_stopped_broker(home: Home, asking: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Return a call that its broker has not read when it is killed."""
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGSTOP)
    call = asyncio.create_task(asking)
    await asyncio.sleep(0)  # it is sent in its first turn
    await kill_broker(home)
    return call


async def test_events_go_on_with_those_of_the_next_broker_and_end_with_the_last(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("events")
    async with outlive.connect(home.paths, start=False) as other, aclosing(other.events(recent=True)) as events:
        first = await anext(events)
        assert (first["event"], first["what"], first["seq"]) == ("broker", "up", 1)
        await kill_broker(home)
        await host.status()
        async for event in events:
            if event["event"] == "broker":
                break
        assert (event["what"], event["seq"]) == ("up", 1)
        assert event["pid"] != first["pid"]
        call = asyncio.create_task(thread.exec_command("true"))
        async for event in events:
            if event["event"] == "begin":
                break
        await call
        await host.down(force=True)
        assert [event["event"] async for event in events][-1:] in ([], ["broker"])


async def test_a_client_that_may_not_start_a_broker_goes_on_with_the_next(home: Home, host: outlive.Host) -> None:
    async with outlive.connect(home.paths, start=False) as other:
        broker = await kill_broker(home)
        call = asyncio.create_task(other.status())
        await host.status()  # this one may
        assert (await call)["broker_pid"] != broker


async def test_a_socket_that_nobody_holds_any_more_keeps_nobody_from_starting_a_broker(home: Home) -> None:
    async with outlive.connect(home.paths):
        pass
    pids = [pid for role in ("broker.keeper", "broker") for pid in home.pids(role)]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # each would replace the other
        for pid in pids:
            os.kill(pid, number)
    await eventually(lambda: not any(lives(pid) for pid in pids))
    assert home.paths.channel.exists()
    with pytest.raises(outlive.Unavailable, match="killed"):
        async with outlive.connect(home.paths, start=False):
            pass
    async with outlive.connect(home.paths) as host:
        assert (await host.status())["broker_pid"] not in pids
