"""The `ThreadManager`: what moves a thread's processes between its worker and the broker, or ends them.

Always true
    One handoff of a thread at a time, carried to its end also when its caller has gone: half of one would leave a
    process without a pumper.
    Descriptors that are sent are looked up at the moment of sending, never remembered across an `await`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from ..common import kernel
from ..common.channel import DESCRIPTORS_MAX, parcel_rows
from ..common.errors import BadRequest, OutliveError, Unavailable
from ..common.messages import Body, DetachedProcessSummary, Export, Import, ReattachSummary, TerminateAll
from ..common.outcome import By
from .custody import Event, Holder, State
from .entries import Entry, Thread
from .lifecycle import Phase
from .peers import Peer, WorkerGone
from .workers import Workers

# Seconds for a handoff message to be answered; a worker that is stopped is not robbed, only left alone.
HANDOFF_DEADLINE = 30.0
# Seconds that a worker, told to end everything, has before its processes are ended without it.
TERMINATE_DEADLINE = 10.0
_SEND_PAUSE = 0.002

T = TypeVar("T")


class ThreadManager(Workers):
    """All threads of this broker, on top of their workers and processes."""

    def take_back(self, thread: Thread) -> None:
        """Give what the broker holds of a thread to its worker, which is up."""
        thread.taking_back = self.spawn(self._take_back(thread))

    async def _take_back(self, thread: Thread) -> None:
        with suppress(OutliveError):
            await self._reattach(thread)

    async def detach_thread_processes(self, thread_id: str) -> DetachedProcessSummary:
        """Take a thread's processes from its worker; an unknown or sleeping thread is an empty summary.

        Raises `Unavailable` when the worker does not answer: it may still be pumping, so nothing is taken.
        """
        thread = self.threads.get(thread_id)
        if thread is None or thread.worker is None:
            return DetachedProcessSummary.of([])
        return await self._within(thread, self._detach(thread), "gives its processes back")

    async def _detach(self, thread: Thread) -> DetachedProcessSummary:
        async with thread.handoff:
            peer = thread.worker
            if peer is None:
                return DetachedProcessSummary.of([])
            mine = [entry for entry in thread.entries.values() if entry.custody.holder is Holder.WORKER]
            try:
                exported = await self._order(peer, Export())
            except WorkerGone:
                exported = [entry.key[1] for entry in mine]  # its death hands them over
            for process_id in exported:
                entry = thread.entries.get(process_id)
                if entry and entry.custody.holder is Holder.WORKER and entry.epoch == peer.epoch and peer.open:
                    self.move(entry, Event.DETACHED)
                    self._world.publish("detached", thread.thread_id, process_id, call_id=entry.call_id)
        return DetachedProcessSummary.of([str(process_id) for process_id in exported])

    async def put_to_bed(self, thread: Thread) -> None:
        """Take a thread's processes from its worker, and see that gone; it may be wanted again by then."""
        await self._settled(thread)
        await self.detach_thread_processes(thread.thread_id)
        while thread.life.phase is Phase.STARTING:  # it was killed meanwhile
            await self._settled(thread)
            await self.detach_thread_processes(thread.thread_id)
        self.dismiss(thread)
        await self.gone(thread)

    async def _settled(self, thread: Thread) -> None:
        while thread.life.phase is Phase.STARTING:
            await thread.changed()

    async def reattach_thread_processes(self, thread: Thread) -> ReattachSummary:
        """Give what is detached to the thread's worker; raises `BadRequest` when there is none."""
        return await self._within(thread, self._reattach(thread), "takes its processes back")

    async def _reattach(self, thread: Thread) -> ReattachSummary:
        async with thread.handoff:
            peer = thread.worker
            if peer is None or thread.life.phase is not Phase.AWAKE:
                raise BadRequest(
                    f"thread {thread.thread_id} has no worker; `outlive resume {thread.thread_id}` starts one, "
                    "which takes its processes back"
                )
            entries = [
                entry
                for entry in thread.entries.values()
                if entry.custody.holder is Holder.BROKER and entry.ending is None
            ]
            if not entries:
                return ReattachSummary.of(0, [])
            for entry in entries:
                entry.epoch = peer.epoch
                self.move(entry, Event.REATTACHED)
            ids = [entry.key[1] for entry in entries]
            try:
                tickets = await self._send_parcels(peer, entries)
                streams = {entry.key[1]: entry.stream for entry in entries if entry.stream}
                rules = {entry.key[1]: added for entry in entries if (added := self.watches.to_look_for(entry.key))}
                summary = await self._order(peer, Import(tickets=tickets, streams=streams, rules=rules))
                skipped = set(summary["skipped_process_ids"])
            except WorkerGone:
                return ReattachSummary.of(0, ids)  # back with us since its death
            except OutliveError as error:
                self._world.log(f"thread {thread.thread_id}: its worker took nothing back: {error}")
                skipped = set(ids)
            for entry in entries:
                process_id = entry.key[1]
                if entry.custody.holder is not Holder.WORKER or entry.epoch != peer.epoch:
                    continue
                if process_id in skipped:
                    self.move(entry, Event.SKIPPED)
                elif entry.state is not State.GONE:
                    self._world.publish("reattached", thread.thread_id, process_id, call_id=entry.call_id)
            return ReattachSummary.of(len(entries) - len(skipped), sorted(skipped))

    async def _send_parcels(self, peer: Peer, entries: list[Entry]) -> list[str]:
        tickets = []
        waiting = list(entries)
        while waiting:
            parcel: dict[tuple[str, str], dict[str, int]] = {}
            room = DESCRIPTORS_MAX
            taken = 0
            for entry in waiting:
                held = entry.handles.held()
                if len(held) > room:
                    break
                taken += 1
                if held and entry.custody.holder is Holder.WORKER:
                    parcel[entry.key] = held
                    room -= len(held)
            ticket = f"{peer.epoch}-{os.urandom(6).hex()}"
            rows, fds = parcel_rows(parcel)
            try:
                peer.channel.send("parcel", fds, ticket=ticket, processes=rows)
            except BlockingIOError:
                await asyncio.sleep(_SEND_PAUSE)
                if not peer.open:
                    raise WorkerGone("the worker died during the handoff") from None
                continue
            except OSError as error:
                raise WorkerGone(f"the worker's channel broke: {error.strerror}") from None
            tickets.append(ticket)
            waiting = waiting[taken:]
        return tickets

    async def _order(self, peer: Peer, order: Body) -> Any:
        """Give a worker an order of a handoff and wait for the answer, however long that takes.

        A worker that got it may act on it at any time, so nobody may walk away before it answers or dies; one
        that gets it too late refuses.
        """
        return await peer.call(order, self._world.transmit, kernel.boottime() + HANDOFF_DEADLINE, patient=True)

    async def _within(self, thread: Thread, handoff: Coroutine[Any, Any, T], what: str) -> T:
        """Wait for a handoff within its deadline; a slow one goes on without its caller."""
        task = self.spawn(handoff)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may have gone
        done, _ = await asyncio.wait({task}, timeout=HANDOFF_DEADLINE)
        if not done:
            raise Unavailable(
                f"thread {thread.thread_id}: its worker (pid {thread.worker_pid}) is slow or stopped; "
                f"it {what} when it answers"
            )
        result: T = task.result()
        return result

    # Ending.

    async def clean_detached_thread_processes(self, thread_id: str, by: By = "cleaned") -> DetachedProcessSummary:
        """End a thread's detached processes and drop them; attached ones are left alone."""
        thread = self.threads.get(thread_id)
        if thread is None:
            return DetachedProcessSummary.of([])
        async with thread.handoff:
            entries = [e for e in thread.entries.values() if e.custody.holder is Holder.BROKER]
            await self._end(entries, by)
        return DetachedProcessSummary.of([entry.key[1] for entry in entries])

    async def clean_all_detached_processes(self, by: By = "cleaned") -> DetachedProcessSummary:
        """Do that for every thread."""
        ids: list[str] = []
        for thread_id in list(self.threads):
            ids += (await self.clean_detached_thread_processes(thread_id, by)).process_ids
        return DetachedProcessSummary.of(ids)

    async def _end(self, entries: list[Entry], by: By) -> None:
        """End processes that we hold, and see them gone."""
        for entry in entries:
            if entry.state is State.DETACHED and entry.ending is None and entry.transcript:
                entry.transcript.record_by(by)
                self.move(entry, Event.CLEANED)
        for entry in entries:
            while entry.state is State.DETACHED:
                await entry.changed()
            if entry.state is State.ENDED:
                self.move(entry, Event.CLEANED)

    async def shutdown_thread(self, thread: Thread, *, everything: bool) -> None:
        """End a thread's worker and attached processes; `everything`: detached ones too."""
        while thread.life.phase is Phase.STARTING:
            await thread.changed()
        if peer := thread.worker:
            deadline = kernel.boottime() + TERMINATE_DEADLINE
            try:
                await peer.call(TerminateAll(), self._world.transmit, deadline)
                self.dismiss(thread)
            except Unavailable:
                # It is stopped or stuck, and the user wants it gone.
                self._world.log(f"thread {thread.thread_id}: its worker does not end its processes; ending it")
                mine = [e for e in thread.entries.values() if e.custody.holder is Holder.WORKER]
                self.dismiss(thread)
                if thread.worker_pid:
                    self._world.kill_worker(thread.worker_pid)
                await self.gone(thread)
                await self._end(mine, "shutdown")
            except OutliveError:
                self.dismiss(thread)
        else:
            self.dismiss(thread)
        await self.gone(thread)
        if everything:
            await self.clean_detached_thread_processes(thread.thread_id, "shutdown")
