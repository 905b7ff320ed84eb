"""A spawner that dies, stops or is stuck costs at most the start that was under way."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from outlive.common import channel
from outlive.common.channel import Packet, open_parcel
from outlive.common.errors import SpawnError
from outlive.common.outcome import Outcome
from outlive.common.transcript import Transcript


async def spawner_of(family: Any) -> int:
    await family.run(b"/bin/true")
    (pid,) = family.nursery.pids
    return int(pid)


async def test_a_spawner_killed_during_a_start_is_an_error_of_that_stage_and_the_next_start_works(
    family: Any,
) -> None:
    pid = await spawner_of(family)
    os.kill(pid, signal.SIGSTOP)  # so that the start is under way for certain
    order = family.order(b"/bin/true")
    start = asyncio.create_task(family.nursery.start(order))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(SpawnError) as caught:
        await start
    assert caught.value.stage == "spawner"
    assert family.orphans == [order.facts], "the broker has to find out what became of it"
    held = await family.run(b"/bin/sh", b"-c", b"exit 4")
    assert held.outcome == Outcome("exited", code=4)
    assert pid not in family.nursery.pids


async def test_a_spawner_that_died_while_nobody_looked_costs_nothing(family: Any, ended: Any) -> None:
    pid = await spawner_of(family)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    # Not a turn of the loop between its death and the next start.
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
    os.close(pidfd)
    held = await family.run(b"/bin/sh", b"-c", b"exit 4")
    assert held.outcome == Outcome("exited", code=4)
    assert family.orphans == []


@pytest.mark.parametrize("tty", [True, False], ids=["pty", "pipe"])
async def test_the_status_of_a_child_whose_spawner_was_killed_is_known(family: Any, ended: Any, tty: bool) -> None:
    pid = await spawner_of(family)
    code = await family.start(b"/bin/sh", b"-c", b"kill -STOP $$; exit 5", tty=tty)
    dead = await family.start(b"/bin/sleep", b"1000", tty=tty)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await ended(pidfd)
    os.close(pidfd)
    status = Path(f"/proc/{code.transcript.live().pid}/status")
    while "State:\tT" not in await asyncio.to_thread(status.read_text):
        await asyncio.sleep(0.001)
    signal.pidfd_send_signal(code.handles.pidfd, signal.SIGCONT)
    signal.pidfd_send_signal(dead.handles.pidfd, signal.SIGKILL)
    assert await code.until_ended()
    assert await dead.until_ended()
    assert (code.outcome, dead.outcome) == (Outcome("exited", code=5), Outcome("signaled", signal=9))


async def test_the_status_of_a_child_whose_spawner_is_stopped_is_known(family: Any) -> None:
    pid = await spawner_of(family)
    held = await family.start(b"/bin/sh", b"-c", b"read go; exit 6", tty=True)
    os.kill(pid, signal.SIGSTOP)
    await held.type(b"\n", float("inf"))
    assert await held.until_ended()
    assert held.outcome == Outcome("exited", code=6)
    os.kill(pid, signal.SIGCONT)


async def test_a_start_beside_a_stuck_one_gets_a_spawner_of_its_own(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outlive.worker.nursery.STUCK", 0.0)
    pid = await spawner_of(family)
    os.kill(pid, signal.SIGSTOP)
    stuck = asyncio.create_task(family.start(b"/bin/sh", b"-c", b"echo had its chance"))
    await asyncio.sleep(0)
    await family.run(b"/bin/true")
    assert pid in family.nursery.pids
    assert len(family.nursery.pids) == 2
    os.kill(pid, signal.SIGCONT)
    held = await stuck
    assert await held.until_ended()
    assert held.outcome == Outcome("exited", code=0)


async def test_starts_at_once_each_get_their_own_process(family: Any) -> None:
    helds = await asyncio.gather(
        *(family.start(b"/bin/sh", b"-c", b"echo $0 $$", b"%d" % number, tty=True) for number in range(20))
    )
    for number, held in enumerate(helds):
        assert await held.until_ended()
        (part,) = held.transcript.read(0, held.transcript.written)
        assert part[1] == b"%d %d\r\n" % (number, held.transcript.live().pid)
    assert len(family.nursery.pids) == 1


async def test_a_start_that_nobody_waits_for_any_more_leaks_no_descriptor(family: Any) -> None:
    await spawner_of(family)
    family.helds.pop().close()
    before = len(os.listdir("/proc/self/fd"))
    start = asyncio.create_task(family.start(b"/bin/true", tty=True))
    await asyncio.sleep(0)
    start.cancel()
    await asyncio.wait([start])
    await family.run(b"/bin/true")  # answered after it
    family.helds.pop().close()
    assert len(os.listdir("/proc/self/fd")) == before


class Deposits:
    """The broker's end of a channel: what was deposited, packet by packet."""

    def __init__(self) -> None:
        self.theirs, self.ours = channel.pair()

    def packets(self, count: int) -> list[Packet]:
        packets = [self.ours.receive_within(10) for _ in range(count)]
        assert all(packets)
        return packets  # type: ignore[return-value]

    def close(self) -> None:
        self.theirs.close()
        self.ours.close()


async def test_what_exists_before_the_fork_is_deposited_before_and_the_rest_after(family: Any) -> None:
    broker = Deposits()
    family.nursery.use_broker(broker.theirs)
    held = await family.start(b"/bin/cat", tty=True)
    first, second = broker.packets(2)
    (key, early), (same, late) = *open_parcel(first).items(), *open_parcel(second).items()
    assert key == same == held.key
    assert set(early.held()) == {"transcript", "conduit_read", "conduit_write", "inlet"}
    assert set(late.held()) == {"terminal", "pidfd"}
    assert Transcript(early.transcript).facts == held.transcript.facts
    early.close()
    late.close()
    broker.close()


async def test_a_start_that_failed_is_taken_back_from_the_broker(family: Any) -> None:
    broker = Deposits()
    family.nursery.use_broker(broker.theirs)
    with pytest.raises(SpawnError):
        await family.start(b"/no/such/program", tty=True)
    deposit, undeposit = broker.packets(2)
    assert [deposit.kind, undeposit.kind] == ["deposit", "undeposit"]
    ((_, process_id, _),) = deposit.message["processes"]
    assert undeposit.message["process"] == process_id
    deposit.close()
    broker.close()


async def test_without_a_broker_starts_go_on(family: Any) -> None:
    broker = Deposits()
    family.nursery.use_broker(broker.theirs)
    broker.close()
    await family.run(b"/bin/true")
    family.nursery.use_broker(None)
    await family.run(b"/bin/true")
    again = Deposits()
    family.nursery.use_broker(again.theirs)
    await family.run(b"/bin/true")
    for packet in again.packets(2):
        assert packet.kind == "deposit"
        packet.close()
    again.close()


async def test_a_spawner_finishes_what_it_was_told_and_ends_with_its_worker(family: Any) -> None:
    broker = Deposits()
    family.nursery.use_broker(broker.theirs)
    pid = await spawner_of(family)
    for packet in broker.packets(2):
        packet.close()
    os.kill(pid, signal.SIGSTOP)
    start = asyncio.create_task(family.nursery.start(family.order(b"/bin/sh", b"-c", b"exec sleep 1000")))
    await asyncio.sleep(0)
    family.nursery.close()  # as the kernel does for a worker that dies
    with pytest.raises(SpawnError):
        await start
    os.kill(pid, signal.SIGCONT)
    first, second = broker.packets(2)
    (early,), (late,) = open_parcel(first).values(), open_parcel(second).values()
    assert Transcript(early.transcript).live().started
    signal.pidfd_send_signal(late.pidfd, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC240
        await asyncio.sleep(0.001)
    early.close()
    late.close()
    broker.close()


async def test_a_start_that_outlasts_its_worker_is_the_spawners_to_finish_and_no_orphan(family: Any) -> None:
    pid = await spawner_of(family)
    os.kill(pid, signal.SIGSTOP)
    start = asyncio.create_task(family.nursery.start(family.order(b"/bin/true")))
    await asyncio.sleep(0)
    family.nursery.close()
    with pytest.raises(SpawnError):
        await start
    assert family.orphans == []
    os.kill(pid, signal.SIGCONT)
