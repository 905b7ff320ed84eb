"""The broker: one a home, however many ask for it; killed and started again; what it keeps and what it gives up."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import outlive
from outlive.broker.loop import PEERS_MAX
from outlive.common import channel, client
from outlive.common.messages import ListProcesses, ProcessRow

from .conftest import HELD, Home, Numbered, descriptors_of, eventually, lives


async def test_sixteen_that_connect_at_once_make_one_broker(home: Home, tmp_path: Path) -> None:
    script = """
import asyncio, os, sys
import outlive
async def main():
    sys.stdin.readline()
    async with outlive.connect() as host:
        print((await host.status())["broker_pid"])
asyncio.run(main())
"""
    callers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(16)
    ]
    for caller in callers:
        assert caller.stdin is not None
        caller.stdin.write(b"go\n")
    said = [(await caller.communicate())[0].strip() for caller in callers]
    assert [caller.returncode for caller in callers] == [0] * 16
    (broker,) = home.pids("broker")
    assert set(said) == {str(broker).encode()}


async def test_no_broker_is_started_where_that_is_forbidden(home: Home) -> None:
    with pytest.raises(outlive.Unavailable, match="no broker"):
        async with outlive.connect(start=False):
            pass
    assert home.pids() == []


async def test_two_brokers_with_two_homes_do_not_know_each_other(
    home: Home, host: outlive.Host, tmp_path: Path
) -> None:
    other_home = Home(tmp_path / "other")
    environment = {**os.environ, "OUTLIVE_HOME": str(other_home.path)}
    script = """
import asyncio, outlive
async def main():
    async with outlive.connect() as host:
        thread = await host.thread("other")
        started = await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
        print([row.thread for row in await host.threads()], started.session_id is not None)
asyncio.run(main())
"""
    try:
        thread = await host.thread("mine")
        await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
        said = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", script], env=environment, check=True, capture_output=True
        )
        assert said.stdout == b"['other'] True\n"
        assert [row.thread for row in await host.threads()] == ["mine"]
        assert len(home.pids("broker")) == len(other_home.pids("broker")) == 1
        await host.down(force=True)
        assert len(await asyncio.to_thread(other_home.pids, "worker")) == 1
    finally:
        await other_home.end()


class TestWithALongPath:
    @pytest.fixture
    def home_path(self, tmp_path: Path) -> Path:
        path = tmp_path / ("long" * 30)
        path.mkdir()
        return path / "h"

    async def test_socket_paths_beyond_what_the_kernel_takes_are_no_obstacle(
        self, home: Home, host: outlive.Host
    ) -> None:
        assert len(str(home.paths.control)) > 107
        thread = await host.thread("long")
        child = await Numbered.start(thread, home.path, tty=True)
        await home.kill_worker(host, "long")
        await thread.detach()
        await thread.resume()
        assert await child.finish() == outlive.Outcome("exited", code=7)
        await child.check()


async def killed_and_started_again(home: Home, host: outlive.Host) -> int:
    """Kill the broker; its client finds, or starts, the next one; return the pid of that."""
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGKILL)
    await eventually(lambda: not lives(broker))
    pid = int((await host.status())["broker_pid"])
    assert pid != broker
    return pid


async def test_a_worker_that_survives_its_broker_registers_with_the_next_and_nothing_is_lost(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("survivor")
    children = [await Numbered.start(thread, home.path, tty=tty) for tty in (True, False)]
    worker = await home.worker(host, "survivor")
    before = {row.process_id: row.pid for row in await thread.processes()}
    for _ in range(2):
        for child in children:
            await child.more(200_000)
        await killed_and_started_again(home, host)
        assert await home.worker(host, "survivor") == worker
        assert {row.process_id: row.pid for row in await thread.processes()} == before
        assert {row.worker_pid for row in await thread.processes()} == {worker}
        assert home.pids("worker") == [worker]
    # Whatever it could do before, it can do with the new one.
    await home.kill_worker(host, "survivor")
    await thread.detach()
    for child in children:
        await child.more(200_000)
    assert len(home.pids("broker")) == 1
    for child in children:
        assert await child.finish() == outlive.Outcome("exited", code=7)
        await child.check()


@pytest.mark.parametrize("call", [True, False])
async def test_a_worker_that_survives_its_broker_goes_on_with_new_commands(
    home: Home, host: outlive.Host, call: bool
) -> None:
    thread = await host.thread("goes-on")
    child = await thread.exec_command(["cat"], tty=True, yield_time_ms=250)
    worker = await home.worker(host, "goes-on")
    await killed_and_started_again(home, host)
    if call:  # the first thing that the new broker hears of the thread is a call
        assert (await thread.exec_command(["echo", "new"])).output == "new\n"
    assert "hi" in (await thread.write_stdin(child.process_id, "hi\n")).output
    assert home.pids("worker") == [worker]
    assert (await thread.processes())[0].process_id == child.process_id


async def test_a_process_that_ends_while_there_is_no_broker_has_its_real_exit_code(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("between")
    gos = [fifo("a"), fifo("b")]
    children = [
        await thread.exec_command(
            ["sh", "-c", HELD, str(go), f"echo last; exit {code}"], tty=tty, yield_time_ms=250
        )
        for go, code, tty in zip(gos, (20, 21), (True, False), strict=True)
    ]
    pids = [row.pid or 0 for row in await thread.processes()]
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGKILL)
    await eventually(lambda: not lives(broker))
    for go in gos:
        go.write_text("go\n")
    await eventually(lambda: not any(lives(pid) for pid in pids))
    for child, code in zip(children, (20, 21), strict=True):
        assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=code)
        assert (await thread.write_stdin(child.process_id)).output.split() == ["last"]


async def test_ended_processes_answer_from_the_journal_also_in_the_next_broker(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("past")
    done = await thread.exec_command("echo kept; exit 5", call_id="once")
    for number in range(2):
        if number:
            await host.down()
        (row,) = await thread.processes(ended=True)
        assert (row.process_id, row.state, row.outcome) == (done.process_id, "ended", {"kind": "exited", "code": 5})
        assert await thread.output(done.process_id) == b"kept\n"
        assert await thread.wait(done.process_id) == outlive.Outcome("exited", code=5)
        answer = await thread.write_stdin(done.process_id)
        assert (answer.exit_code, answer.session_id, answer.output) == (5, None, "")
        answer = await thread.write_stdin(done.process_id, "late\n")
        assert any("nothing was typed" in warning for warning in answer.warnings)
        assert await thread.kill(done.process_id) == [
            {"thread": "past", "process_id": done.process_id, "signal": 15, "signalled": 0}
        ]
    assert home.pids("worker") == []


async def test_command_lines_that_are_too_much_for_one_answer_are_cut_and_all_processes_are_listed(
    host: outlive.Host,
) -> None:
    thread = await host.thread("long")
    for _ in range(3):
        await thread.exec_command(["true", "x", *["é" * 60_000] * 14])
    rows = await thread.processes(ended=True)
    assert len(rows) == 3
    for row in rows:
        assert row.command[:3] == ["true", "x", "é" * 60_000]
        assert row.command[-1].endswith("é…")
    await thread.exec_command(["true", "short"])  # long ones make room for it, and it stays whole
    assert ["true", "short"] in [row.command for row in await thread.processes(ended=True)]


async def test_folders_and_rules_that_are_too_much_for_one_answer_are_cut_too(
    host: outlive.Host, tmp_path: Path
) -> None:
    thread = await host.thread("long")
    folder = tmp_path.joinpath(*["x" * 200] * 15)
    folder.mkdir(parents=True)
    rules = [{"output": f"{number}{'.' * 970}"} for number in range(8)]
    calls = [thread.exec_command(["true"], workdir=folder, wake_on=rules) for _ in range(60)]
    await asyncio.gather(*calls)
    rows = await thread.processes(ended=True)
    assert len(rows) == 60
    assert {row.command[0] for row in rows} == {"true"}
    assert all(row.cwd.endswith("…") and row.wake_on[-1].endswith("…") for row in rows)


async def test_a_worker_is_replaced_though_as_many_are_connected_as_may_be(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("a")
    process_id = (await thread.exec_command(["sleep", "1000"], yield_time_ms=250)).process_id
    idle: list[channel.Channel] = []

    async def crowd(count: int) -> None:
        for _ in range(count):
            try:
                idle.append(channel.connect(home.paths.channel))
                with suppress(BrokenPipeError, ConnectionResetError):  # it was refused
                    idle[-1].send("hello", role="client", pid=os.getpid())
            except BlockingIOError:  # it has to accept some first
                await asyncio.sleep(0.001)

    try:
        await crowd(2 * PEERS_MAX)
        with pytest.raises(outlive.Unavailable, match="1000 peers are connected"):
            async with outlive.connect(home.paths) as late:
                await late.status()
        (worker,) = home.pids("worker")
        os.kill(worker, signal.SIGKILL)
        await crowd(10)  # its place is taken before the next one has started
        reply = await thread.write_stdin(process_id, yield_time_ms=5000)
        assert reply.session_id == int(process_id)
        assert home.pids("worker") != [worker]
    finally:
        for one in idle:
            one.close()


async def test_more_processes_than_one_answer_can_hold_are_all_listed(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await host.thread("a"), await host.thread("b")
    ended = [(await first.exec_command(["true"])).process_id for _ in range(5)]
    alive = (await first.exec_command(["sleep", "1000"], yield_time_ms=250)).process_id
    others = [(await second.exec_command(["true"])).process_id for _ in range(3)]
    everything = [("a", name) for name in (*ended, alive)] + [("b", name) for name in others]
    in_the_journal = ListProcesses(ended=True, at_most=100, after=("", ""))
    while len(await host.call(in_the_journal, list[ProcessRow])) < 8:
        pass
    for at_once in (1, 2, 4, 8, 9):
        monkeypatch.setattr(client, "ROWS_AT_ONCE", at_once)
        assert [(row.thread, row.process_id) for row in await host.processes(ended=True)] == everything
        assert [row.process_id for row in await first.processes(ended=True)] == [*ended, alive]
    # What a broker says that knows of no limit.
    rows = await host.call(ListProcesses(ended=True), list[ProcessRow])
    assert {(row.thread, row.process_id) for row in rows} == set(everything)


async def test_a_broker_that_lists_all_at_once_is_not_asked_for_ever(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = await host.thread("a")
    for _ in range(3):
        await thread.exec_command(["true"])
    monkeypatch.setattr(client, "ROWS_AT_ONCE", 2)
    call = host.call

    async def older(body: Any, *arguments: Any) -> Any:
        return await call(ListProcesses(thread=body.thread, ended=body.ended), *arguments)

    monkeypatch.setattr(host, "call", older)
    assert len(await thread.processes(ended=True)) == 3


async def test_what_has_expired_is_called_expired_and_what_never_was_unknown(home: Home) -> None:
    home.write_config("ended_keep_count = 2\n")
    async with outlive.connect() as host:
        thread = await host.thread("expiry")
        ids = [(await thread.exec_command(["true"])).process_id for _ in range(4)]
        await eventually_gone(thread, ids[1])
        for process_id in ids[:2]:
            for act in (thread.write_stdin, thread.read_output, thread.wait, thread.kill):
                with pytest.raises(outlive.ExpiredProcess, match=process_id):
                    await act(process_id)
        for process_id in ids[2:]:
            assert await thread.wait(process_id) == outlive.Outcome("exited", code=0)
        unknown = next(str(number) for number in range(1000, 1010) if str(number) not in ids)
        for act in (thread.write_stdin, thread.read_output, thread.wait, thread.kill):
            with pytest.raises(outlive.UnknownProcess, match=unknown):
                await act(unknown)


async def eventually_gone(thread: outlive.Thread, process_id: str) -> None:
    with suppress(outlive.ExpiredProcess):
        while True:
            await thread.read_output(process_id)


async def test_a_worker_that_does_not_come_up_is_given_up_after_five_tries_and_its_processes_are_safe(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("broken")
    child = await thread.exec_command(["sh", "-c", "echo up; exec cat"], tty=True, yield_time_ms=250)
    (before,) = await thread.processes()
    worker = await home.worker(host, "broken")
    home.write_config("max_processes = 'many'\n")
    after = await home.last_event(host)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(outlive.Unavailable, match="does not come up"):
        await thread.exec_command(["true"])
    died = [e for e in await host.recent_events() if e["seq"] > after and e.get("what") == "died"]
    assert [event["epoch"] for event in died] == list(range(died[0]["epoch"], died[0]["epoch"] + 6))
    (row,) = await host.threads()
    assert (row.state, row.worker_pid, row.detached) == ("failed", None, 1)
    (now,) = await thread.processes()
    assert (now.pid, now.state) == (before.pid, "detached")
    await thread.write_stdin(child.process_id, "typed\n", resume=False)
    home.write_config("")
    assert (await thread.exec_command(["echo", "repaired"])).output == "repaired\n"
    assert (await thread.processes())[0].state == "attached"
    assert (await thread.output(child.process_id)).count(b"typed") == 2


async def test_short_commands_leave_no_descriptor_behind(home: Home, host: outlive.Host) -> None:
    await commands_leave_no_descriptor(home, host, 200)


@pytest.mark.long
async def test_a_thousand_short_commands_leave_no_descriptor_behind(home: Home, host: outlive.Host) -> None:
    await commands_leave_no_descriptor(home, host, 1000)


async def commands_leave_no_descriptor(home: Home, host: outlive.Host, count: int) -> None:
    thread = await host.thread("many")

    async def some(number: int) -> None:
        for at in range(0, number, 8):
            await asyncio.gather(*(thread.exec_command(["true"], tty=bool((at + n) % 2)) for n in range(8)))

    await some(8)
    worker = await home.worker(host, "many")
    pids = (*home.pids("broker"), worker, home.spawner(worker))

    def held() -> list[int]:
        return [len(descriptors_of(pid)) for pid in pids]

    await eventually(lambda: not any("memfd" in name for pid in pids for name in descriptors_of(pid)))
    before = held()
    await some(count)
    await eventually(lambda: held() == before)


async def test_starts_up_to_the_descriptor_limit_are_refused_by_name_and_the_broker_lives(
    home: Home, tmp_path: Path
) -> None:
    script = """
import asyncio, outlive
async def main():
    async with outlive.connect() as host:
        await host.status()
asyncio.run(main())
"""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    home.write_config("max_processes = 1000\nwarn_at = 1000\n")
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script], check=True, preexec_fn=few, timeout=60)
    async with outlive.connect(start=False) as host:
        (broker,) = home.pids("broker")
        thread = await host.thread("limit")

        async def fill(thread: outlive.Thread) -> None:
            while True:
                starts = (thread.exec_command(["cat"], tty=True, yield_time_ms=1) for _ in range(5))
                for answer in await asyncio.gather(*starts, return_exceptions=True):
                    if isinstance(answer, BaseException):
                        raise answer

        with pytest.raises(outlive.LimitReached, match="descriptors"):
            await fill(thread)
        assert home.pids("broker") == [broker]
        held = await thread.processes()
        assert len(held) > 10
        assert {row.state for row in held} == {"attached"}
        # Another thread meets the same limit.
        with pytest.raises((outlive.LimitReached, outlive.SpawnError), match="descriptor"):
            await fill(await host.thread("other"))
        # There is always room for somebody who comes to end something.
        async with outlive.connect(start=False) as newcomer:
            assert len(await newcomer.processes()) >= len(held)
        await thread.kill(*[row.process_id for row in await thread.processes()], signal="KILL")
        for process_id in [row.process_id for row in await thread.processes(ended=True)]:
            await thread.wait(process_id)
            await thread.write_stdin(process_id)
        assert (await thread.exec_command(["echo", "room"])).output == "room\n"
        assert home.pids("broker") == [broker]


async def test_a_name_that_no_thread_may_have_is_refused_and_shown(host: outlive.Host) -> None:
    for name in ("a/b", "..", ".", "a\0b", "x" * 10_000, "", "-x", "ä", "a b", "a\n"):
        for act in (host.thread(name), outlive.Thread(host, name).exec_command(["true"])):
            with pytest.raises(outlive.BadRequest, match=r"thread .*: a name has") as error:
                await act
            assert len(str(error.value)) < 300
        assert await host.threads() == []


async def test_a_name_that_no_process_may_have_is_refused_and_shown(host: outlive.Host) -> None:
    thread = await host.thread("names")
    for name in ("1/2", "..", "1\0", "9" * 10_000, "", "-1", "0", "٣٤", "1 ", "1\n"):
        for act in (thread.write_stdin, thread.read_output, thread.wait, thread.kill):
            with pytest.raises(outlive.BadRequest, match=r"process .*: a process id is a number") as error:
                await act(name)
            assert len(str(error.value)) < 300


async def test_a_command_line_that_cannot_be_one_is_refused(host: outlive.Host) -> None:
    thread = await host.thread("lines")
    for cmd in ("", "  ", [], [""]):
        with pytest.raises(outlive.BadRequest, match="missing command line"):
            await thread.exec_command(cmd)
    with pytest.raises(outlive.BadRequest, match="NUL"):
        await thread.exec_command(["echo", "a\0b"])
    with pytest.raises(outlive.BadRequest, match="variable"):
        await thread.exec_command(["env"], env={"A=B": "c"})
