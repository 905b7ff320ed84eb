"""One thread session: requests from the broker in, replies and notices out.

It owns the parts (pumps, nursery, manager, link) and their order of birth and death.  Nothing of a process
depends on it: when the worker is killed, its children run on.

Always true
    A request is answered before the processes it has collected are let go: the broker passes answers on in order.
    An answer that no broker could hear lets nothing go: its caller asks again.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import zmq

from ..common import kernel, messages, wire
from ..common.channel import Channel
from ..common.config import Config
from ..common.errors import DeadlineExceeded, OutliveError
from ..common.messages import Body, Orphaned, ReattachSummary, Request, Welcome
from ..common.paths import Paths
from ..common.pump import PUMPS, Pumps
from ..common.transcript import Facts
from .link import Link
from .nursery import Nursery
from .processes import ProcessManager
from .programs import Programs

# Seconds for the last answer to be on its way.
_LAST_WORDS = 0.05


class Session:
    """The worker of one thread in one epoch."""

    def __init__(self, paths: Paths, thread_id: str, epoch: int, mode: str, config: Config, *, lock: int) -> None:
        """`lock`: an open file that the broker has locked, for as long as anything of this epoch lives."""
        loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._pumps = Pumps(loop)
        self._nursery = Nursery(paths.log, self._orphaned, lock=lock)
        self._done = asyncio.Event()
        self._programs = Programs(paths)
        self._failure = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._link = Link(
            paths,
            thread_id,
            epoch,
            self._context,
            on_request=self._requested,
            on_connected=self._connected,
            on_lost=lambda: self._nursery.use_broker(None),
            deposits=lambda: self.manager.deposits(),
            starting=lambda: self.manager.starting,
        )
        self.manager = ProcessManager(
            thread_id, epoch, self._nursery, self._pumps, PUMPS[mode], self._link.send, config
        )
        self._operations: dict[type[Body], Callable[[Any], Awaitable[Any]]] = {
            messages.ExecCommand: self.manager.exec_command,
            messages.WriteStdin: self.manager.write_stdin,
            messages.ReadOutput: self.manager.read_output,
            messages.LookFor: self._look_for,
            messages.Import: self._import,
            messages.Export: self._export,
            messages.TerminateAll: self._terminate_all,
            messages.Forget: self._forget,
            messages.Deltas: self._want_deltas,
            messages.Load: self._programs.load,
            messages.Run: self._run_program,
            messages.CancelRun: self._cancel_run,
            messages.Bye: self._bye,
        }

    async def run(self) -> None:
        """Serve until told to go to bed; raises `PeerError` when the broker refuses this worker.

        Raises `OutliveError` when the program failed, since nothing is to be built on what that has left behind.
        """
        link = asyncio.create_task(self._link.run())
        done = asyncio.create_task(self._done.wait())
        finished, _ = await asyncio.wait({link, done}, return_when=asyncio.FIRST_COMPLETED)
        # What waits for output, or connects, would go on with closed descriptors.
        for task in (link, *self._tasks):
            task.cancel()
        await asyncio.wait({link, *self._tasks})
        await self._programs.close()
        self._nursery.close()
        self.manager.close()
        self._link.close()
        self._pumps.close()
        self._context.destroy(0)
        if link in finished:
            link.result()
        if self._failure:
            raise OutliveError(f"its program failed: {self._failure}")

    def _connected(self, channel: Channel, welcome: Welcome) -> None:
        self.manager.ids.use(welcome.ids())
        self._nursery.use_broker(channel)
        self.manager.want_deltas(welcome.deltas)
        self.manager.tell_of_ends()

    def _orphaned(self, facts: Facts) -> None:
        self._link.send(Orphaned(process_id=facts.process_id))

    def _requested(self, request: Request) -> None:
        task = asyncio.create_task(self._serve(request, self._link.connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: Request, connection: int) -> None:
        try:
            body = wire.body_of(request, messages.WORKER_OPS)
            if request.deadline is not None and kernel.boottime() > request.deadline:
                raise DeadlineExceeded(f"{request.op}: reached the worker after its deadline")
            result = await self._operations[type(body)](body)
            reply = wire.success(request.id, result)
        except OutliveError as error:
            reply = wire.failure(request.id, error)
        except Exception as error:
            traceback.print_exc()
            reply = wire.failure(request.id, OutliveError(f"{request.op}: {error!r}; see the log"))
        if request.id:
            self._link.reply(reply, connection)
            self.manager.settle(lambda: self._link.hears(connection))

    async def _import(self, body: messages.Import) -> Any:
        parcel = self._link.claim(body.tickets)
        refused = self.manager.import_processes(parcel, body.streams, body.rules)
        return ReattachSummary.of(len(parcel) - len(refused), refused)

    async def _look_for(self, body: messages.LookFor) -> None:
        self.manager.held(body.process_id).look_for(body.rules)

    async def _export(self, body: messages.Export) -> list[str]:
        connection = self._link.connection
        return await self.manager.export_processes(lambda: self._link.hears(connection))

    async def _terminate_all(self, body: messages.TerminateAll) -> list[str]:
        return await self.manager.terminate_all_processes()

    async def _forget(self, body: messages.Forget) -> None:
        self.manager.forget(body.process_ids)

    async def _want_deltas(self, body: messages.Deltas) -> None:
        self.manager.want_deltas(body.wanted)

    async def _run_program(self, body: messages.Run) -> str:
        failure = await self._programs.run(body)
        if failure and body.program.function:
            self._failure = failure
            asyncio.get_running_loop().call_later(_LAST_WORDS, self._done.set)
        return failure

    async def _cancel_run(self, body: messages.CancelRun) -> None:
        await self._programs.cancel()

    async def _bye(self, body: messages.Bye) -> None:
        self._done.set()
