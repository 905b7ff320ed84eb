"""How a worker comes to its end."""

from __future__ import annotations

import asyncio
import gc
import socket
from pathlib import Path

from outlive.common import channel
from outlive.common.config import Config
from outlive.common.paths import Paths
from outlive.common.pump import CopyingPump
from outlive.worker.session import Session


async def test_a_worker_that_is_to_end_while_a_broker_does_not_answer_it_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path / "h")})
    paths.prepare()
    complaints: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    with channel.listen(paths.channel) as listener:
        session = Session(paths, "t", 1, CopyingPump.mode, Config(), lock=-1)
        running = asyncio.create_task(session.run())
        connection, _ = await loop.sock_accept(listener)
        hello = channel.Channel(connection)
        assert await asyncio.to_thread(hello.receive_within, 10.0)  # and now it waits for a welcome
        session._done.set()
        await running
        assert connection.recv(1, socket.MSG_DONTWAIT) == b""
        hello.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del running
    gc.collect()  # a task that failed while nobody looked complains when it goes
    assert complaints == []
