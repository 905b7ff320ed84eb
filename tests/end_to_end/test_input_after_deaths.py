"""What a call that typed is answered when workers die, and what is let go when the broker itself answers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import outlive

from .conftest import PYTHON, Home, eventually

CLI = Path(sys.executable).with_name("outlive")

# Reads slowly, into a file; what comes in one call takes several deaths.
SLOW = """
import os, sys, time, tty
tty.setraw(0)
os.write(1, b"ready")
with open(sys.argv[1], "wb", buffering=0) as file:
    while True:
        file.write(os.read(0, 4096))
        time.sleep(0.002)
"""


async def outlive_in(thread: str, command: str, *words: str) -> asyncio.subprocess.Process:
    """Start a command of the command line that goes on for half a minute."""
    options = (command, "-t", thread, "--yield-ms", "30000")
    return await asyncio.create_subprocess_exec(CLI, *options, *words, stdout=asyncio.subprocess.PIPE)


async def killed(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.communicate()


async def _shell(thread: outlive.Thread) -> outlive.Response:
    argv = ["sh", "-c", "stty -echo; echo ready; while read line; do echo got $line; done"]
    shell = await thread.exec_command(argv, tty=True, yield_time_ms=250)
    while b"ready" not in await thread.output(shell.process_id):
        await thread.read_output(shell.process_id, wait_ms=5000)
    return shell


async def test_input_that_was_typed_before_its_worker_died_is_answered_each_time(home, host) -> None:
    thread = await host.thread("type")
    shell = await _shell(thread)
    for word in ("one", "two"):
        call = asyncio.create_task(thread.write_stdin(shell.process_id, f"{word}\n", yield_time_ms=2000))
        while f"got {word}".encode() not in await thread.output(shell.process_id):
            await asyncio.sleep(0.01)
        await home.kill_worker(host, "type")
        answer = await call  # late, not an error
        assert answer.output.split()[-2:] == ["got", word]
        assert answer.typed == len(word) + 1


async def test_what_was_typed_is_answered_though_no_worker_comes_up_again(host) -> None:
    thread = await host.thread("type")
    shell = await _shell(thread)
    call = asyncio.create_task(thread.write_stdin(shell.process_id, "once\n", yield_time_ms=30_000))
    while b"got once" not in await thread.output(shell.process_id):
        await asyncio.sleep(0.01)
    while (row := (await host.threads())[0]).state != "failed":
        if row.worker_pid:
            with suppress(ProcessLookupError):
                os.kill(row.worker_pid, signal.SIGKILL)
        await asyncio.sleep(0.005)
    # Not Unavailable: who is told that may call again, and would type it twice.
    await thread.kill(shell.process_id)
    answer = await call
    assert (answer.typed, answer.exit_code) == (5, 143)


async def test_a_process_whose_end_the_broker_told_is_let_go(home, host) -> None:
    thread = await host.thread("told")
    shell = await _shell(thread)
    await thread.detach()
    await thread.kill(shell.process_id, signal="KILL")
    assert (await thread.wait(shell.process_id)).signal == 9
    answer = await thread.write_stdin(shell.process_id, resume=False)
    assert answer.exit_code == 137
    while (await host.status())["processes"]["ended"]:
        await asyncio.sleep(0.01)
    assert (await thread.write_stdin(shell.process_id, resume=False)).exit_code == 137  # from the journal


async def test_a_long_input_is_typed_on_by_each_next_worker_and_by_the_broker(
    home: Home, host: outlive.Host, tmp_path: Path
) -> None:
    thread = await host.thread("long")
    child = await thread.exec_command([*PYTHON, SLOW, str(tmp_path / "got")], tty=True, yield_time_ms=250)
    while b"ready" not in await thread.output(child.process_id):
        await thread.read_output(child.process_id, wait_ms=5000)
    text = b"".join(b"%07d\n" % line for line in range(125_000))
    call = asyncio.create_task(thread.write_stdin(child.process_id, text, yield_time_ms=30_000))
    for part in range(1, 5):
        await eventually(lambda part=part: (tmp_path / "got").stat().st_size > part * 150_000)
        if part < 4:
            await home.kill_worker(host, "long")
        else:
            os.kill(home.pids("broker")[0], signal.SIGKILL)
    await eventually(lambda: (tmp_path / "got").stat().st_size == len(text))
    await thread.kill(child.process_id, signal="KILL")
    assert (await call).typed == len(text)
    assert (tmp_path / "got").read_bytes() == text


@pytest.mark.parametrize("detached", [False, True], ids=["worker", "broker"])
async def test_what_a_killed_client_had_typed_and_started_is_found_by_the_next_with_the_same_ids(
    home: Home, host: outlive.Host, detached: bool
) -> None:
    thread = await host.thread("client")
    runs = home.path / "runs"
    line = f"echo started >>{runs}; stty -echo; echo ready; while read line; do echo got $line; done"
    first = await outlive_in("client", "exec", "--tty", "--call-id", "c", "--", "sh", "-c", line)
    await eventually(runs.exists)
    await killed(first)
    shell = await thread.exec_command(["sh", "-c", line], tty=True, yield_time_ms=250, call_id="c")
    while b"ready" not in await thread.output(shell.process_id):
        await thread.read_output(shell.process_id, wait_ms=5000)
    if detached:
        await thread.detach()
    first = await outlive_in(
        "client", "write", "--write-id", "w", "--no-resume", "--enter", shell.process_id, "once"
    )
    while b"got once" not in await thread.output(shell.process_id):
        await asyncio.sleep(0.01)
    await killed(first)
    again = await thread.write_stdin(shell.process_id, "once\r", write_id="w", resume=False)
    assert (again.typed, "got once" in again.output) == (5, True)
    last = await thread.write_stdin(shell.process_id, "\x04", yield_time_ms=30_000, write_id="x", resume=False)
    assert last.exit_code == 0
    while (await host.status())["processes"]["ended"]:
        await asyncio.sleep(0.01)
    # Collected: what was accepted while it lived is answered as such, and what was not says so.
    again = await thread.write_stdin(shell.process_id, "\x04", write_id="x", resume=False)
    assert (again.typed, again.exit_code, again.warnings) == (1, 0, [])
    late = await thread.write_stdin(shell.process_id, "late", write_id="y", resume=False)
    assert (late.typed, late.warnings) == (0, ["the process has ended; nothing was typed"])
    assert (await thread.output(shell.process_id)).count(b"got once") == 1
    assert runs.read_text() == "started\n"
