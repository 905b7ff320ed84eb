"""Input that is asked for twice is typed once, whichever worker gets it; what is let go when answers are heard."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from outlive.common.errors import StdinClosed
from outlive.worker import processes

# Without an echo, so that what was typed is counted in what it prints.
LINES = [b"sh", b"-c", b"stty -echo; echo ready; while read line; do echo got $line; done"]


async def shell(desk: Any) -> str:
    return str(await desk.start(LINES, tty=True, shown=b"ready"))


async def test_a_write_id_that_comes_again_joins_the_call_under_way(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    first = asyncio.create_task(desk.write(process_id, b"exec cat\n", ms=30_000, write_id="w"))
    await desk.until(process_id, b"got exec")
    again = asyncio.create_task(desk.write(process_id, b"exec cat\n", ms=30_000, write_id="w"))
    await asyncio.sleep(0)
    assert not again.done()
    desk.held(process_id).hurry()
    assert ((await first).output, (await first).typed) == ((await again).output, (await again).typed)
    assert desk.held(process_id).pump.inlet.position == len(b"exec cat\n")


async def test_the_next_worker_knows_what_the_former_one_was_asked_and_types_none_of_it(house: Any) -> None:
    former, desk = house.desk(), house.desk(2)
    process_id = await shell(former)
    first = await former.write(process_id, b"a\n", write_id="w")
    copies = former.copies()
    await former.manager.export_processes()
    assert desk.manager.import_processes(copies) == []
    again = await desk.write(process_id, b"a\n", write_id="w")
    assert (again.output, again.typed) == (first.output, 2)
    await desk.write(process_id, b"b\n", write_id="x")
    assert await desk.until(process_id, b"got b") == b"ready\r\ngot a\r\ngot b\r\n"


async def test_input_that_cannot_be_typed_is_refused_each_time(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start([b"/bin/sleep", b"1000"])
    for _ in range(2):
        with pytest.raises(StdinClosed):
            await desk.write(process_id, b"a\n", write_id="w")


async def test_an_answer_that_no_broker_heard_lets_nothing_go(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    first = await desk.write(process_id, b"\x04", ms=30_000, write_id="w")
    assert first.exit_code == 0
    desk.manager.settle(lambda: False)
    desk.manager.settle()
    assert desk.manager.process_ids == [process_id]
    again = await desk.write(process_id, b"\x04", write_id="w")
    assert (again.exit_code, again.typed, again.output) == (0, 1, first.output)
    desk.manager.settle()
    assert desk.manager.process_ids == []


async def test_who_did_not_hear_of_an_end_may_ask_again_and_then_it_is_let_go(
    house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "REPEATED_WITHIN", 0)
    desk = house.desk()
    unread = (await desk.run("exit 3")).process_id
    desk.manager.settle(lambda: False)
    untold = await desk.start("read go; exit 4", tty=True)
    await desk.held(untold).type(b"\n", float("inf"))
    assert await desk.held(untold).until_ended()
    assert desk.manager.process_ids == sorted([unread, untold])
    desk.manager.tell_of_ends()  # as to the next broker
    while unread in desk.manager.process_ids:
        await asyncio.sleep(0)
    assert desk.manager.process_ids == [untold]
