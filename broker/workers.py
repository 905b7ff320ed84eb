"""Every thread's worker: does what its life decides, and lets others wait for it.

Always true
    A worker counts as dead only by the kernel's word, and only then do its processes come to the broker without
    its consent.  That its channel is closed proves nothing: it lives, and will connect again, or its pidfd follows.

Not here
    Forks and pidfds: `loop`.  Giving the next worker its processes: `threads`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from ..common.config import Config
from ..common.descriptors import Handles
from ..common.errors import Unavailable
from ..common.messages import Bye, Deltas, LookFor, Welcome
from ..common.paths import Paths
from ..common.pump import Pump, Pumps
from . import lifecycle
from .custody import Event, Holder, State
from .entries import Entry, Thread
from .lifecycle import Effect, Life, Phase
from .peers import Peer
from .processes import Processes
from .world import World

# Seconds after its start that a broker waits for the workers that survived the former one.  They try again at least
# every five (`Link`).
SURVIVORS_DEADLINE = 10.0
# Seconds that a call waits for the last start of a former broker's worker: it takes milliseconds, unless its
# directory is on a dead network mount.
UNFINISHED_DEADLINE = 10.0
# Seconds between two looks at whether a spawner is at its end, which the kernel tells nobody but its parent, and at
# whether there is a keeper again.
_LOOK = 0.02


class Workers(Processes):
    """All workers of this broker, on top of their processes."""

    def __init__(self, world: World, paths: Paths, config: Config, pumps: Pumps, pump: type[Pump]) -> None:
        super().__init__(world, paths, config, pumps, pump)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._survivors_until = asyncio.get_running_loop().time() + SURVIVORS_DEADLINE

    # Who waits.

    async def worker(self, thread: Thread) -> Peer:
        """Return the thread's worker, started if need be; raises `Unavailable` when none comes up."""
        self._world.notice_deaths()  # whoever killed it, and then asks for the next, must not be shown the last
        self._live(thread, lifecycle.Event.WANTED)
        while True:
            if thread.life.phase is Phase.AWAKE and thread.worker:
                return thread.worker
            if thread.life.phase is Phase.FAILED:
                raise Unavailable(
                    f"thread {thread.thread_id}: its worker does not come up ({thread.failure}); its processes "
                    f"are safe; see {self._paths.log}, then try again"
                )
            if thread.life.phase is Phase.ASLEEP:
                raise Unavailable(f"thread {thread.thread_id}: its worker was sent to bed during the call")
            await thread.changed()

    async def handed_over(self, thread: Thread) -> None:
        """Wait for a handoff that is under way."""
        if thread.taking_back and not thread.taking_back.done():
            await asyncio.wait({thread.taking_back})
        async with thread.handoff:
            pass

    async def started(self, thread: Thread, call_id: str) -> None:
        """Wait while a spawner whose worker is dead may still be about to start something for this call.

        Raises `Unavailable` when the spawner of a former broker's worker does not come to its end.
        """
        try:
            async with asyncio.timeout(UNFINISHED_DEADLINE if thread.unfinished else None):
                while self.may_start(thread, call_id):
                    await thread.changed()
        except TimeoutError:
            raise Unavailable(
                f"thread {thread.thread_id}: a start that its former worker began is not over, and may be "
                "this one; try again"
            ) from None

    def may_start(self, thread: Thread, call_id: str) -> bool:
        """Tell whether a spawner whose worker is dead may still be about to start something for this call."""
        return bool(thread.unfinished) or any(peer.starting or call_id in peer.starts for peer in thread.former)

    async def death_proved(self, thread: Thread, peer: Peer) -> None:
        """Wait until a worker that hung up is dead, or has come back with another channel."""
        while thread.worker_pid == peer.pid and thread.worker in (None, peer):
            await thread.changed()

    async def gone(self, thread: Thread) -> None:
        """Wait until the worker process that the thread has now is gone; a call may want the next one at once."""
        epoch = thread.epoch
        while thread.worker_pid is not None and thread.epoch == epoch:
            await thread.changed()

    async def survivors_reported(self, thread_id: str | None) -> None:
        """Wait until a thread's worker (`None`: every thread's) that survived a former broker has reported.

        Before, its living processes would be called expired.  A stopped one is not waited for any longer than
        `SURVIVORS_DEADLINE`.
        """
        asked = self.threads if thread_id is None else [thread_id]
        for thread in [self.threads[name] for name in asked if name in self.threads]:
            if thread.expected:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._survivors_until):
                        while thread.expected:
                            await thread.changed()

    # What happens.

    def expect(self, thread_id: str, epoch: int, pid: int) -> None:
        """Take note of a worker that survived a former broker, and will report."""
        thread = self.create(thread_id)
        if epoch < thread.epoch:
            return
        thread.epoch, thread.worker_pid = epoch, pid
        thread.life = Life(Phase.STARTING)
        thread.expected = True

    def registered(self, peer: Peer, process_ids: list[str], starting: list[str]) -> Welcome:
        """A worker has said that it is up, what it holds, and what it is starting; return what it is told."""
        thread = self.threads[peer.thread_id]
        if thread.worker and thread.worker is not peer:
            thread.worker.hang_up()
        thread.worker, peer.starting = peer, bool(starting)
        if thread.expected:
            thread.expected = False
            self.lose_missing()
        thread.hung_up = 0
        for entry in list(thread.entries.values()):
            self.watches.look(entry.key)  # what was found while no broker was there to be told
            if added := self.watches.to_look_for(entry.key):
                self.spawn(self._tell(peer, LookFor(process_id=entry.key[1], rules=added)))
            if entry.key[1] in process_ids:
                if entry.custody.holder is Holder.BROKER and entry.key not in self.store:
                    entry.epoch = peer.epoch
                    self.move(entry, Event.CLAIMED)
            elif entry.epoch == peer.epoch and entry.custody.holder is not Holder.BROKER:
                self._unheld(entry, under_way=entry.key[1] in starting)
        self._live(thread, lifecycle.Event.REGISTERED)
        return Welcome.of(thread.journal.ids, deltas=self._world.deltas_wanted)

    def _unheld(self, entry: Entry, *, under_way: bool) -> None:
        """A worker registered without a process that is its by our books, or by its header."""
        assert entry.transcript is not None
        if entry.transcript.live().lease is None:
            # Its channel broke within a handoff: given and not taken, or given back and not told.
            if entry.state is not State.STARTING:
                self.move(entry, Event.DETACHED)
                self.settle(entry)
        elif not under_way:
            self.orphaned(*entry.key)

    def worker_died(self, thread_id: str, epoch: int, how: str) -> None:
        """The kernel says that a thread's worker is dead."""
        thread = self.threads[thread_id]
        if thread.epoch != epoch:
            self._lost(thread, epoch)  # of a former broker, beside a later one
            return
        peer, thread.worker, thread.worker_pid = thread.worker, None, None
        if peer:
            peer.hang_up()
        thread.expected = False
        if peer and peer.channel.fileno() >= 0:
            thread.former.add(peer)
        thread.failure = how
        self._world.publish("worker", thread_id, what="died", epoch=epoch, how=how)
        self._lost(thread, epoch)
        if thread.hung_up == epoch or peer is None:  # its channel closed first, and the spawner had it too
            self._resolve_starts(thread, epoch)
        self._live(thread, lifecycle.Event.DIED)

    def _lost(self, thread: Thread, epoch: int) -> None:
        for entry in list(thread.entries.values()):
            if entry.epoch == epoch and entry.custody.holder is not Holder.BROKER:
                self.move(entry, Event.WORKER_LOST)
                self.settle(entry)  # it may have died before it could say that this one was collected

    def unfinished(self, thread_id: str, epoch: int) -> None:
        """A former broker's worker is dead, and its spawner lives."""
        thread = self.create(thread_id)
        thread.epoch = max(thread.epoch, epoch)
        self._resolve_starts(thread, epoch)

    def channel_closed(self, peer: Peer) -> None:
        """No more deposits come through it.  A worker that lives will come back with another channel."""
        thread = self.threads.get(peer.thread_id)
        if thread is None:
            return
        if thread.worker is peer:
            thread.worker = None
        thread.former.discard(peer)
        thread.tell()
        if thread.epoch == peer.epoch and thread.worker_pid is not None:
            thread.hung_up = peer.epoch
        else:
            self._resolve_starts(thread, peer.epoch)

    def _resolve_starts(self, thread: Thread, epoch: int) -> None:
        """Once worker and spawners of this epoch are all gone, what has not started never will."""
        if epoch not in thread.unfinished:
            thread.unfinished.add(epoch)
            self.spawn(self._resolve_when_over(thread, epoch))

    async def _resolve_when_over(self, thread: Thread, epoch: int) -> None:
        while not self._world.epoch_is_over(thread.thread_id, epoch):
            await asyncio.sleep(_LOOK)
        # The last of a spawner may be with the keeper, or with the next one, whose broker will take over from us.
        while not await self._world.hear_keeper():
            await asyncio.sleep(_LOOK)
        thread.unfinished.discard(epoch)
        for entry in list(thread.entries.values()):
            if entry.epoch == epoch and entry.state is State.STARTING:
                self._resolve_start(entry)
        self.lose_missing()
        thread.tell()

    def dismiss(self, thread: Thread) -> None:
        """Send the thread's worker to bed."""
        self._live(thread, lifecycle.Event.DISMISSED)

    def want_deltas(self, wanted: bool) -> None:
        """Tell every worker whether anybody listens to deltas."""
        for thread in self.threads.values():
            if thread.worker:
                self.spawn(self._tell(thread.worker, Deltas(wanted=wanted)))

    # What is done.

    def _live(self, thread: Thread, event: lifecycle.Event) -> None:
        try:
            thread.life, effects = lifecycle.step(thread.life, event)
        except KeyError:
            self._world.log(f"thread {thread.thread_id}: {event} in {thread.life} ignored")
            return
        for effect in effects:
            self._do_life(thread, effect)
        thread.tell()

    def _do_life(self, thread: Thread, effect: lifecycle.Effect) -> None:
        loop = asyncio.get_running_loop()
        if effect is Effect.START_WORKER:
            thread.epoch += 1
            thread.journal.reached(thread.epoch)
            try:
                thread.worker_pid = self._world.start_worker(thread.thread_id, thread.epoch)
            except OSError as error:
                thread.failure = str(error)
                epoch = thread.epoch
                loop.call_soon(self.worker_died, thread.thread_id, epoch, f"could not be started: {error}")
        elif effect is Effect.PAUSE:
            self._timers[thread.thread_id] = loop.call_later(
                thread.life.pause, self._live, thread, lifecycle.Event.PAUSE_OVER
            )
        elif effect is Effect.WELCOME:
            self._world.publish("worker", thread.thread_id, what="up", epoch=thread.epoch, pid=thread.worker_pid)
            self.take_back(thread)
        elif effect is Effect.SAY_BYE:
            if thread.worker:
                self.spawn(self._tell(thread.worker, Bye()))
        if thread.life.phase is not Phase.PAUSING and (timer := self._timers.pop(thread.thread_id, None)):
            timer.cancel()

    def relinquish(self) -> dict[tuple[str, str], Handles]:
        """Stop waiting, too."""
        for timer in self._timers.values():
            timer.cancel()
        return super().relinquish()
