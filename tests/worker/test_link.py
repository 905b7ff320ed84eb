"""What a worker says in one turn of its loop: in which order the broker gets it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import zmq

from outlive.common import wire
from outlive.common.errors import UnknownProcess
from outlive.common.messages import Collected, Reply
from outlive.common.paths import Paths
from outlive.worker.link import Link


class Port:
    """The socket to the broker, as a list of what was sent at once."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []

    def send(self, frames: list[bytes]) -> None:
        messages = [wire.decode(frame) for frame in frames]
        self.sent.append([f"reply {one.id}" if isinstance(one, Reply) else one.op for one in messages])

    def close(self) -> None:
        """Nothing is open."""


def refuse(*_: Any) -> None:
    """Nobody calls us here."""


@pytest.fixture
async def link(tmp_path: Path) -> Link:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    return Link(
        Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)}),
        "t",
        1,
        context,
        on_request=refuse,
        on_connected=refuse,
        on_lost=refuse,
        deposits=dict,
        starting=list,
    )


async def test_a_result_goes_first_and_at_once_and_an_error_after_what_it_may_be_about(link: Link) -> None:
    port = Port()
    link._port = port  # type: ignore[assignment]
    link.send(Collected(process_id="1000"))
    link.reply(wire.success(1, {}), link.connection)
    assert port.sent == [["reply 1", "collected"]]
    link.send(Collected(process_id="1001"))
    link.reply(wire.failure(2, UnknownProcess("process 1001 is not known")), link.connection)
    await asyncio.sleep(0)
    assert port.sent[1:] == [["collected", "reply 2"]]
