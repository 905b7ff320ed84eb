"""kill -9 of a worker, at any moment: its children, their output, their ends and the calls under way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import outlive

from .conftest import HELD, Home, Numbered, eventually, lives


async def test_children_that_flood_survive_kill_9_of_their_worker_with_every_byte_and_their_exit_code(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("flood")
    children = [await Numbered.start(thread, home.path, tty=tty) for tty in (True, False, True)]
    before = {row.process_id: row.pid for row in await thread.processes()}
    for _ in range(5):
        for child in children:
            await child.more(300_000)
        await home.kill_worker(host, "flood")
    for child in children:
        await child.more()
        if child.tty:
            answer = await thread.write_stdin(child.process_id, "x")
            assert (answer.session_id, answer.typed) == (int(child.process_id), 1)
    assert {row.process_id: row.pid for row in await thread.processes()} == before
    for child in children:
        assert await child.finish() == outlive.Outcome("exited", code=7)
        await child.check()


async def test_shells_keep_their_variables_and_do_not_share_them_across_a_kill(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("shells")
    ids = []
    for value in ("one", "two"):
        shell = await thread.exec_command(["sh"], tty=True, yield_time_ms=250)
        await thread.write_stdin(shell.process_id, f"stty -echo; PS1=; value={value}\n")
        ids.append(shell.process_id)
    await home.kill_worker(host, "shells")
    for process_id, value in zip(ids, ("one", "two"), strict=True):
        answer = await thread.write_stdin(process_id, "echo is:$value\n", yield_time_ms=1000)
        assert f"is:{value}\r\n" in answer.output


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize(
    ("last", "outcome"),
    [("exit 42", outlive.Outcome("exited", code=42)), ("kill -KILL $$", outlive.Outcome("signaled", signal=9))],
)
async def test_a_child_that_ends_while_its_worker_is_dead_has_its_real_outcome_and_last_words(
    home: Home,
    host: outlive.Host,
    fifo: Callable[[str], Path],
    tty: bool,
    last: str,
    outcome: outlive.Outcome,
) -> None:
    thread = await host.thread("dead")
    go = fifo("go")
    child = await thread.exec_command(
        ["sh", "-c", HELD, str(go), f"printf last; {last}"], tty=tty, yield_time_ms=250
    )
    worker = await home.worker(host, "dead")
    after = await home.last_event(host)
    os.kill(worker, signal.SIGKILL)
    go.write_text("go\n")
    assert await thread.wait(child.process_id) == outcome
    await home.until(host, after, event="worker", thread="dead", what="up")
    answer = await thread.write_stdin(child.process_id)
    assert (answer.output, answer.outcome) == ("last", outcome.to_wire())
    assert [row.outcome for row in await thread.processes(ended=True)] == [outcome.to_wire()]


async def test_children_that_end_while_workers_are_restarted_have_their_real_exit_codes(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("restart")
    go = [fifo(f"go{number}") for number in range(6)]
    children = [
        await thread.exec_command(["sh", "-c", HELD, str(path), f"exit {number}"], yield_time_ms=250)
        for number, path in enumerate(go, 50)
    ]
    for path in go:
        restart = asyncio.create_task(home.kill_worker(host, "restart"))
        await host.status()
        await asyncio.to_thread(path.write_text, "go\n")
        await restart
    for code, child in enumerate(children, 50):
        assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=code)


async def test_a_call_whose_worker_dies_right_after_it_was_sent_starts_exactly_one_process(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("calls")
    for delay in range(10):
        worker = await home.worker(host, "calls")
        trace = home.path / f"trace{delay}"
        call = asyncio.create_task(
            thread.exec_command(["sh", "-c", f"echo $$ >>{trace}; exit 3"], call_id=f"call-{delay}")
        )
        # Each time a little later: so many turns of the broker's, by calls that it answers itself.
        for _ in range(delay):
            await host.status()
        os.kill(worker, signal.SIGKILL)
        answer = await call
        assert answer.exit_code == 3
        assert len(trace.read_text().split()) == 1
        again = await thread.exec_command(["sh", "-c", f"echo $$ >>{trace}; exit 3"], call_id=f"call-{delay}")
        assert (again.process_id, again.exit_code) == (answer.process_id, 3)
        assert len(trace.read_text().split()) == 1


async def test_a_poll_under_way_when_the_worker_dies_is_answered_by_the_next_one(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("poll")
    go = fifo("go")
    child = await thread.exec_command(["sh", "-c", HELD, str(go), "echo rest; exit 5"], yield_time_ms=250)
    poll = asyncio.create_task(thread.write_stdin(child.process_id, yield_time_ms=60_000))
    await host.status()  # answered in order: the poll was passed on before
    await home.kill_worker(host, "poll")
    assert not poll.done()
    go.write_text("go\n")
    answer = await poll
    assert (answer.output, answer.exit_code) == ("rest\n", 5)


async def test_input_whose_worker_dies_is_typed_once_and_answered(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("type")
    got = home.path / "got"
    reader = ["sh", "-c", f"stty raw -echo; echo ready; exec cat >{got}"]
    child = await thread.exec_command(reader, tty=True, yield_time_ms=250)
    while b"ready" not in await thread.output(child.process_id):
        await thread.read_output(child.process_id, child.output_end, wait_ms=5000)
    expected: list[str] = []
    for number in range(12):
        worker = await home.worker(host, "type")
        word = f"<{number}:{'x' * 200}>"
        call = asyncio.create_task(thread.write_stdin(child.process_id, word))
        for _ in range(number % 5):
            await host.status()
        os.kill(worker, signal.SIGKILL)
        answer = await call
        assert (answer.session_id, answer.typed) == (int(child.process_id), len(word))
        expected.append(word)
    await thread.write_stdin(child.process_id, "<end>")
    await eventually(lambda: got.read_text().endswith("<end>"))
    assert got.read_text() == "".join(expected) + "<end>"


async def test_a_worker_that_is_stopped_is_neither_robbed_nor_killed(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("stopped")
    child = await thread.exec_command(["cat"], tty=True, yield_time_ms=250)
    worker = await home.worker(host, "stopped")
    os.kill(worker, signal.SIGSTOP)
    call = asyncio.create_task(thread.write_stdin(child.process_id, "hello\n"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(call), 1.0)
    (row,) = await thread.processes()
    assert (row.state, row.worker_pid) == ("attached", worker)
    assert lives(worker)
    assert home.pids("worker") == [worker]
    # Whoever does not need that worker is served.
    other = await (await host.thread("other")).exec_command(["echo", "served"])
    assert other.output == "served\n"
    os.kill(worker, signal.SIGCONT)
    assert (await call).output == "hello\r\nhello\r\n"
    assert await home.worker(host, "stopped") == worker


async def test_a_resume_right_after_a_kill_tells_of_the_next_worker(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("next")
    for _ in range(5):
        before = await thread.resume()
        assert before.worker_pid is not None
        os.kill(before.worker_pid, signal.SIGKILL)
        after = await thread.resume()
        assert (after.epoch, after.worker_pid == before.worker_pid) == (before.epoch + 1, False)
