"""Export from one manager, import into another: ids, streams, input and output go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

import pytest

from outlive.common.descriptors import Handles
from outlive.common.errors import ExpiredProcess, UnknownProcess
from outlive.common.messages import Delta, ExecCommand
from outlive.common.outcome import Outcome
from outlive.common.transcript import Lease, Transcript

FOREVER = float("inf")
SLEEP = [b"/bin/sleep", b"1000"]
COUNTER = "stty -echo; n=0; while read word; do n=$((n+1)); echo $0 $word $n; done"


async def start_two(desk: Any) -> list[str]:
    """Start two that can be told apart; return their ids."""
    return [
        await desk.start([b"/bin/sh", b"-c", COUNTER.encode(), name], tty=True, call_id=f"call-{name.decode()}")
        for name in (b"one", b"two")
    ]


def state_of(desk: Any) -> list[str]:
    ids: list[str] = desk.manager.process_ids
    return ids


async def hand_over(old: Any, new: Any, streams: dict[str, tuple[int, int]] | None = None) -> list[str]:
    """Detach here and reattach there, with the broker's copies in between; return what was refused."""
    copies = old.copies()
    exported = await old.manager.export_processes()
    assert exported == sorted(process_id for _, process_id in copies)
    refused: list[str] = new.manager.import_processes(copies, streams)
    return refused


async def test_exported_ids_are_unknown_here_and_known_there(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    ids = await start_two(old)
    assert await hand_over(old, new) == []
    assert (state_of(old), state_of(new)) == ([], sorted(ids))
    for process_id in ids:
        with pytest.raises(UnknownProcess):
            await old.write(process_id, b"x")
        with pytest.raises(UnknownProcess):
            old.held(process_id)
    assert b"one again 1\r\n" in await new.say(ids[0], b"again\n", b"again 1\r\n")
    assert b"two again 1\r\n" in await new.say(ids[1], b"again\n", b"again 1\r\n")


async def test_five_handoffs_in_a_row_lose_and_repeat_nothing(house: Any) -> None:
    desk = house.desk(1)
    ids = await start_two(desk)
    for epoch in range(2, 7):
        for process_id in ids:
            await desk.say(process_id, b"to-%d\n" % epoch, b"to-%d %d\r\n" % (epoch, epoch - 1))
        following = house.desk(epoch)
        assert await hand_over(desk, following) == []
        desk = following
    for process_id, name in zip(ids, (b"one", b"two"), strict=True):
        everything = b"".join(b"%s to-%d %d\r\n" % (name, epoch, epoch - 1) for epoch in range(2, 7))
        assert await desk.until(process_id, everything) == everything
        facts = desk.held(process_id).transcript.facts
        assert (facts.process_id, facts.call_id) == (process_id, f"call-{name.decode()}")


async def test_what_is_printed_and_ends_in_between_is_there_afterwards(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    one = await old.start("stty -echo; echo before; read go; echo meanwhile; exit 3", tty=True, shown=b"before\r\n")
    two = await old.start(SLEEP)
    copies = old.copies()
    await old.manager.export_processes()
    handles = copies["t", one]
    os.write(handles.terminal, b"go\n")
    signal.pidfd_send_signal(copies["t", two].pidfd, signal.SIGTERM)
    assert new.manager.import_processes(copies) == []
    response = await new.write(one)
    assert (response.output, response.exit_code) == ("meanwhile\r\n", 3)
    assert (await new.write(two)).exit_code == 128 + 15
    assert {end.process_id for end in new.ends()} == {one, two}
    assert old.ends() == []


async def test_a_process_that_was_collected_and_comes_back_answers_its_call_again(house: Any) -> None:
    desk = house.desk()
    command = [b"/bin/sh", b"-c", b"echo once; exit 5"]
    response = await desk.run(command, call_id="same")
    copies = desk.copies()
    desk.manager.settle()
    with pytest.raises(ExpiredProcess):
        await desk.run(command, call_id="same")
    assert desk.manager.import_processes(copies) == []  # the broker died before it had recorded that
    again = await desk.run(command, call_id="same")
    assert (again.process_id, again.output, again.exit_code) == (response.process_id, "once\n", 5)


async def test_the_stream_of_deltas_goes_on_under_the_same_call_and_number(house: Any) -> None:
    desk = house.desk(1)
    desk.manager.want_deltas(True)
    ids = await start_two(desk)
    said: list[Delta] = []
    for epoch in range(2, 5):
        for process_id in ids:
            await desk.say(process_id, b"%d\n" % epoch, b"%d %d\r\n" % (epoch, epoch - 1))
        following = house.desk(epoch)
        following.manager.want_deltas(True)
        copies = desk.copies()
        await desk.manager.export_processes()
        said += [one for one in desk.said if isinstance(one, Delta)]
        streams = {}
        for process_id in ids:
            last = [delta for delta in said if delta.process_id == process_id][-1]
            streams[process_id] = last.seq + 1, last.offset + len(last.chunk)
        assert following.manager.import_processes(copies, streams) == []
        desk = following
    for process_id, name in zip(ids, (b"one", b"two"), strict=True):
        mine = [delta for delta in said if delta.process_id == process_id]
        assert [delta.seq for delta in mine] == list(range(len(mine)))
        assert b"".join(delta.chunk for delta in mine) == b"".join(
            b"%s %d %d\r\n" % (name, epoch, epoch - 1) for epoch in range(2, 5)
        )
        assert {delta.call_id for delta in mine} == {f"call-{name.decode()}"}


async def test_an_export_stops_the_streams(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    old.manager.want_deltas(True)
    ids = await start_two(old)
    await hand_over(old, new)
    said = len(old.said)
    await new.say(ids[0], b"there\n", b"there 1\r\n")
    new.manager.want_deltas(True)
    await new.manager.terminate_all_processes()
    assert old.said[said:] == []


async def test_on_a_collision_the_attached_process_wins_and_the_other_is_given_back(house: Any) -> None:
    old, new = house.desk(1, seed=7), house.desk(2, seed=7)
    detached = await start_two(old)
    attached = await new.start(COUNTER, tty=True)
    assert attached == detached[0]
    copies = old.copies()
    kept = {role: os.dup(fd) for role, fd in copies["t", attached].held().items()}
    await old.manager.export_processes()
    assert new.manager.import_processes(copies) == [attached]
    assert len(copies["t", attached]) == 0, "refused handles are closed"
    assert state_of(new) == sorted(detached)
    await new.say(attached, b"mine\n", b"sh mine 1\r\n")

    # Untouched: nobody has its lease, and whoever gets it next goes on.
    handles = Handles(kept)
    assert Transcript(handles.transcript).live().lease is None
    other = house.desk(3)
    assert other.manager.import_processes({("t", attached): handles}) == []
    await other.say(attached, b"theirs\n", b"one theirs 1\r\n")


async def test_a_process_of_another_thread_or_name_is_refused(house: Any) -> None:
    old, new = house.desk(1, "a"), house.desk(2, "b")
    process_id = await old.start(SLEEP)
    copies = old.copies()
    again = {("b", process_id): Handles({role: os.dup(fd) for role, fd in copies["a", process_id].held().items()})}
    await old.manager.export_processes()
    assert new.manager.import_processes(copies) == [process_id]
    assert new.manager.import_processes(again) == [process_id]
    assert state_of(new) == []
    await old.manager.terminate_all_processes()


async def test_a_process_that_somebody_else_pumps_is_refused(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    ids = await start_two(old)
    assert new.manager.import_processes(old.copies()) == sorted(ids, key=ids.index)
    assert (state_of(new), state_of(old)) == ([], sorted(ids))
    await old.say(ids[0], b"mine\n", b"one mine 1\r\n")


async def test_a_dead_holders_lease_does_not_stand_in_the_way(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    process_id = await old.start(COUNTER, tty=True)
    copies = old.copies()
    await old.manager.export_processes()
    dead = Lease((1 << 22) + 1, 1, 1)
    Transcript(copies["t", process_id].transcript).take_lease(dead)
    assert new.manager.import_processes(copies) == []
    await new.say(process_id, b"mine\n", b"sh mine 1\r\n")


async def test_imported_ids_are_reserved(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    ids = await start_two(old)
    await hand_over(old, new)
    assert all(one in new.manager.ids for one in ids)
    await hand_over(new, old)
    assert all(one in new.manager.ids for one in ids)


async def test_the_same_call_after_a_handoff_finds_its_process(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    (one, _) = await start_two(old)
    await hand_over(old, new)
    response = await new.run("true", call_id="call-one", ms=250)
    assert response.process_id == one


async def test_a_call_under_way_is_answered_before_the_process_is_given_away(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    calls = [
        asyncio.create_task(old.run(f"echo {name}; exec sleep 1000", ms=30_000, call_id=name)) for name in "ab"
    ]
    await asyncio.sleep(0)
    # They are still being started: the export waits for that, too.
    exported = await old.manager.export_processes()
    responses = await asyncio.gather(*calls)
    assert sorted(response.process_id for response in responses) == exported
    assert all(response.session_id for response in responses)
    assert (state_of(old), state_of(new)) == ([], [])


async def test_an_export_leaks_no_descriptor_and_gives_up_every_lease(house: Any) -> None:
    desk = house.desk()
    await desk.run("true")
    desk.manager.settle()
    before = len(os.listdir("/proc/self/fd"))
    await start_two(desk)
    copies = desk.copies()
    await desk.manager.export_processes()
    assert len(os.listdir("/proc/self/fd")) == before + 12
    for handles in copies.values():
        assert Transcript(handles.transcript).live().lease is None
        signal.pidfd_send_signal(handles.pidfd, signal.SIGKILL)
        handles.close()


async def test_an_export_of_nothing_is_empty(house: Any) -> None:
    assert await house.desk().manager.export_processes() == []


async def test_an_ended_process_that_nobody_collected_is_handed_over_with_its_output(house: Any) -> None:
    old, new = house.desk(1), house.desk(2)
    one = await old.start("read go; echo unread; exit 7", tty=True)
    two = await old.start(SLEEP)
    await old.held(one).type(b"\n", FOREVER)
    assert await old.held(one).until_ended()
    await hand_over(old, new)
    response = await new.write(one)
    assert (response.exit_code, response.output) == (7, "\r\nunread\r\n")
    assert new.held(one).transcript.live().outcome == Outcome("exited", code=7)
    assert new.held(two).outcome is None


async def test_what_is_being_ended_is_handed_over_and_stays_marked(house: Any) -> None:
    """A thread that goes to bed while it makes room must not forget whom it is ending."""
    desk = house.desk(max_processes=9)
    ids = await asyncio.gather(*(desk.start(SLEEP) for _ in range(9)))
    victim = min(ids, key=lambda process_id: desk.held(process_id).last_used)
    call = ExecCommand(
        thread="t", cmd=SLEEP, workdir=b"/", environment={}, call_id="last", yield_time_ms=250, login=False
    )
    starting = asyncio.create_task(desk.manager.exec_command(call))
    await asyncio.sleep(0)  # the victim is on its way out, and its tree not yet ended
    assert victim not in state_of(desk)
    copies = desk.copies()
    assert ("t", victim) in copies
    exported = await desk.manager.export_processes()
    await starting
    assert victim in exported or any(getattr(one, "process_id", "") == victim for one in desk.said)
    assert Transcript(copies["t", victim].transcript).live().by == "pruned"
    for handles in copies.values():
        with suppress(ProcessLookupError):  # the victim's end may be over
            signal.pidfd_send_signal(handles.pidfd, signal.SIGKILL)
        handles.close()


async def test_nothing_is_given_to_a_broker_that_has_gone_while_a_start_was_waited_for(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start("sleep 1000")
    starting = asyncio.ensure_future(desk.start("sleep 1000"))
    while not desk.manager.starting:
        await asyncio.sleep(0)
    assert await desk.manager.export_processes(lambda: False) == []
    assert desk.manager.process_ids == sorted([process_id, await starting])
