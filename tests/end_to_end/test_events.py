"""Events: what a client that listens hears, in which order, and how output is cut."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq.asyncio

import outlive
from outlive.common.messages import Reply

from .conftest import HELD, PYTHON, Home


async def test_long_command_lines_are_cut_in_events_and_all_of_them_are_told(host: outlive.Host) -> None:
    thread = await host.thread("long")
    for _ in range(4):
        await thread.exec_command(["true", "x", *["é" * 60_000] * 14])  # together more than an answer can hold
    begins = [event for event in await host.recent_events() if event["event"] == "begin"]
    assert [event["command"][:2] for event in begins] == [["true", "x"]] * 4
    assert all(event["command"][-1].endswith("é…") for event in begins)


class Listener:
    """Everything that one subscriber has heard."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self._more = asyncio.Event()

    def note(self, event: dict[str, Any]) -> None:
        self.heard.append(event)
        self._more.set()

    async def until(self, **wanted: Any) -> dict[str, Any]:
        """Return the first event with these fields, heard or still to come."""
        at = 0
        while True:
            for event in self.heard[at:]:
                if all(event.get(name) == value for name, value in wanted.items()):
                    return event
            at = len(self.heard)
            self._more.clear()
            if len(self.heard) == at:
                await self._more.wait()

    def chunks(self, process_id: str) -> list[dict[str, Any]]:
        return [event for event in self.heard if event["event"] == "delta" and event["process_id"] == process_id]


@asynccontextmanager
async def listening(host: outlive.Host) -> AsyncIterator[Listener]:
    """A subscriber to everything, who is known to hear: a child has been heard to talk."""
    listener = Listener()

    async def listen() -> None:
        async for event in host.events(deltas=True):
            listener.note(event)

    task = asyncio.create_task(listen())
    clock = await host.thread("clock")
    ticks = ["sh", "-c", "while echo tick; do sleep 0.02; done"]
    ticking = await clock.exec_command(ticks, yield_time_ms=1)
    await listener.until(event="delta", thread="clock")
    await clock.kill(ticking.process_id, signal="KILL")
    await listener.until(event="end", thread="clock")
    try:
        yield listener
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_process_is_heard_to_begin_to_print_and_to_end_in_this_order(host: outlive.Host) -> None:
    thread = await host.thread("order")
    async with listening(host) as listener:
        answer = await thread.exec_command(["echo", "hello"], call_id="mine")
        end = await listener.until(event="end", thread="order")
        about = [event for event in listener.heard if event["thread"] == "order" and event["process_id"]]
        assert [event["event"] for event in about] == ["begin", "delta", "end"]
        begin, delta, _ = about
        assert {event["call_id"] for event in about} == {"mine"}
        assert {event["process_id"] for event in about} == {answer.process_id}
        assert begin["command"] == ["echo", "hello"]
        assert (delta["n"], delta["offset"], delta["chunk"]) == (0, 0, b"hello\n")
        assert (end["outcome"], end["output"]) == ({"kind": "exited", "code": 0}, b"hello\n")
        assert all(event["at"].endswith("Z") for event in about)
        numbers = [event["seq"] for event in listener.heard]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize("tty", [True, False])
async def test_deltas_never_split_a_character_and_add_up_to_the_output(host: outlive.Host, tty: bool) -> None:
    thread = await host.thread("cut")
    # Characters of two, three and four bytes, written in odd pieces, and a broken one at the end.
    script = """
import os
data = ("é€🙂" * 4000).encode() + b"\\xe2\\x82"
while data:
    data = data[os.write(1, data[:1001]):]
"""
    async with listening(host) as listener:
        answer = await thread.exec_command([*PYTHON, script], tty=tty)
        await listener.until(event="end", thread="cut")
        deltas = listener.chunks(answer.process_id)
        expected = ("é€🙂" * 4000).encode() + b"\xe2\x82"
        assert b"".join(delta["chunk"] for delta in deltas) == expected
        assert [delta["n"] for delta in deltas] == list(range(len(deltas)))
        at = 0
        for delta in deltas:
            assert delta["offset"] == at
            assert 0 < len(delta["chunk"]) <= 8192
            at += len(delta["chunk"])
            if at < len(expected) - 2:
                delta["chunk"].decode()


async def test_deltas_go_on_where_they_stopped_after_a_handoff_under_the_same_call(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("stream")
    # Two: a reader that opens one again before its writer has closed it reads an end of file.
    first, second = fifo("first"), fifo("second")
    line = f"echo one; read go <{first}; echo two; read go <{second}; echo three; exit 1"
    async with listening(host) as listener:
        child = await thread.exec_command(["sh", "-c", line], yield_time_ms=250, call_id="stream")
        await thread.detach()
        after = len(listener.heard)
        first.write_text("go\n")
        while b"two" not in await thread.output(child.process_id):
            await thread.read_output(child.process_id, 4, wait_ms=5000)
        # What a detached process prints is nobody's event.
        assert not [event for event in listener.heard[after:] if event["event"] == "delta"]
        await thread.resume()
        second.write_text("go\n")
        end = await listener.until(event="end", thread="stream")
        deltas = listener.chunks(child.process_id)
        assert b"".join(delta["chunk"] for delta in deltas) == b"one\ntwo\nthree\n"
        assert [delta["n"] for delta in deltas] == list(range(len(deltas)))
        assert {delta["call_id"] for delta in deltas} == {"stream"} == {end["call_id"]}
        kinds = [event["event"] for event in listener.heard if event["process_id"] == child.process_id]
        assert [kind for kind in kinds if kind != "delta"] == ["begin", "detached", "reattached", "end"]


async def test_deltas_go_on_after_a_kill_of_the_worker_without_a_byte_lost_or_doubled(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("stream")
    go = fifo("go")
    line = f"echo one; read go <{go}; echo two"
    async with listening(host) as listener:
        child = await thread.exec_command(["sh", "-c", line], yield_time_ms=250)
        await home.kill_worker(host, "stream")
        go.write_text("go\n")
        await listener.until(event="end", thread="stream")
        deltas = listener.chunks(child.process_id)
        assert b"".join(delta["chunk"] for delta in deltas) == b"one\ntwo\n"
        assert [delta["n"] for delta in deltas] == list(range(len(deltas)))


async def test_a_workers_ups_and_downs_are_events(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("life")
    first = await home.worker(host, "life")
    second = await home.kill_worker(host, "life")
    await thread.detach()
    await home.until(host, event="worker", thread="life", what="died", epoch=2)
    about = [event for event in await host.recent_events() if event["event"] == "worker"]
    assert [(event["what"], event["epoch"]) for event in about] == [("up", 1), ("died", 1), ("up", 2), ("died", 2)]
    assert [event["pid"] for event in about if event["what"] == "up"] == [first, second]
    assert about[1]["how"] == "SIGKILL"


async def test_a_listener_hears_the_broker_go_and_its_stream_ends(home: Home, host: outlive.Host) -> None:
    async with listening(host) as listener:
        await host.down()
        await listener.until(event="broker", what="down")


async def test_one_end_event_carries_head_and_tail_of_a_long_output(host: outlive.Host) -> None:
    thread = await host.thread("long")
    async with listening(host) as listener:
        script = "import os\ndata = b'h' + b'-' * 3_000_000 + b't'\nwhile data: data = data[os.write(1, data):]"
        answer = await thread.exec_command([*PYTHON, script], max_output_tokens=10)
        end = await listener.until(event="end", thread="long")
        assert (len(end["output"]), end["output"][:2], end["output"][-2:]) == (64 << 10, b"h-", b"-t")
        output = await thread.read_output(answer.process_id)
        assert output.gaps == [(512 << 10, 3_000_002 - (512 << 10))]


async def test_a_client_that_does_not_read_its_events_costs_nobody_anything(host: outlive.Host) -> None:
    thread = await host.thread("slow")
    events = host.events(deltas=True)
    first = asyncio.ensure_future(anext(events))
    # It listens from some moment on, and reads nothing after the first word.
    child = await thread.exec_command(["yes"], yield_time_ms=1)
    await first
    seen = 0
    while seen < 20 << 20:
        seen = (await thread.read_output(child.process_id, seen, wait_ms=5000)).written
    await thread.kill(child.process_id, signal="KILL")
    assert (await thread.wait(child.process_id)).signal == 9
    await events.aclose()
    assert (await thread.exec_command(["echo", "fine"])).output == "fine\n"


async def test_a_sleep_a_death_of_the_broker_and_a_wake_are_heard_as_a_story(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    go = fifo("go")
    listener = Listener()

    async def listen() -> None:
        async for event in host.events(recent=True):
            listener.note(event)

    task = asyncio.create_task(listen())
    thread = await host.thread("story")
    started = await thread.exec_command(["sh", "-c", HELD, str(go), "exit 3"], wake_on=["exit"], yield_time_ms=250)
    await thread.detach()
    await listener.until(event="worker", what="died")
    (broker,) = home.pids("broker")
    os.kill(broker, signal.SIGKILL)
    while (up := await listener.until(event="broker", what="up"))["pid"] == broker:
        listener.heard.remove(up)
    go.write_text("go\n")
    wake = await listener.until(event="wake", what="pending")
    assert (wake["process_id"], wake["rule"]) == (started.process_id, "exit")
    await thread.resume()
    ended = await listener.until(event="end")
    assert ended["outcome"] == {"kind": "exited", "code": 3}
    await listener.until(event="reattached")
    task.cancel()
    story = [f"{event['event']} {event.get('what') or ''}".strip() for event in listener.heard]
    assert story[:-2] == [
        *("worker up", "begin", "detached", "worker died"),
        *("broker up", "wake pending", "worker up"),
    ]
    assert sorted(story[-2:]) == ["end", "reattached"]


async def test_what_a_subscriber_says_otherwise_takes_nothing_from_the_others(
    home: Home, host: outlive.Host
) -> None:
    async with listening(host) as listener:
        with zmq.asyncio.Context() as context, context.socket(zmq.XSUB) as socket:
            socket.linger = 0
            socket.connect(f"ipc://{home.paths.events}")
            for said in (b"-", b"-event", b"-delta", b"\1ready-heard"):
                await socket.send(said)
            await socket.recv()  # all of it was taken in
            thread = await host.thread("order")
            await thread.exec_command(["echo", "hello"])
            await listener.until(event="delta", thread="order")
            await listener.until(event="end", thread="order")


async def test_what_happens_before_the_recent_events_are_asked_for_is_told_once(home: Home) -> None:
    class Broker:
        """It has had one event when it is asked."""

        lost = asyncio.Event()

        async def ask(self, body: object, deadline: None) -> Reply:
            return Reply(v=1, id=1, result=[{"event": "begin", "seq": 1}])

    async def tell(number: int) -> None:
        await socket.send_multipart([b"event", msgpack.packb({"event": "begin", "seq": number})])

    home.paths.run.mkdir(parents=True, exist_ok=True)
    host = outlive.Host(home.paths)
    with host._context, zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.bind(f"ipc://{home.paths.events}")
        events = host._events_of(Broker(), deltas=False, recent=True)  # type: ignore[arg-type]
        first = asyncio.create_task(anext(events))
        assert await socket.recv() == b"\1event"
        ready = (await socket.recv())[1:]
        await tell(1)
        await socket.send_multipart([ready, b""])
        await tell(2)
        assert [(await first)["seq"], (await anext(events))["seq"]] == [1, 2]
        await events.aclose()
    home.paths.events.unlink()
