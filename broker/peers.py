"""Who is connected: workers and clients, each known by its channel, its token and its ZeroMQ route.

The channel comes first: the kernel tells who connected there, and the handshake yields a token.  The token then
vouches for whatever comes over ZeroMQ, whose routes anybody could choose.  When the channel closes, the token is
void and what the peer was waiting for is dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import zmq

from ..common import kernel, wire
from ..common.channel import Channel
from ..common.errors import OutliveError, Unavailable
from ..common.messages import Body, Reply

Role = Literal["client", "worker"]
# Requests of one peer that may be under way at once.
REQUESTS_MAX = 2048


class WorkerGone(OutliveError):
    """The worker died, or its connection broke, during a call: ask whoever holds the process now."""


class Peer:
    """One connected process."""

    def __init__(self, channel: Channel, pid: int, pidfd: int | None) -> None:
        self.channel = channel
        self.pid = pid
        self.pidfd = pidfd
        self.role: Role | None = None
        self.token = ""
        self.route: bytes | None = None
        self.thread_id = ""
        self.epoch = 0
        self.open = True
        # Of a client: its requests under way, and those of them that only wait or read, by their numbers,
        # dropped when it has gone.
        # The others are carried to their end: half a handoff would leave a process without a pumper.
        self.tasks: set[asyncio.Task[None]] = set()
        self.waits: dict[int, asyncio.Task[None]] = {}
        # Of a worker: what we wait for.
        self.calls: dict[int, asyncio.Future[Reply]] = {}
        # Of a worker: ids of the calls it was told to start something for, unless it has answered.
        self.starts: set[str] = set()
        # Of a worker that a former broker knew: whether it reported with a start under way, of whichever call.
        self.starting = False
        self._numbers = itertools.count(1)

    def admit(self, role: Role, thread_id: str = "", epoch: int = 0) -> str:
        """Give the peer its role; return its token."""
        self.role, self.thread_id, self.epoch = role, thread_id, epoch
        self.token = secrets.token_hex(16)
        return self.token

    async def call(
        self,
        body: Body,
        transmit: Callable[[Peer, bytes], None],
        deadline: float | None = None,
        *,
        patient: bool = False,
    ) -> Any:
        """Ask a worker and return its result as it came; raises its error, or `WorkerGone`.

        `deadline`: on `CLOCK_BOOTTIME`; the worker refuses a request that reaches it later, and we give up with
        `Unavailable`, unless `patient`.  A frame that cannot be sent is the first sign of a death: `WorkerGone`
        comes only with the hang-up, so that a caller who asks again meets the next worker, and not this one for
        ever without a pause.
        """
        if not self.open:
            raise WorkerGone(f"the worker of thread {self.thread_id} cannot be reached")
        number = next(self._numbers)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.calls[number] = answer
        try:
            frame = wire.encode(wire.request(body, id=number, deadline=deadline))
            with suppress(zmq.ZMQError):
                transmit(self, frame)
            left = None if deadline is None or patient else max(0.0, deadline - kernel.boottime())
            async with asyncio.timeout(left):
                reply = await answer
        except TimeoutError:
            raise Unavailable(
                f"the worker of thread {self.thread_id} (pid {self.pid}) did not answer in time; "
                "its processes are safe"
            ) from None
        finally:
            self.calls.pop(number, None)
        return wire.result_of(reply, Any)

    def answered(self, reply: Reply) -> None:
        """Hand a worker's reply to whoever waits for it."""
        answer = self.calls.get(reply.id)
        if answer and not answer.done():
            answer.set_result(reply)

    def hang_up(self) -> None:
        """Void the token, fail what waits for this worker, drop what this client waits for."""
        self.open = False
        for answer in self.calls.values():
            if not answer.done():
                answer.set_exception(WorkerGone(f"the worker of thread {self.thread_id} died during the call"))
        for task in self.waits.values():
            task.cancel()

    def close(self) -> None:
        """Close what we hold of the peer."""
        self.hang_up()
        self.channel.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
