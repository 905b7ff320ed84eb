"""The real clock and the real network under the watches."""

from __future__ import annotations

import asyncio
import os
import socket
import time

from outlive.broker.alarm import Alarm, listening


def boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


async def test_an_alarm_rings_once_and_not_before_its_instant() -> None:
    rang: asyncio.Queue[int] = asyncio.Queue()
    alarm = Alarm(lambda: rang.put_nowait(boottime()))
    instant = boottime() + 50_000_000
    alarm.set(instant + 3600 * 10**9)
    alarm.set(instant)
    assert await rang.get() >= instant
    alarm.set(boottime() - 1)  # what has passed rings at once
    await rang.get()
    assert rang.empty()
    alarm.close()


async def test_an_alarm_that_is_not_set_has_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    alarm = Alarm(lambda: None)
    alarm.set(boottime() + 3600 * 10**9)
    alarm.set(None)
    assert os.listdir("/proc/self/fd") == before
    alarm.set(None)


def test_the_ports_of_this_host_that_something_listens_on_are_found() -> None:
    with socket.socket() as server, socket.socket(socket.AF_INET6) as other, socket.socket() as idle:
        for one in (server, other, idle):
            one.bind(("127.0.0.1" if one.family == socket.AF_INET else "::1", 0))
        server.listen()
        other.listen()
        found = listening()
        assert {server.getsockname()[1], other.getsockname()[1]} <= found
        assert idle.getsockname()[1] not in found
