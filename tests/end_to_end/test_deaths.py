"""Broker and keeper die, alone or with a worker, or are replaced: what is attached and what sleeps lives on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outlive

from .conftest import HELD, PYTHON, Home, Numbered

# The next build, in which a module cannot be loaded from the moment on that a file names it.
UNLOADABLE = """
import os, sys

class Finder:
    def find_spec(name, *_):
        with open(os.path.join(os.path.dirname(__file__), "broken")) as file:
            if name in file.read().split():
                raise ImportError(f"{name} is broken")

if os.path.exists(os.path.join(os.path.dirname(__file__), "broken")):
    sys.meta_path.insert(0, Finder)
"""


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


async def test_outside_systemd_the_death_of_broker_and_keeper_at_once_costs_only_what_sleeps(
    home: Home, host: outlive.Host
) -> None:
    awake, asleep = await host.thread("awake"), await host.thread("asleep")
    flood = await Numbered.start(awake, home.path, tty=True)
    ended = await asleep.exec_command("echo kept; exit 3")
    shell = await asleep.exec_command(["sh"], tty=True, yield_time_ms=250)
    await asleep.detach()
    (worker,) = home.pids("worker")
    before = await host.status()
    for number in (signal.SIGSTOP, signal.SIGKILL):  # each would replace the other
        for role in ("broker_pid", "keeper_pid"):
            os.kill(before[role], number)
    await replaced(host, before, keeper=True)
    assert await asleep.wait(shell.process_id) == outlive.Outcome.lost("the broker and its keeper died")
    assert await asleep.wait(ended.process_id) == outlive.Outcome("exited", code=3)
    assert await asleep.output(ended.process_id) == b"kept\n"
    assert home.pids("worker") == [worker]
    await flood.more()
    assert await flood.finish() == outlive.Outcome("exited", code=7)
    await flood.check()


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


class Mixed:
    """A thread with one process of each kind: shell, REPL, raw terminal, flood, and one without a terminal."""

    def __init__(self, thread: outlive.Thread, *, awake: bool) -> None:
        self.thread = thread
        self.awake = awake

    async def enter(self, folder: Path, *, tty: bool) -> None:
        """Start them; `tty`: the flood has a terminal."""
        start = self.thread.exec_command
        counts = "n=0; trap 'n=$((n+1)); echo got:$n' USR1; echo ready; while :; do sleep 0.01; done"
        self.flood, *others = await asyncio.gather(
            Numbered.start(self.thread, folder, tty=tty),
            start(["sh"], tty=True, yield_time_ms=250),
            start([*PYTHON[:-1], "-q", "-i"], tty=True, yield_time_ms=250),
            start(["sh", "-c", "stty raw -echo; exec cat"], tty=True, yield_time_ms=250),
            start(["sh", "-c", counts], yield_time_ms=250),
        )
        self.shell, self.repl, self.cat, self.pipes = (reply.process_id for reply in others)
        await self.type(self.shell, f"n=0; name={self.thread.thread_id}\n")
        await self.type(self.repl, "n = 0\n")
        await self.hear(self.pipes, b"ready\n")
        self.pids = {row.process_id: row.pid for row in await self.thread.processes()}
        assert len(self.pids) == 5
        if not self.awake:
            await self.thread.detach()

    async def type(self, process_id: str, chars: str) -> None:
        """Type into one, whoever pumps it."""
        await self.thread.write_stdin(process_id, chars, yield_time_ms=250, resume=self.awake)

    async def hear(self, process_id: str, wanted: bytes) -> None:
        """Wait until one has said it, once."""
        at, said = 0, b""
        while wanted not in said:
            output = await self.thread.read_output(process_id, at, wait_ms=5000)
            said, at = said + b"".join(data for _, data in output.pieces), output.next_offset
        assert said.count(wanted) == 1, said

    async def answer(self, turn: int) -> None:
        """See that each is the process it was and answers, knowing how often it was asked."""
        assert {row.process_id: row.pid for row in await self.thread.processes()} == self.pids
        await asyncio.gather(
            self.flood.more(10_000),
            self.type(self.shell, "n=$((n+1)); echo $name:$n:\n"),
            self.type(self.repl, "n += 1; print('n', n, sep=':', end=':\\n')\n"),
            self.type(self.cat, f"<{turn}>"),
            self.thread.kill(self.pipes, signal="USR1"),
        )
        await self.hear(self.shell, f"{self.thread.thread_id}:{turn}:\r\n".encode())
        await self.hear(self.repl, f"n:{turn}:\r\n".encode())
        await self.hear(self.cat, f"<{turn}>".encode())
        await self.hear(self.pipes, f"got:{turn}\n".encode())


async def test_twenty_processes_of_all_kinds_answer_after_each_of_five_upgrades(
    home: Home, host: outlive.Host
) -> None:
    threads = [Mixed(await host.thread(f"t{number}"), awake=number < 2) for number in range(4)]
    await asyncio.gather(*(thread.enter(home.path, tty=bool(number % 2)) for number, thread in enumerate(threads)))
    workers = sorted(home.pids("worker"))
    for turn in range(1, 6):
        before = await host.status()
        after = await host.upgrade()
        assert after["broker_pid"] != before["broker_pid"]
        assert after["keeper_pid"] == before["keeper_pid"]
        await asyncio.gather(*(thread.answer(turn) for thread in threads))
    assert sorted(home.pids("worker")) == workers
    for thread in threads:
        assert await thread.flood.finish() == outlive.Outcome("exited", code=7)
        await thread.flood.check()


async def test_limits_and_calls_under_way_survive_the_death_of_broker_and_worker(
    home: Home, fifo: Callable[[str], Path]
) -> None:
    home.write_config('max_processes = 2\nwhen_full = "refuse"\n')
    go = fifo("go")
    async with outlive.connect() as host:
        thread = await host.thread("t")
        shell = await thread.exec_command(["sh"], tty=True, yield_time_ms=250, call_id="shell")
        line = f"{HELD}; exit 6"
        call = asyncio.create_task(
            thread.exec_command(["sh", "-c", line, str(go), "echo done"], yield_time_ms=30_000, call_id="call")
        )
        while len(await thread.processes()) < 2:
            pass
        for what in ("broker", "worker and broker"):
            await strike(home, host, what, await home.worker(host, "t"))
            again = await thread.exec_command(["sh"], tty=True, yield_time_ms=250, call_id="shell")
            assert again.process_id == shell.process_id
            with pytest.raises(outlive.LimitReached, match="max_processes is 2"):
                await thread.exec_command(["true"])
        go.write_text("go\n")
        answer = await call
        assert (answer.exit_code, answer.output) == (6, "done\n")
        again = await thread.exec_command(["false"], call_id="call")
        assert (again.process_id, again.exit_code) == (answer.process_id, 6)


async def test_an_upgrade_to_a_build_that_cannot_be_loaded_is_rolled_back_and_says_why(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "sitecustomize.py").write_text(UNLOADABLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "build"))
    async with outlive.connect() as host:
        thread = await host.thread("t")
        flood = await Numbered.start(thread, home.path, tty=True)
        before = await host.status()
        for module in ("outlive.broker.loop", "outlive.broker.keeper"):
            (tmp_path / "build" / "broken").write_text(module)
            with pytest.raises(outlive.Unavailable, match=f"ImportError: {module} is broken"):
                await host.upgrade()
            after = await host.status()
            assert (after["broker_pid"], after["keeper_pid"]) == (before["broker_pid"], before["keeper_pid"])
        await flood.more()
        assert await flood.finish() == outlive.Outcome("exited", code=7)
        await flood.check()


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
