"""Input that is asked for twice is typed once: by its write id, and by who has held the process since when."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from outlive.common import kernel
from outlive.common.errors import Interrupted, StdinClosed, UnknownProcess
from outlive.common.response import Response
from outlive.worker import processes, writes
from outlive.worker.writes import Writes

# Without an echo, so that what was typed is counted in what it prints.
LINES = ["sh", "-c", "stty -echo; echo ready; while read line; do echo got $line; done"]
ARGV = [word.encode() for word in LINES]


def answer(output: str = "") -> Response:
    return Response(
        thread="t",
        process_id="1",
        chunk_id="",
        wall_time_seconds=0.0,
        exit_code=None,
        session_id=1,
        original_token_count=0,
        output=output,
        outcome=None,
        output_end=0,
    )


async def give(response: Response) -> Response:
    return response


async def shell(desk: Any) -> str:
    return str(await desk.start(ARGV, tty=True, shown=b"ready"))


async def test_a_write_id_that_comes_again_is_typed_once_and_gets_the_same_answer(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    first = await desk.write(process_id, b"a\n", write_id="w")
    again = await desk.write(process_id, b"a\n", write_id="w", first_asked=kernel.boottime())
    assert again == first
    assert (first.output, first.typed) == ("got a\r\n", 2)
    assert (await desk.until(process_id, b"got a")).count(b"got a") == 1
    assert desk.held(process_id).transcript.live().typed == 2


async def test_a_write_id_that_comes_again_joins_the_call_under_way(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    first = asyncio.create_task(desk.write(process_id, b"exec cat\n", ms=30_000, write_id="w"))
    await desk.until(process_id, b"got exec")
    again = asyncio.create_task(desk.write(process_id, b"exec cat\n", ms=30_000, write_id="w"))
    await asyncio.sleep(0)
    assert not again.done()
    desk.manager.held(process_id).hurry()
    assert await again == await first
    assert desk.held(process_id).transcript.live().typed == len(b"exec cat\n")


async def test_a_poll_that_comes_again_gets_the_output_that_the_lost_answer_had(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start([b"sh", b"-c", b"echo last; read x"], tty=True)
    desk.held(process_id).hurry()
    first = await desk.write(process_id, write_id="w")
    assert await desk.write(process_id, write_id="w", first_asked=kernel.boottime()) == first


async def test_the_answer_is_there_also_when_its_process_has_been_collected(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    first = await desk.write(process_id, b"\x04", ms=30_000, write_id="w")
    assert first.exit_code == 0
    desk.manager.settle()
    with pytest.raises(UnknownProcess):
        await desk.write(process_id, write_id="other")
    assert await desk.write(process_id, b"\x04", write_id="w", first_asked=kernel.boottime()) == first


async def test_a_repetition_that_nobody_has_seen_is_typed_by_who_has_held_the_process_all_the_time(
    house: Any,
) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    asked = kernel.boottime()
    response = await desk.write(process_id, b"a\n", write_id="w", first_asked=asked)
    assert (response.output, response.typed) == ("got a\r\n", 2)


async def test_a_repetition_that_a_former_worker_may_have_typed_is_interrupted_and_types_nothing(
    house: Any,
) -> None:
    former, desk = house.desk(), house.desk(2)
    process_id = await shell(former)
    asked = kernel.boottime()
    await former.write(process_id, b"a\n", write_id="w")
    copies = former.copies()
    await former.manager.export_processes()
    assert desk.manager.import_processes(copies) == []
    with pytest.raises(Interrupted, match="2 bytes were typed in all"):
        await desk.write(process_id, b"a\n", write_id="w", first_asked=asked)
    assert desk.held(process_id).transcript.live().typed == 2
    # A poll can do no harm, and a call that is new is none of a former worker's.
    await desk.write(process_id, b"b\n", write_id="x")
    desk.held(process_id).hurry()
    await desk.write(process_id, write_id="y", first_asked=asked)


async def test_what_an_earlier_worker_typed_of_the_call_counts_in_the_answer_of_a_repetition(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    await desk.write(process_id, b"b\n", write_id="w")  # the broker asked for the rest of "ab\n"
    again = await desk.write(process_id, b"ab\n", write_id="w", first_asked=kernel.boottime())
    assert again.typed == 3


async def test_a_repetition_of_a_call_that_may_have_been_forgotten_is_interrupted(
    house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "ANSWERS_MAX", 1)
    desk = house.desk()
    process_id = await shell(desk)
    asked = kernel.boottime()
    await desk.write(process_id, b"a\n", write_id="w")
    await desk.write(process_id, b"b\n", write_id="x")
    with pytest.raises(Interrupted, match="many calls"):
        await desk.write(process_id, b"a\n", write_id="w", first_asked=asked)
    assert desk.held(process_id).transcript.live().typed == 4


async def test_input_that_cannot_be_typed_is_refused_each_time(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start([b"/bin/sleep", b"1000"])
    for _ in range(2):
        with pytest.raises(StdinClosed):
            await desk.write(process_id, b"a\n", write_id="w")


async def test_an_answer_that_no_broker_heard_lets_nothing_go(house: Any) -> None:
    desk = house.desk()
    process_id = await shell(desk)
    assert (await desk.write(process_id, b"\x04", ms=30_000, write_id="w")).exit_code == 0
    desk.manager.settle(lambda: False)
    desk.manager.settle()
    assert desk.manager.process_ids == [process_id]
    await desk.write(process_id, b"\x04", write_id="w")
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


async def test_what_is_remembered_is_bounded_in_calls_and_in_bytes() -> None:
    known = Writes()
    for number in range(writes.ANSWERS_MAX + 1):
        await known.once(str(number), 1, give(answer()))
    assert known.get("0") is None
    assert known.get("1") is not None
    assert known.forgotten_until <= kernel.boottime()
    big = answer("x" * writes.BYTES_MAX)
    await known.once("big", 1, give(big))
    assert known.get(str(writes.ANSWERS_MAX)) is None
    assert (write := known.get("big")) is not None
    assert await write.answer is big


async def test_a_call_under_way_is_never_forgotten() -> None:
    known = Writes()
    go = asyncio.get_running_loop().create_future()
    under_way = asyncio.create_task(known.once("slow", 1, go))
    await asyncio.sleep(0)
    for number in range(writes.ANSWERS_MAX + 1):
        await known.once(str(number), 1, give(answer()))
    assert (write := known.get("slow")) is not None
    go.set_result(answer("at last"))
    assert (await write.answer).output == "at last"
    await under_way
