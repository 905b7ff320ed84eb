"""`outlive doctor` on real trouble: it sees what is wrong, says how bad that is, and touches nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import outlive

from .conftest import PYTHON, Home, ended_within, eventually, lives, state_of

OUTLIVE = str(Path(sysconfig.get_path("scripts")) / "outlive")
# Killed in this order, a keeper has no time to start a broker.
ROLES = ("broker.keeper", "broker", "worker", "worker.spawner")
# `flock` a file, say so, and stay.
LOCKER = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"


class Diagnosis:
    """What one run has said."""

    def __init__(self, status: int, findings: list[dict[str, Any]]) -> None:
        self.status = status
        self.findings = findings

    def of(self, check: str) -> dict[str, Any]:
        """Return the one finding of a check."""
        (found,) = (finding for finding in self.findings if finding["check"] == check)
        return found

    def severity(self, check: str) -> str:
        """Return the severity of the one finding of a check."""
        return str(self.of(check)["severity"])

    def about(self, check: str, pid: int) -> dict[str, Any] | None:
        """Return the finding of a check that names a process."""
        return next((one for one in self.findings if one["check"] == check and pid in one["pids"]), None)


async def doctor(**environment: str) -> Diagnosis:
    """Run it; its exit status has to be that of its worst finding."""
    done = await asyncio.to_thread(
        subprocess.run,
        [OUTLIVE, "doctor", "--json"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""
    findings = json.loads(done.stdout)
    errors = [finding for finding in findings if finding["severity"] == "error"]
    assert done.returncode == bool(errors), errors
    return Diagnosis(done.returncode, findings)


async def healthy(check: str) -> Diagnosis:
    """Return the first run that finds nothing wrong there: a busy machine may keep a broker from answering."""
    while (diagnosis := await doctor()).severity(check) != "ok":
        await asyncio.sleep(0.05)
    return diagnosis


async def a_child(host: outlive.Host, *, tty: bool = False) -> int:
    """Start a process that stays, and return its pid."""
    thread = await host.thread("t")
    started = await thread.exec_command(
        [*PYTHON, "print(flush=True); import signal; signal.pause()"], tty=tty, yield_time_ms=250
    )
    (row,) = (row for row in await host.processes() if row.process_id == started.process_id)
    assert row.pid is not None
    return row.pid


def kill_all_of_outlive(home: Home) -> None:
    """Kill broker, keeper, worker and spawner in one moment, none seeing the others go."""
    ours = [pid for role in ROLES for pid in home.pids(role)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in ours:
            os.kill(pid, number)
    assert all(ended_within(pid, 30) for pid in ours)


def snapshot(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return every file of a folder, with mode, size and time."""
    paths = [folder, *folder.rglob("*")]
    return sorted((str(p), (s := p.lstat()).st_mode, s.st_size, s.st_mtime_ns) for p in paths)


async def test_what_nobody_holds_is_an_orphan_and_what_anybody_holds_is_none(home: Home) -> None:
    async with outlive.connect() as host:
        pid = await a_child(host)
        assert (await doctor()).about("orphans", pid) is None
    kill_all_of_outlive(home)
    diagnosis = await doctor()
    found = diagnosis.about("orphans", pid)
    assert found is not None
    assert found["severity"] == "warning"
    assert lives(pid)
    assert [diagnosis.severity(f"socket {name}") for name in ("channel", "control", "events")] == ["note"] * 3
    assert diagnosis.severity("lock") == "ok"
    assert "stale: t" in diagnosis.of("workers")["found"]
    os.kill(pid, signal.SIGKILL)
    assert ended_within(pid, 30)
    assert (await doctor()).about("orphans", pid) is None
    async with outlive.connect():  # the next broker clears away what this one left
        await healthy("socket channel")


async def test_what_a_broker_of_another_home_holds_is_no_orphan_here_and_what_it_lost_is_a_note(
    home: Home, host: outlive.Host, tmp_path: Path
) -> None:
    pid = await a_child(host)
    elsewhere = str(tmp_path / "other")
    assert (await doctor(OUTLIVE_HOME=elsewhere)).about("orphans", pid) is None
    kill_all_of_outlive(home)
    found = (await doctor(OUTLIVE_HOME=elsewhere)).about("orphans", pid)
    assert found is not None
    assert found["severity"] == "note"
    assert str(home.paths.run) in found["meaning"]
    os.kill(pid, signal.SIGKILL)
    assert ended_within(pid, 30)
    assert await host.status()  # a new broker's


async def test_what_only_a_worker_still_holds_is_no_orphan(home: Home, host: outlive.Host) -> None:
    pid = await a_child(host)
    for role in ("broker.keeper", "broker"):
        for one in home.pids(role):
            os.kill(one, signal.SIGKILL)
    assert (await doctor()).about("orphans", pid) is None
    assert lives(pid)


async def test_what_an_ended_process_left_in_the_background_is_a_note(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("t")
    ended = await thread.exec_command(["sh", "-c", "setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!"])
    assert ended.exit_code == 0
    pid = int(ended.output)

    async def told() -> dict[str, Any]:
        while not (found := (await doctor()).about("orphans", pid)):  # its end has yet to be collected everywhere
            await asyncio.sleep(0.05)
        return found

    assert (await told())["severity"] == "note"
    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def stranger(home: Home) -> Iterator[int]:
    """The pid of a process that is none of ours and has the broker's lock."""
    home.paths.prepare()
    locker = [sys.executable, "-I", "-S", "-c", LOCKER, str(home.paths.lock)]
    environment = {name: value for name, value in os.environ.items() if name != "OUTLIVE_HOME"}
    with subprocess.Popen(locker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.kill()


async def test_a_lock_in_the_hands_of_a_stranger_is_an_error_that_names_it(home: Home, stranger: int) -> None:
    diagnosis = await doctor()
    assert diagnosis.severity("lock") == "error"
    assert diagnosis.of("lock")["pids"] == [stranger]
    os.kill(stranger, signal.SIGKILL)
    assert ended_within(stranger, 30)
    assert (await doctor()).severity("lock") == "ok"


async def test_rights_that_are_too_wide_or_too_narrow_are_told_and_left_as_they_are(home: Home) -> None:
    home.paths.prepare()
    home.paths.run.chmod(0o755)
    home.paths.state.chmod(0o500)
    before = snapshot(home.path)
    diagnosis = await doctor()
    assert diagnosis.severity("runtime folder") == "warning"
    assert "chmod 700" in diagnosis.of("runtime folder")["advice"]
    assert diagnosis.severity("state folder") == "error"
    assert snapshot(home.path) == before
    home.paths.state.chmod(0o700)


async def test_a_stopped_broker_is_told_at_once_and_a_stopped_worker_too(home: Home, host: outlive.Host) -> None:
    await host.thread("t")
    worker = await home.worker(host, "t")
    (broker,) = home.pids("broker")
    await healthy("broker")
    for pid in (broker, worker):
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda pid=pid: state_of(pid) == "T")  # type: ignore[misc]
    diagnosis = await doctor()
    assert diagnosis.of("broker")["pids"] == [broker]
    assert "kill -CONT" in diagnosis.of("broker")["advice"]
    found = diagnosis.about("workers", worker)
    assert found is not None
    assert found["severity"] == "warning"
    for pid in (worker, broker):
        os.kill(pid, signal.SIGCONT)
    assert await host.status()


async def test_a_broker_whose_folder_was_removed_is_an_error(home: Home) -> None:
    async with outlive.connect() as host:
        pid = await a_child(host)
    (broker,) = home.pids("broker")
    shutil.rmtree(home.paths.run)
    diagnosis = await doctor()
    found = diagnosis.about("other broker", broker)
    assert found is not None
    assert found["severity"] == "error"
    assert diagnosis.about("orphans", pid) is None  # it holds what it holds
    kill_all_of_outlive(home)
    os.kill(pid, signal.SIGKILL)
    assert ended_within(pid, 30)


async def test_it_starts_nothing_and_writes_nothing_with_or_without_a_broker(home: Home) -> None:
    home.path.mkdir()
    home.write_config("max_processes = 'many'\n")
    before = snapshot(home.path)
    diagnosis = await doctor()
    assert diagnosis.severity("configuration") == "error"
    assert diagnosis.severity("broker") == "ok"
    assert snapshot(home.path) == before
    assert home.pids() == []
    home.paths.config.unlink()
    async with outlive.connect() as host:
        await a_child(host, tty=True)
        before = snapshot(home.paths.run)
        assert (await healthy("broker")).severity("version") == "ok"
        assert snapshot(home.paths.run) == before
        assert len(await host.processes()) == 1
