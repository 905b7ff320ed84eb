"""Detach, resume, reattach, clean, shutdown: who has a thread's processes, and what its clients hear of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import outlive

from .conftest import HELD, Home, Numbered, eventually, lives


async def two_cats(host: outlive.Host, name: str) -> tuple[outlive.Thread, list[str]]:
    thread = await host.thread(name)
    started = [
        await thread.exec_command(["sh", "-c", "stty -echo; echo up; exec cat"], tty=True, yield_time_ms=250)
        for _ in range(2)
    ]
    for one in started:
        while b"up" not in await thread.output(one.process_id):
            await thread.read_output(one.process_id, one.output_end, wait_ms=5000)
    return thread, sorted(one.process_id for one in started)


async def typed(thread: outlive.Thread, process_id: str, text: str, *, resume: bool = True) -> None:
    """Type a line into a cat, and see it come back."""
    at = (await thread.read_output(process_id)).written
    await thread.write_stdin(process_id, text + "\n", resume=resume)
    wanted = text.encode() + b"\r\n"
    while not (await thread.output(process_id))[at:].endswith(wanted):
        await thread.read_output(process_id, at + len(wanted) - 1, wait_ms=5000)


async def test_detach_names_the_processes_and_ends_the_worker(home: Home, host: outlive.Host) -> None:
    thread, ids = await two_cats(host, "bed")
    pids = [row.pid for row in await thread.processes()]
    summary = await thread.detach()
    assert (summary.process_count, summary.process_ids) == (2, ids)
    assert home.pids("worker") == []
    assert home.pids("worker.spawner") == []
    rows = await thread.processes()
    assert [(row.state, row.worker_pid) for row in rows] == [("detached", None)] * 2
    assert [row.pid for row in rows] == pids
    (row,) = await host.threads()
    assert (row.state, row.worker_pid, row.detached) == ("asleep", None, 2)


async def test_five_handoffs_in_a_row_lose_and_mix_up_nothing(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("row")
    children = [await Numbered.start(thread, home.path, tty=tty) for tty in (True, False)]
    ids = sorted(child.process_id for child in children)
    cats, cat_ids = await two_cats(host, "row")
    for number in range(5):
        for child in children:
            await child.more(50_000)
        assert (await thread.detach()).process_ids == sorted(ids + cat_ids)
        for child in children:
            await child.more(200_000)
        await asyncio.gather(*(typed(cats, name, f"asleep {number} {name}", resume=False) for name in cat_ids))
        row = await thread.resume()
        assert (row.state, row.attached, row.detached, row.epoch) == ("awake", 4, 0, number + 2)
        await asyncio.gather(*(typed(cats, name, f"awake {number} {name}") for name in cat_ids))
    for child in children:
        assert await child.finish() == outlive.Outcome("exited", code=7)
        await child.check()
    for name in cat_ids:
        lines = [f"{state} {number} {name}\r\n" for number in range(5) for state in ("asleep", "awake")]
        assert await thread.output(name) == b"up\r\n" + "".join(lines).encode()


async def test_detach_that_keeps_the_worker_and_reattach_give_and_take_the_same(
    home: Home, host: outlive.Host
) -> None:
    thread, ids = await two_cats(host, "keep")
    worker = await home.worker(host, "keep")
    assert (await thread.detach(keep_worker=True)).process_ids == ids
    assert {row.state for row in await thread.processes()} == {"detached"}
    assert home.pids("worker") == [worker]
    await typed(thread, ids[0], "while detached")
    summary = await thread.reattach()
    assert (summary.reattached_count, summary.skipped_count, summary.skipped_process_ids) == (2, 0, [])
    assert {(row.state, row.worker_pid) for row in await thread.processes()} == {("attached", worker)}
    await typed(thread, ids[1], "and after")
    assert (await thread.reattach()).reattached_count == 0


async def test_detach_of_an_unknown_thread_is_empty_and_reattach_and_resume_of_one_are_errors(
    host: outlive.Host,
) -> None:
    unknown = outlive.Thread(host, "nobody")
    summary = await unknown.detach()
    assert (summary.process_count, summary.process_ids) == (0, [])
    for act in (unknown.reattach, unknown.resume, unknown.clean, unknown.shutdown, unknown.processes):
        with pytest.raises(outlive.UnknownThread, match="nobody"):
            await act()
    assert await host.threads() == []


async def test_reattach_of_a_sleeping_thread_is_an_error_that_says_what_to_do(host: outlive.Host) -> None:
    thread = await host.thread("sleeping")
    with pytest.raises(outlive.BadRequest, match="resume sleeping"):
        await thread.reattach()


async def test_input_while_detached_is_typed_without_waking_the_thread(home: Home, host: outlive.Host) -> None:
    thread, ids = await two_cats(host, "input")
    await thread.detach()
    for name in ids:
        await typed(thread, name, f"for {name}", resume=False)
    assert home.pids("worker") == []
    await typed(thread, ids[0], "and this wakes it")
    assert len(home.pids("worker")) == 1


@pytest.mark.parametrize("tty", [True, False])
async def test_a_process_that_ends_while_detached_has_one_end_event_and_only_at_reattach(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path], tty: bool
) -> None:
    thread = await host.thread("ends")
    go = fifo("go")
    argv = ["sh", "-c", HELD, str(go), "echo bye; exit 9"]
    child = await thread.exec_command(argv, tty=tty, yield_time_ms=250, call_id="the-call")
    await thread.detach()
    go.write_text("go\n")
    assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=9)
    (row,) = await thread.processes(ended=True)
    assert (row.state, row.outcome) == ("ended", {"kind": "exited", "code": 9})
    about = [event for event in await host.recent_events() if event["process_id"] == child.process_id]
    assert [event["event"] for event in about] == ["begin", "detached"]
    await thread.resume()
    await home.until(host, event="end", process_id=child.process_id)
    for _ in range(2):  # no further handoff says it again
        await thread.detach()
        await thread.resume()
    ends = [event for event in await host.recent_events() if event["event"] == "end"]
    assert [(event["call_id"], event["outcome"]["code"]) for event in ends] == [("the-call", 9)]
    answer = await thread.write_stdin(child.process_id)
    assert (answer.exit_code, answer.output) == (9, "bye\r\n" if tty else "bye\n")


async def test_clean_ends_what_is_detached_and_leaves_attached_ones_alone(home: Home, host: outlive.Host) -> None:
    thread, ids = await two_cats(host, "clean")
    await thread.detach(keep_worker=True)
    attached = await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
    pids = {row.process_id: row.pid for row in await thread.processes()}
    after = await home.last_event(host)
    summary = await thread.clean()
    assert (summary.process_count, summary.process_ids) == (2, ids)
    for process_id in ids:
        assert not lives(pids[process_id] or 0)
        expected = outlive.Outcome("signaled", signal=9, by="cleaned")
        assert await thread.wait(process_id) == expected
    (row,) = await thread.processes()
    assert (row.process_id, row.pid, row.state) == (attached.process_id, pids[attached.process_id], "attached")
    # Their watchers were aborted: nothing is said of their ends.
    assert not [e for e in await host.recent_events() if e["seq"] > after and e["event"] == "end"]
    assert (await thread.clean()).process_count == 0


async def test_shutdown_of_a_thread_ends_what_is_attached_and_spares_what_is_detached(
    home: Home, host: outlive.Host
) -> None:
    thread, ids = await two_cats(host, "shut")
    await thread.detach(keep_worker=True)
    attached = await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
    row = await thread.shutdown()
    assert (row.state, row.worker_pid, row.attached, row.detached) == ("asleep", None, 0, 2)
    assert await thread.wait(attached.process_id) == outlive.Outcome("signaled", signal=9, by="shutdown")
    assert sorted(row.process_id for row in await thread.processes()) == ids
    await typed(thread, ids[0], "still here")
    row = await thread.shutdown(all=True)
    assert (row.attached, row.detached) == (0, 0)
    assert await thread.processes() == []
    assert not [event for event in await host.recent_events() if event["event"] == "end"]


async def test_shutdown_of_everything_ends_detached_and_attached_in_every_thread(
    home: Home, host: outlive.Host
) -> None:
    first, _ = await two_cats(host, "first")
    await first.detach()
    second, _ = await two_cats(host, "second")
    pids = [row.pid for row in await host.processes()]
    rows = await host.shutdown()
    assert sorted((row.thread, row.state) for row in rows) == [("first", "asleep"), ("second", "asleep")]
    assert await host.processes() == []
    assert not [pid for pid in pids if lives(pid or 0)]
    assert home.pids("worker") == []
    ended = await second.processes(ended=True)
    assert {row.outcome and row.outcome.get("by") for row in ended} == {"shutdown"}


async def test_down_refuses_and_names_what_lives_until_it_is_forced(home: Home, host: outlive.Host) -> None:
    thread, ids = await two_cats(host, "alive")
    (broker,) = home.pids("broker")
    with pytest.raises(outlive.BadRequest) as refused:
        await host.down()
    assert all(f"alive/{process_id}" in str(refused.value) for process_id in ids)
    assert {row.state for row in await thread.processes()} == {"attached"}
    assert (await host.down(force=True))["ended"] == [f"alive/{process_id}" for process_id in ids]
    await eventually(lambda: not os.path.exists(f"/proc/{broker}"))
    assert home.pids() == []
    assert home.sockets() == []


async def test_a_call_meets_a_detached_thread_and_wakes_it(home: Home, host: outlive.Host) -> None:
    thread, ids = await two_cats(host, "wakes")
    await thread.detach()
    echoed = await thread.exec_command(["echo", "hello"])
    assert echoed.output == "hello\n"
    assert {row.state for row in await thread.processes()} == {"attached"}
    assert sorted(row.process_id for row in await thread.processes()) == ids


async def test_detach_answers_though_calls_want_the_worker_back_at_once(host: outlive.Host) -> None:
    thread = await host.thread("wanted")
    await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
    for _ in range(3):
        detaching = asyncio.create_task(thread.detach())
        while not detaching.done():
            with suppress(outlive.Unavailable):  # sent to bed during the call
                await thread.resume()
        await detaching


async def test_a_detach_whose_caller_goes_away_is_carried_to_its_end(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("left")
    child = await thread.exec_command(["cat"], tty=True, yield_time_ms=250)
    worker, after = await home.worker(host, "left"), await home.last_event(host)
    os.kill(worker, signal.SIGSTOP)
    async with outlive.connect(home.paths) as caller:
        detaching = asyncio.create_task(outlive.Thread(caller, "left").detach())
        await asyncio.sleep(0)  # asked; what the same caller asks next is answered after it was taken in
        await caller.status()
        detaching.cancel()
    os.kill(worker, signal.SIGCONT)
    await home.until(host, after, event="detached", thread="left", process_id=child.process_id)
    reply = await thread.write_stdin(child.process_id, "still drained\n", resume=False, yield_time_ms=1000)
    assert reply.output.count("still drained") == 2  # the terminal's echo, and cat's
