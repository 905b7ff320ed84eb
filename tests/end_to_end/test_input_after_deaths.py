"""What a call that typed is answered when workers die, and what is let go when the broker itself answers."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import outlive


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
        answer = await call  # not Interrupted: the header says what was typed
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
