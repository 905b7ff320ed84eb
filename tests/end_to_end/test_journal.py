"""What survives the broker by way of its journal; and a state folder that is full, damaged, or none."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

import outlive

from .conftest import PATIENCE, Home, ended_within, eventually


async def kill_broker(home: Home) -> None:
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGKILL)
    # By its pidfd: a zombie's other threads may still hold its sockets.
    assert await asyncio.to_thread(ended_within, broker, PATIENCE)


def killed(home: Home) -> list[int]:
    """Kill everything at once, and return what there was: somebody may have been started meanwhile."""
    pids = home.pids()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


async def written(home: Home, process_id: str, state: str) -> None:
    """Wait until the journal on the disk says this of a process."""

    def look() -> bool:
        connection = sqlite3.connect(f"{home.paths.journal.as_uri()}?mode=ro", uri=True)
        try:
            return bool(
                connection.execute(
                    "SELECT 1 FROM processes WHERE id = ? AND state = ?", (process_id, state)
                ).fetchall()
            )
        finally:
            connection.close()

    await eventually(look)


async def test_limits_and_calls_and_ids_survive_a_killed_broker(home: Home) -> None:
    home.write_config("ended_keep_count = 2\nseed = 7\n")
    async with outlive.connect() as host:
        thread = await host.thread("kept")
        answers = [await thread.exec_command(["echo", str(n)], call_id=f"call-{n}") for n in range(4)]
        ids = [answer.process_id for answer in answers]
        for number, process_id in enumerate(ids):
            await written(home, process_id, "ended" if number > 1 else "expired")
    await kill_broker(home)
    async with outlive.connect() as host:
        thread = outlive.Thread(host, "kept")
        for number in (2, 3):
            again = await thread.exec_command(["echo", "another"], call_id=f"call-{number}")
            assert (again.process_id, again.output) == (ids[number], f"{number}\n")
        for number in (0, 1):
            with pytest.raises(outlive.ExpiredProcess):
                await thread.exec_command(["echo", "another"], call_id=f"call-{number}")
            with pytest.raises(outlive.ExpiredProcess):
                await thread.wait(ids[number])
        assert (await thread.exec_command(["echo", "new"])).process_id not in ids


@pytest.mark.skipif(find_spec("outlive.broker.keeper") is None, reason="descriptors die with the broker")
async def test_a_broker_that_is_killed_right_after_an_end_has_written_it_or_the_next_one_finds_the_process(
    home: Home,
) -> None:
    for number in range(4):
        async with outlive.connect() as host:
            thread = await host.thread("t")
            ended = await thread.exec_command(f"echo {number}; exit {number + 1}", call_id=f"call-{number}")
            assert ended.exit_code == number + 1
            await kill_broker(home)
        async with outlive.connect() as host:
            thread = outlive.Thread(host, "t")
            assert await thread.wait(ended.process_id) == outlive.Outcome("exited", code=number + 1)
            assert await thread.output(ended.process_id) == b"%d\n" % number
            again = await thread.exec_command("echo another", call_id=f"call-{number}")
            assert (again.process_id, again.exit_code) == (ended.process_id, number + 1)


async def test_an_epoch_is_never_used_twice_whoever_dies(home: Home) -> None:
    epochs = []
    for _ in range(3):
        async with outlive.connect() as host:
            await host.thread("t")
            await home.worker(host, "t")
            (row,) = await host.threads()
            epochs.append(row.epoch)
            await home.kill_worker(host, "t")
            (row,) = await host.threads()
            epochs.append(row.epoch)
            await host.down(force=True)
    assert epochs == sorted(set(epochs))


async def test_after_a_reboot_what_lived_is_lost_and_what_had_ended_is_there(home: Home) -> None:
    async with outlive.connect() as host:
        thread = await host.thread("t")
        ended = await thread.exec_command("echo kept; exit 5")
        lived = await thread.exec_command(["cat"], tty=True, yield_time_ms=250, call_id="once")
        await written(home, lived.process_id, "alive")
        await written(home, ended.process_id, "ended")
    # A machine that loses its power, for those who look at the files: nothing is left but these.
    await eventually(lambda: not killed(home))
    for path in home.paths.run.rglob("*"):
        if not path.is_dir():
            path.unlink()
    with closing(sqlite3.connect(home.paths.journal)) as connection, connection:
        connection.execute("UPDATE processes SET boot_id = 'the one before' WHERE boot_id IS NOT NULL")
    connection.close()
    async with outlive.connect() as host:
        thread = outlive.Thread(host, "t")
        assert await thread.wait(lived.process_id) == outlive.Outcome.lost("rebooted")
        assert await thread.output(lived.process_id) == b""
        answer = await thread.write_stdin(lived.process_id, "more\n")
        assert (answer.exit_code, answer.outcome) == (None, {"kind": "lost", "reason": "rebooted"})
        again = await thread.exec_command(["cat"], tty=True, call_id="once")
        assert (again.process_id, again.outcome) == (lived.process_id, {"kind": "lost", "reason": "rebooted"})
        assert await thread.wait(ended.process_id) == outlive.Outcome("exited", code=5)
        assert await thread.output(ended.process_id) == b"kept\n"
        rows = {row.process_id: row for row in await thread.processes(ended=True)}
        assert rows[lived.process_id].command == ["cat"]
        assert rows[lived.process_id].outcome == {"kind": "lost", "reason": "rebooted"}
        assert await thread.processes() == []


async def test_a_damaged_journal_is_set_aside_and_status_says_so(home: Home) -> None:
    async with outlive.connect() as host:
        assert (await host.status())["journal_trouble"] is None
        await host.down()
    home.paths.journal.write_bytes(b"what a disk may do" * 1000)
    async with outlive.connect() as host:
        trouble = (await host.status())["journal_trouble"]
        assert "is damaged" in trouble
        (aside,) = home.paths.state.glob("journal.db.damaged-*")
        assert aside.name in trouble
        assert trouble in home.paths.log.read_text()
        assert (await (await host.thread("t")).exec_command(["echo", "works"])).output == "works\n"


async def test_a_broker_starts_where_no_state_folder_can_be_made_and_keeps_what_ends_as_long_as_it_lives(
    home: Home,
) -> None:
    home.path.mkdir()
    home.paths.state.touch()
    async with outlive.connect() as host:
        assert "until this broker ends" in (await host.status())["journal_trouble"]
        thread = await host.thread("t")
        ended = await thread.exec_command("echo kept; exit 5")
        shell = await thread.exec_command(["cat"], tty=True, yield_time_ms=250)
        await home.kill_worker(host, "t")
        assert await thread.wait(ended.process_id) == outlive.Outcome("exited", code=5)
        assert await thread.output(ended.process_id) == b"kept\n"
        assert "typed" in (await thread.write_stdin(shell.process_id, "typed\n")).output


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small file system in this place, if we may."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_full_disk_loses_no_live_process_and_is_over_when_there_is_room(home: Home) -> None:
    with mounted(home.paths.state):
        async with outlive.connect() as host:
            thread = await host.thread("t")
            before = await thread.exec_command("echo before; exit 4")
            await written(home, before.process_id, "ended")
            filler = home.paths.state / "filler"
            await asyncio.to_thread(
                subprocess.run, ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False
            )
            shell = await thread.exec_command(["cat"], tty=True, yield_time_ms=250)
            large = await thread.exec_command("head -c 500000 /dev/zero; exit 5", max_output_tokens=10)
            while not (await host.status())["journal_trouble"]:
                await asyncio.sleep(0.01)
            assert await thread.wait(large.process_id) == outlive.Outcome("exited", code=5)
            assert await thread.output(large.process_id) == bytes(500_000)
            assert await thread.output(before.process_id) == b"before\n"
            await home.kill_worker(host, "t")
            assert "typed" in (await thread.write_stdin(shell.process_id, "typed\n")).output
            filler.unlink()
            await host.down(force=True)  # which writes what could not be written before
        async with outlive.connect() as host:
            thread = outlive.Thread(host, "t")
            assert (await host.status())["journal_trouble"] is None
            assert await thread.output(large.process_id) == bytes(500_000)
            assert await thread.output(before.process_id) == b"before\n"
            assert await thread.wait(shell.process_id) == outlive.Outcome("signaled", signal=9, by="shutdown")
            await host.down()
        await eventually(lambda: not home.pids())
