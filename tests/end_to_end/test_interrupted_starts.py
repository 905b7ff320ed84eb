"""A start whose broker does not live to see it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any
from unittest.mock import ANY

import msgspec
import pytest

import outlive

from .conftest import Home, eventually, lives

TWO_WAYS = pytest.mark.parametrize("tty", [True, False])


@TWO_WAYS
async def test_a_process_whose_start_was_under_way_when_the_broker_was_killed_is_the_next_brokers(
    home: Home, host: outlive.Host, tty: bool
) -> None:
    thread = await host.thread("orphan")
    other = await thread.exec_command(["cat"], tty=True, yield_time_ms=250)
    worker = await home.worker(host, "orphan")
    (broker,) = home.pids("broker")
    spawner = home.spawner(worker)
    os.kill(spawner, signal.SIGSTOP)
    call = asyncio.create_task(thread.exec_command(["sleep", "1000"], tty=tty, call_id="once", yield_time_ms=250))
    await host.status()  # the broker takes one after the other, and so does the worker
    await thread.write_stdin(other.process_id, "x", yield_time_ms=250)
    os.kill(broker, signal.SIGKILL)
    await eventually(lambda: not lives(broker))
    assert (await thread.resume()).worker_pid == worker
    os.kill(spawner, signal.SIGCONT)
    answer = await call
    row = await row_of(thread, answer.process_id)
    assert row.state == "attached"
    await home.kill_worker(host, "orphan")
    await thread.resume()
    assert await row_of(thread, answer.process_id) == msgspec.structs.replace(row, worker_pid=ANY)
    assert lives(row.pid or 0)


async def row_of(thread: outlive.Thread, process_id: str) -> Any:
    """Return the line of `ps` of a living process."""
    (row,) = (row for row in await thread.processes() if row.process_id == process_id)
    return row
