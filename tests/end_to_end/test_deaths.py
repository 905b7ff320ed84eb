"""Broker and keeper die, alone or with a worker, or are replaced: what is attached and what sleeps lives on."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

import outlive

from .conftest import Home, Numbered


async def replaced(host: outlive.Host, before: dict[str, Any], *, keeper: bool) -> dict[str, Any]:
    """Wait until another broker serves, under another keeper if `keeper`; return its status."""
    async with asyncio.timeout(60):
        while True:
            status = await host.status()
            new = status["broker_pid"] != before["broker_pid"] and status["keeper_pid"]
            if new and (not keeper or status["keeper_pid"] != before["keeper_pid"]):
                return status
            await asyncio.sleep(0.01)


async def strike(home: Home, host: outlive.Host, what: str, worker: int) -> None:
    """Have something die or be replaced, and wait until it has been."""
    before = await host.status()
    if what == "upgrade":
        await host.upgrade()
        return
    if what == "worker and broker":
        os.kill(worker, signal.SIGKILL)
    if what == "broker and worker":
        os.kill(before["broker_pid"], signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
    else:
        os.kill(before["keeper_pid" if what == "keeper" else "broker_pid"], signal.SIGKILL)
    await replaced(host, before, keeper=what == "keeper")


@pytest.mark.parametrize("what", ["broker", "keeper", "worker and broker", "broker and worker", "upgrade"])
async def test_shells_and_floods_attached_and_asleep_live_through_it_byte_for_byte(
    home: Home, host: outlive.Host, what: str
) -> None:
    awake, asleep = await host.thread("awake"), await host.thread("asleep")
    shells = {}
    children = []
    for thread in (awake, asleep):
        shell = await thread.exec_command(["sh"], tty=True, yield_time_ms=250)
        await thread.write_stdin(shell.process_id, f"stty -echo; PS1=; value={thread.thread_id}\n")
        shells[thread.thread_id] = shell.process_id
        children += [await Numbered.start(thread, home.path, tty=tty) for tty in (True, False)]
    await asleep.detach()
    pids = {(row.thread, row.process_id): row.pid for row in await host.processes()}
    for _ in range(2):
        await strike(home, host, what, await home.worker(host, "awake"))
    assert {(row.thread, row.process_id): row.pid for row in await host.processes()} == pids
    states = {row.thread: row.state for row in await asleep.processes()}
    assert states == {"asleep": "detached"}
    for child in children:
        await child.more(100_000)
    for thread in (awake, asleep):
        answer = await thread.write_stdin(shells[thread.thread_id], "echo is:$value\n", yield_time_ms=1000)
        assert f"is:{thread.thread_id}\r\n" in answer.output
    for child in children:
        assert await child.finish() == outlive.Outcome("exited", code=7)
        await child.check()


async def test_what_ends_while_no_broker_runs_has_its_real_outcome(home: Home, host: outlive.Host) -> None:
    awake, asleep = await host.thread("awake"), await host.thread("asleep")
    ids = {}
    for thread in (awake, asleep):
        reply = await thread.exec_command(["sh", "-c", "read x; exit 42"], tty=True, yield_time_ms=250)
        ids[thread.thread_id] = reply.process_id
    await asleep.detach()
    pids = {row.thread: row.pid for row in await host.processes()}
    before = await host.status()
    os.kill(before["keeper_pid"], signal.SIGSTOP)  # so that nobody starts the next one
    os.kill(before["broker_pid"], signal.SIGKILL)
    for pid in pids.values():
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
    os.kill(before["keeper_pid"], signal.SIGCONT)
    for thread in (awake, asleep):
        assert await thread.wait(ids[thread.thread_id]) == outlive.Outcome("signaled", signal=signal.SIGUSR1)


async def test_an_upgrade_to_a_broken_build_is_rolled_back_and_says_why(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("t")
    shell = await thread.exec_command(["sh"], tty=True, yield_time_ms=250)
    before = await host.status()
    home.write_config("nonsense = 1\n")
    with pytest.raises(outlive.Unavailable, match="nonsense"):
        await host.upgrade()
    after = await host.status()
    assert (after["broker_pid"], after["keeper_pid"]) == (before["broker_pid"], before["keeper_pid"])
    answer = await thread.write_stdin(shell.process_id, "echo on$((1))\n", yield_time_ms=1000)
    assert "on1" in answer.output


async def test_a_broker_that_was_told_to_end_leaves_no_keeper(home: Home, host: outlive.Host) -> None:
    status = await host.status()
    pidfd = os.pidfd_open(status["keeper_pid"])
    await host.down()
    async with asyncio.timeout(30):
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, readable.set)
        await readable.wait()
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)
    assert home.sockets() == []
