"""The rare orders: deposits after a death, deaths within a handoff, starts that nobody finishes.

The loop is replaced by a list; processes, terminals, descriptors and their channels are real.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from outlive.broker import holding, lifecycle, processes
from outlive.broker.custody import Holder, State
from outlive.broker.delivery import Delivery
from outlive.broker.entries import Entry, Thread
from outlive.broker.lifecycle import Phase
from outlive.broker.operations import Operations
from outlive.broker.peers import Peer
from outlive.broker.records import Record
from outlive.broker.threads import ThreadManager
from outlive.common import channel, kernel, wire
from outlive.common.channel import open_parcel
from outlive.common.config import Config
from outlive.common.descriptors import Handles
from outlive.common.errors import BadRequest, LimitReached, PeerError, Unavailable, UnknownThread
from outlive.common.messages import Collected, Ended, ListProcesses, Orphaned, Request
from outlive.common.outcome import Outcome
from outlive.common.paths import Paths
from outlive.common.program import Program
from outlive.common.pump import Pump, Pumps
from outlive.common.transcript import Gap, Lease, Transcript, mark_started

COUNTER = ("/bin/sh", "-c", "stty -echo; n=0; while read w; do n=$((n+1)); echo $w $n; done")


class World:
    """The loop, as a list of what it was asked to do."""

    deltas_wanted = False
    upgrade_failed = ""
    keeper_pid = None
    keeper_heard = True
    keeper_asked = 0

    def __init__(self) -> None:
        # Marks of processes that the keeper was told to close, and epochs of which something lives.
        self.unkept: list[str] = []
        self.living: set[int] = set()
        self.workers: list[tuple[str, int]] = []
        self.requests: list[Request] = []
        self.published: list[tuple[str, str | None, dict[str, Any]]] = []
        self.logged: list[str] = []
        self.left = 1000

    def start_worker(self, thread_id: str, epoch: int) -> int:
        self.workers.append((thread_id, epoch))
        return 1_000_000_000 + epoch

    def transmit(self, peer: Peer, frame: bytes) -> None:
        message = wire.decode(frame)
        assert isinstance(message, Request)
        self.requests.append(message)

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        self.published.append((event, process_id, fields))

    def descriptors_left(self) -> int:
        return self.left

    async def upgrade(self) -> str:
        return ""

    def kill_worker(self, pid: int) -> None:
        """Nobody is stuck here."""

    def keep(self, mark: str, fds: Sequence[int]) -> None:
        """The spawners have done it."""

    def unkeep(self, mark: str) -> None:
        self.unkept.append(mark)

    def epoch_is_over(self, thread_id: str, epoch: int) -> bool:
        return epoch not in self.living

    async def hear_keeper(self) -> bool:
        self.keeper_asked += 1
        return self.keeper_heard

    def notice_deaths(self) -> None:
        """They are told by the test."""

    def log(self, text: str) -> None:
        self.logged.append(text)


class Stage:
    """One thread, and workers that do what the test says."""

    def __init__(self, pumps: Pumps, folder: Path, children: Any, **config: Any) -> None:
        self.world = World()
        paths = Paths(folder / "run", folder / "state", folder / "config.toml")
        paths.prepare()
        self.manager = ThreadManager(self.world, paths, Config(**config), pumps, Pump)
        self.thread: Thread = self.manager.create("t")
        self.children = children
        self.peer: Peer
        self.theirs: list[channel.Channel] = []
        self._peers: list[Peer] = []

    async def wake(self) -> Peer:
        """Have a worker come up."""
        waiting = asyncio.create_task(self.manager.worker(self.thread))
        await asyncio.sleep(0)
        ours, theirs = channel.pair()
        self.theirs.append(theirs)
        self.peer = Peer(ours, self.thread.worker_pid or 0, None)
        self._peers.append(self.peer)
        self.peer.admit("worker", "t", self.thread.epoch)
        self.manager.registered(self.peer, [], [])
        assert await waiting is self.peer
        for _ in range(5):  # it is given what is detached
            await asyncio.sleep(0)
        return self.peer

    def deposit(self, handles: Handles, process_id: str, peer: Peer | None = None) -> None:
        copies = Handles({role: os.dup(fd) for role, fd in handles.held().items()})
        self.manager.deposited(peer or self.peer, {("t", process_id): copies}, kept=True)

    def attach(self, process_id: str, *argv: str) -> Handles:
        """Have the worker start a process and pump it; return the worker's own copies."""
        handles: Handles = self.children.start(process_id, *(argv or COUNTER))
        self.deposit(handles, process_id)
        entry = self.entry(process_id)
        assert (entry.state, entry.custody.holder) == (State.ATTACHED, Holder.WORKER)
        return handles

    def entry(self, process_id: str) -> Entry:
        return self.thread.entries[process_id]

    def die(self, peer: Peer | None = None, *, spawner_too: bool = False) -> None:
        """Have the worker die; with its spawner its channel closes."""
        peer = peer or self.peer
        self.manager.worker_died("t", peer.epoch, "SIGKILL")
        if spawner_too:
            self.close_channel(peer)

    async def die_with_spawner(self) -> None:
        """Have both die, and wait until the broker has made up its mind about what they were starting."""
        self.die(spawner_too=True)
        await self.made_up()

    async def made_up(self) -> None:
        while self.thread.unfinished:
            await asyncio.sleep(0)

    def close_channel(self, peer: Peer) -> None:
        peer.close()
        self.manager.channel_closed(peer)

    async def asked(self, op: str) -> Request:
        """Wait for a request to the worker."""
        while not (found := [request for request in self.world.requests if request.op == op]):
            await asyncio.sleep(0)
        self.world.requests.remove(found[0])
        return found[0]

    def events(self, name: str) -> list[str | None]:
        return [process_id for event, process_id, _ in self.world.published if event == name]

    async def say(self, process_id: str, word: bytes, wanted: bytes) -> None:
        """Type into a process that the broker pumps, and wait for what it says."""
        held = self.manager.store.get(("t", process_id))
        assert held is not None
        await held.type(word + b"\n", float("inf"))
        while wanted not in b"".join(
            part[1] for part in held.transcript.read(0, 1 << 30) if not isinstance(part, Gap)
        ):
            assert not held.ended
            await held.until_output(held.pump.written, float("inf"))

    async def ended(self, process_id: str) -> None:
        while self.entry(process_id).state is not State.ENDED:
            await self.entry(process_id).changed()

    def close(self) -> None:
        for handles in self.manager.relinquish().values():
            handles.close()
        for peer in self._peers:
            peer.close()
        for theirs in self.theirs:
            theirs.close()


@pytest.fixture
async def stage(pumps: Pumps, tmp_path: Path, children: Any) -> AsyncIterator[Stage]:
    stage = Stage(pumps, tmp_path, children)
    yield stage
    stage.close()


def stopped(handles: Handles) -> None:
    """What a worker does before it says that it has stopped pumping, or the kernel when it died."""
    Transcript(handles.transcript).release_lease()
    handles.close()


# Starts.


async def test_the_rest_of_a_deposit_after_the_workers_death_is_taken_and_pumped(stage: Stage) -> None:
    peer = await stage.wake()
    early = stage.children.early("1000")
    stage.deposit(early, "1000")
    stage.die()
    assert stage.entry("1000").state is State.STARTING
    late = stage.children.late(early, *COUNTER)
    stage.deposit(late, "1000", peer)  # its spawner finishes what it was told
    assert (stage.entry("1000").state, stage.entry("1000").custody.holder) == (State.DETACHED, Holder.BROKER)
    early.close()
    late.close()
    await stage.say("1000", b"hello", b"hello 1\r\n")


async def test_a_whole_deposit_after_the_workers_death_goes_to_its_successor(stage: Stage) -> None:
    peer = await stage.wake()
    stage.die()
    await stage.wake()
    handles = stage.children.start("1000", *COUNTER)
    stage.deposit(handles, "1000", peer)
    handles.close()
    order = await stage.asked("import")
    packet = stage.theirs[-1].receive()
    assert packet is not None
    assert order.body["tickets"] == [packet.message["ticket"]]
    (parcel,) = open_parcel(packet).items()
    assert parcel[0] == ("t", "1000")
    parcel[1].close()
    stage.die()
    await stage.say("1000", b"hello", b"hello 1\r\n")


async def test_no_start_is_given_up_while_the_keeper_that_may_know_of_it_cannot_be_heard(stage: Stage) -> None:
    await stage.wake()
    stage.world.keeper_heard = False
    stage.die(spawner_too=True)
    while stage.world.keeper_asked < 3:
        assert stage.manager.may_start(stage.thread, "c")
        await asyncio.sleep(0)
    stage.world.keeper_heard = True
    await stage.made_up()
    assert not stage.manager.may_start(stage.thread, "c")


@pytest.mark.parametrize("channel_first", [True, False], ids=["channel, death", "death, channel"])
async def test_a_start_without_the_mark_never_ran(stage: Stage, channel_first: bool) -> None:
    peer = await stage.wake()
    early = stage.children.early("1000")
    stage.deposit(early, "1000")
    early.close()
    if channel_first:
        stage.close_channel(peer)
        stage.die()
        await stage.made_up()
    else:
        await stage.die_with_spawner()
    assert "1000" not in stage.thread.entries
    assert "1000" in stage.thread.journal.ids, "the id is not given out again"


@pytest.mark.parametrize("channel_first", [True, False], ids=["channel, death", "death, channel"])
async def test_a_start_with_the_mark_whose_process_lives_is_found(stage: Stage, channel_first: bool) -> None:
    peer = await stage.wake()
    early = stage.children.early("1000")
    stage.deposit(early, "1000")
    late = stage.children.late(early, "/bin/sleep", "1000")
    if channel_first:
        stage.close_channel(peer)
        stage.die()
        await stage.made_up()
    else:
        await stage.die_with_spawner()
    entry = stage.entry("1000")
    assert (entry.state, entry.custody.holder) == (State.DETACHED, Holder.BROKER)
    assert kernel.pidfd_pid(entry.handles.pidfd) == entry.pid == kernel.pidfd_pid(late.pidfd)
    signal.pidfd_send_signal(late.pidfd, signal.SIGKILL)
    late.close()
    early.close()
    await stage.ended("1000")


async def test_a_start_with_the_mark_that_has_not_executed_its_program_yet_is_found(stage: Stage) -> None:
    await stage.wake()
    early = stage.children.early("1000")
    late = stage.children.late(early, "/bin/sleep", "1000", executed=False)
    stage.deposit(early, "1000")
    early.close()
    await stage.die_with_spawner()
    entry = stage.entry("1000")
    assert (entry.state, entry.custody.holder) == (State.DETACHED, Holder.BROKER)
    signal.pidfd_send_signal(late.pidfd, signal.SIGKILL)
    late.close()
    await stage.ended("1000")


async def test_a_start_whose_spawner_alone_died_is_pumped_though_its_lease_is_the_living_workers(
    stage: Stage,
) -> None:
    worker = await stage.wake()
    early = stage.children.early("1000")
    transcript = Transcript(early.transcript)
    transcript.take_lease(Lease(os.getppid(), kernel.start_time(os.getppid()) or 0, worker.epoch))
    stage.deposit(early, "1000")
    # They die with the spawner.  Not COUNTER: it ends when its terminal is closed.
    stage.children.late(early, "/bin/sleep", "1000").close()
    early.close()
    stage.manager.noticed(worker, Orphaned(process_id="1000"))
    assert stage.entry("1000").state is State.DETACHED
    assert ("t", "1000") in stage.manager.store
    assert stage.world.logged == []


async def test_a_start_whose_spawner_died_before_its_word_to_the_worker_is_given_to_the_worker(
    stage: Stage,
) -> None:
    worker = await stage.wake()
    stage.attach("1000", "/bin/sleep", "1000").close()
    Transcript(stage.entry("1000").handles.transcript).take_lease(
        Lease(os.getppid(), kernel.start_time(os.getppid()) or 0, worker.epoch)
    )
    stage.manager.noticed(worker, Orphaned(process_id="1000"))
    assert (stage.entry("1000").custody.holder, ("t", "1000") in stage.manager.store) == (Holder.BROKER, True)
    assert stage.thread.taking_back is not None
    assert stage.world.logged == []


async def test_a_start_with_the_mark_that_had_ended_keeps_the_outcome_that_its_reaper_recorded(
    stage: Stage,
) -> None:
    worker = await stage.wake()
    early = stage.children.early("1000")
    mark_started(early.transcript, (1 << 22) + 1)
    stage.deposit(early, "1000")
    assert stage.manager.entry_by_pid((1 << 22) + 1) is stage.entry("1000")
    Transcript(early.transcript).record_outcome(Outcome("exited", code=7))
    early.close()
    stage.manager.noticed(worker, Orphaned(process_id="1000"))
    assert stage.entry("1000").outcome == Outcome("exited", code=7)
    assert stage.entry("1000").state in (State.DETACHED, State.ENDED)


async def test_a_start_with_the_mark_of_which_nothing_is_found_is_lost_and_keeps_its_output(stage: Stage) -> None:
    await stage.wake()
    early = stage.children.early("1000")
    os.write(early.conduit_write, b"last words")
    mark_started(early.transcript, (1 << 22) + 1)
    stage.deposit(early, "1000")
    early.close()
    await stage.die_with_spawner()
    entry = stage.entry("1000")
    assert entry.state is State.ENDED
    outcome = entry.outcome
    assert outcome is not None
    assert (outcome.kind, outcome.code, outcome.signal) == ("lost", None, None)


@pytest.mark.parametrize("told", [True, False])
async def test_a_start_of_which_nothing_is_found_waits_for_the_keepers_word_before_it_is_lost(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr(processes, "KEEPERS_WORD", 0.0)
    monkeypatch.setattr(stage.world, "keeper_pid", 1)
    await stage.wake()
    pid = (1 << 22) + 1
    early = stage.children.early("1000")
    mark_started(early.transcript, pid)
    stage.deposit(early, "1000")
    stage.die(spawner_too=True)
    assert stage.entry("1000").state is State.STARTING
    if told:  # it is on its way while the broker looks for what it has found
        stage.manager.orphan_ended(pid, 1, 42 << 8)
    await stage.ended("1000")
    outcome = stage.entry("1000").outcome
    assert outcome == (Outcome("exited", code=42) if told else Outcome.lost("its pidfd was never received"))
    early.close()


async def test_a_recycled_pid_is_not_taken_for_the_process(stage: Stage) -> None:
    await stage.wake()
    early = stage.children.early("1000")
    mark_started(early.transcript, os.getppid())  # somebody without the mark and the transcript
    stage.deposit(early, "1000")
    early.close()
    await stage.die_with_spawner()
    outcome = stage.entry("1000").outcome
    assert outcome is not None
    assert outcome.kind == "lost"
    assert stage.entry("1000").handles.pidfd == -1


async def test_a_call_waits_for_whatever_a_worker_was_starting_when_it_came_from_a_former_broker(
    stage: Stage,
) -> None:
    peer = await stage.wake()
    stage.manager.registered(peer, [], ["1000"])
    stage.die()
    waiting = asyncio.create_task(stage.manager.started(stage.thread, "perhaps this call"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done(), "its spawner lives"
    stage.close_channel(peer)
    await waiting


async def test_a_worker_that_lives_and_lost_its_channel_loses_no_start(stage: Stage) -> None:
    peer = await stage.wake()
    early = stage.children.early("1000")
    stage.deposit(early, "1000")
    stage.close_channel(peer)
    assert stage.entry("1000").state is State.STARTING
    early.close()


async def test_a_start_that_the_spawner_took_back_is_forgotten(
    stage: Stage, descriptors: Callable[[], int]
) -> None:
    await stage.wake()
    early = stage.children.early("1000")
    before = descriptors()
    stage.deposit(early, "1000")
    stage.manager.never_ran("t", "1000")
    assert stage.thread.entries == {}
    assert descriptors() == before
    stage.manager.never_ran("t", "1000")
    stage.manager.never_ran("nobody", "1000")
    early.close()


async def test_a_deposit_that_is_refused_closes_its_descriptors_and_takes_the_rest(
    stage: Stage, descriptors: Callable[[], int]
) -> None:
    peer = await stage.wake()
    good, foreign, bare = stage.children.start("1000", "/bin/cat"), stage.children.early("1"), Handles()
    bare.pidfd = os.pidfd_open(os.getpid())
    before = descriptors()
    parcel = {
        ("other", "1"): Handles({role: os.dup(fd) for role, fd in foreign.held().items()}),
        ("t", "2"): Handles({role: os.dup(fd) for role, fd in foreign.held().items()}),
        ("t", "3"): Handles({"pidfd": os.dup(bare.pidfd)}),
        ("t", "1000"): Handles({role: os.dup(fd) for role, fd in good.held().items()}),
    }
    with pytest.raises(PeerError, match=r"other/1 belongs.*t/2: .*t/1.*t/3: .*transcript"):
        stage.manager.deposited(peer, parcel, kept=False)
    assert list(stage.thread.entries) == ["1000"]
    assert descriptors() == before + 6
    for handles in (good, foreign, bare):
        handles.close()


# Handoffs.


async def test_a_death_is_a_detach_that_nobody_announced(stage: Stage) -> None:
    await stage.wake()
    for process_id in ("1000", "2000"):
        stopped(stage.attach(process_id))
    stage.die()
    for process_id in ("1000", "2000"):
        assert stage.entry(process_id).state is State.DETACHED
        await stage.say(process_id, process_id.encode(), process_id.encode() + b" 1\r\n")
    assert stage.events("detached") == []
    assert stage.world.workers == [("t", 1), ("t", 2)], "replaced at once"


async def test_a_live_worker_keeps_its_lease_whatever_its_channel_does(stage: Stage) -> None:
    peer = await stage.wake()
    handles = stage.attach("1000")
    Transcript(handles.transcript).take_lease(Lease.mine(1))
    stage.close_channel(peer)
    assert stage.entry("1000").custody.holder is Holder.WORKER
    assert len(stage.manager.store) == 0
    handles.close()


async def back(stage: Stage, *process_ids: str, starting: Sequence[str] = ()) -> Peer:
    """Have the living worker come back with another channel, holding these and about to get those."""
    ours, theirs = channel.pair()
    stage.theirs.append(theirs)
    peer = Peer(ours, stage.thread.worker_pid or 0, None)
    stage._peers.append(peer)
    peer.admit("worker", "t", stage.thread.epoch)
    stage.manager.registered(peer, list(process_ids), list(starting))
    return peer


async def test_what_a_worker_gave_back_before_its_channel_broke_is_pumped_when_it_comes_back(stage: Stage) -> None:
    peer = await stage.wake()
    given, kept, unread = (stage.attach(process_id) for process_id in ("1000", "2000", "3000"))
    worker = Lease(os.getppid(), kernel.start_time(os.getppid()) or 0, peer.epoch)
    for handles in (given, kept, unread):
        Transcript(handles.transcript).take_lease(worker)
    Transcript(given.transcript).release_lease()  # exported, and its word of that is lost
    stage.close_channel(peer)
    await back(stage, "2000", starting=["3000"])  # it has started, and the worker is about to hear of it
    assert [stage.entry(name).custody.holder for name in ("1000", "2000", "3000")] == [
        Holder.BROKER,
        Holder.WORKER,
        Holder.WORKER,
    ]
    assert [key for key in (("t", "1000"), ("t", "2000")) if key in stage.manager.store] == [("t", "1000")]
    for handles in (given, kept, unread):
        handles.close()


async def test_a_worker_sent_to_bed_while_its_channel_was_broken_hears_of_it_when_it_comes_back(
    stage: Stage,
) -> None:
    stage.close_channel(await stage.wake())
    stage.manager.dismiss(stage.thread)
    assert stage.world.requests == []
    await back(stage)
    await stage.asked("bye")
    stage.die()
    assert stage.thread.life.phase is Phase.ASLEEP


async def detached(stage: Stage, *process_ids: str) -> None:
    """Have these in the broker's hands, and a new worker up that has not been given them."""
    await stage.wake()
    for process_id in process_ids:
        stopped(stage.attach(process_id))
    stage.die()
    await stage.wake()
    await stage.asked("import")


async def test_a_new_worker_gets_everything_in_parcels_that_arrive_before_the_order(stage: Stage) -> None:
    await stage.wake()
    for process_id in ("1000", "2000"):
        stopped(stage.attach(process_id))
    stage.die()
    await stage.wake()
    order = await stage.asked("import")
    packet = stage.theirs[-1].receive()
    assert packet is not None
    assert order.body["tickets"] == [packet.message["ticket"]]
    parcel = open_parcel(packet)
    assert list(parcel) == [("t", "1000"), ("t", "2000")]
    for handles in parcel.values():
        assert Transcript(handles.transcript).live().lease is None
        handles.close()
    assert {entry.custody.holder for entry in stage.thread.entries.values()} == {Holder.WORKER}
    assert len(stage.manager.store) == 0


async def test_a_worker_that_dies_between_parcel_and_answer_gives_everything_back(stage: Stage) -> None:
    await detached(stage, "1000", "2000")
    stage.die()
    for process_id in ("1000", "2000"):
        assert (stage.entry(process_id).state, stage.entry(process_id).custody.holder) == (
            State.DETACHED,
            Holder.BROKER,
        )
        await stage.say(process_id, b"back", b"back 1\r\n")
    await stage.wake()
    assert (await stage.asked("import")).body["tickets"]


async def test_what_a_worker_skips_goes_back_to_the_store_untouched(stage: Stage) -> None:
    await stage.wake()
    for process_id in ("1000", "2000"):
        stopped(stage.attach(process_id))
    stage.die()
    await stage.wake()
    order = await stage.asked("import")
    summary = {"reattached_count": 1, "skipped_count": 1, "skipped_process_ids": ["2000"]}
    stage.peer.answered(wire.success(order.id, summary))
    while stage.entry("2000").custody.holder is not Holder.BROKER:
        await asyncio.sleep(0)
    assert stage.entry("1000").custody.holder is Holder.WORKER
    assert stage.entry("2000").state is State.DETACHED
    assert stage.events("reattached") == ["1000"]
    await stage.say("2000", b"mine", b"mine 1\r\n")


async def test_a_worker_that_refuses_the_order_gives_everything_back(stage: Stage) -> None:
    await stage.wake()
    stopped(stage.attach("1000"))
    stage.die()
    await stage.wake()
    order = await stage.asked("import")
    stage.peer.answered(wire.failure(order.id, BadRequest("not today")))
    while stage.entry("1000").custody.holder is not Holder.BROKER:
        await asyncio.sleep(0)
    await stage.say("1000", b"mine", b"mine 1\r\n")


async def test_detaching_takes_what_the_worker_says_it_gave(stage: Stage) -> None:
    await stage.wake()
    mine = stage.attach("1000")
    theirs = stage.attach("2000")
    detaching = asyncio.create_task(stage.manager.detach_thread_processes("t"))
    order = await stage.asked("export")
    stopped(mine)
    stage.peer.answered(wire.success(order.id, ["1000"]))
    summary = await detaching
    assert (summary.process_count, summary.process_ids) == (1, ["1000"])
    assert stage.entry("1000").state is State.DETACHED
    assert stage.entry("2000").state is State.ATTACHED
    assert stage.events("detached") == ["1000"]
    theirs.close()


async def test_a_worker_that_dies_during_a_detach_has_detached(stage: Stage) -> None:
    await stage.wake()
    stopped(stage.attach("1000"))
    detaching = asyncio.create_task(stage.manager.detach_thread_processes("t"))
    await stage.asked("export")
    stage.die()
    assert (await detaching).process_ids == ["1000"]
    assert stage.entry("1000").state is State.DETACHED


async def test_detach_of_an_unknown_or_sleeping_thread_is_empty_and_reattach_is_an_error(stage: Stage) -> None:
    for name in ("nobody", "t"):
        assert (await stage.manager.detach_thread_processes(name)).process_count == 0
        assert (await stage.manager.clean_detached_thread_processes(name)).process_count == 0
    with pytest.raises(BadRequest, match="has no worker"):
        await stage.manager.reattach_thread_processes(stage.thread)
    with pytest.raises(UnknownThread):
        stage.manager.get("nobody")


# Ends.


async def test_a_detached_end_is_recorded_at_once_and_announced_after_the_reattachment(stage: Stage) -> None:
    await stage.wake()
    stopped(stage.attach("1000", "/bin/sh", "-c", "read w; exit 5"))
    stage.die()
    held = stage.manager.store.get(("t", "1000"))
    assert held is not None
    await held.type(b"\n", float("inf"))
    await stage.ended("1000")
    assert stage.events("end") == []
    row = stage.entry("1000").row(None)
    assert (row.state, row.outcome) == ("ended", {"kind": "exited", "code": 5})
    await stage.wake()
    await stage.asked("import")
    notice = Ended(process_id="1000", call_id="call-1000", output=b"\r\n")
    for _ in range(2):  # a worker may say it again to a new broker
        stage.manager.noticed(stage.peer, notice)
    assert stage.events("end") == ["1000"]


async def test_what_was_told_goes_also_when_its_worker_had_it_as_the_time_for_repetitions_was_over(
    stage: Stage,
) -> None:
    await stage.wake()
    handles = stage.attach("1000", "/bin/sh", "-c", "exit 5")
    Transcript(handles.transcript).record_told()
    stage.manager._settle_told(stage.entry("1000"))
    stopped(handles)
    stage.die()
    while "1000" in stage.thread.entries:
        await asyncio.sleep(0)
    assert stage.thread.journal.get("1000").row["outcome"] == {"kind": "exited", "code": 5}


async def test_a_collected_process_answers_from_the_journal_and_holds_no_descriptor(
    stage: Stage, descriptors: Callable[[], int]
) -> None:
    await stage.wake()
    handles = stage.attach("1000", "/bin/true")
    before = descriptors()
    stage.manager.noticed(stage.peer, Ended(process_id="1000", call_id="call-1000"))
    stage.manager.noticed(stage.peer, Collected(process_id="1000"))
    assert descriptors() == before - 6
    record = stage.manager.find("t", "1000")
    assert not isinstance(record, Entry)
    assert record.row["call_id"] == "call-1000"
    handles.close()


async def test_an_end_that_the_agent_was_told_before_the_broker_heard_of_it_counts_as_read(stage: Stage) -> None:
    await stage.wake()
    handles = stage.attach("1000", "/bin/sh", "-c", "exit 5")
    read: list[tuple[str, str]] = []
    stage.manager.on_read = read.append
    stage.entry("1000").told = True  # the answer was quicker than the word to us
    stopped(handles)
    stage.die()
    await stage.ended("1000")
    assert read == [("t", "1000")]


async def test_what_a_former_worker_says_late_is_dropped(stage: Stage) -> None:
    former = await stage.wake()
    stopped(stage.attach("1000"))
    stage.die()
    await stage.wake()
    await stage.asked("import")
    stage.manager.noticed(former, Ended(process_id="1000", call_id="call-1000"))
    stage.manager.noticed(former, Collected(process_id="1000"))
    assert stage.entry("1000").state is State.ATTACHED
    assert stage.events("end") == []


async def test_too_many_ended_ones_expire_oldest_first(pumps: Pumps, tmp_path: Path, children: Any) -> None:
    stage = Stage(pumps, tmp_path, children, ended_keep_count=2)
    await stage.wake()
    for process_id in ("5000", "4000", "3000"):
        handles = stage.attach(process_id, "/bin/true")
        Transcript(handles.transcript).record_outcome(Outcome("exited", code=0))
        handles.close()
    for process_id in ("5000", "4000", "3000"):
        stage.manager.noticed(stage.peer, Ended(process_id=process_id, call_id=f"call-{process_id}"))
    assert list(stage.thread.entries) == ["4000", "3000"]
    assert not isinstance(stage.manager.find("t", "5000"), Entry)
    assert (await stage.asked("forget")).body["process_ids"] == ["5000"]
    stage.close()


async def test_clean_ends_what_is_detached_and_leaves_what_is_attached(stage: Stage) -> None:
    await stage.wake()
    stopped(stage.attach("1000"))
    stage.die()
    await stage.wake()
    order = await stage.asked("import")
    summary = {"reattached_count": 0, "skipped_count": 1, "skipped_process_ids": ["1000"]}
    stage.peer.answered(wire.success(order.id, summary))
    attached = stage.attach("2000")
    while stage.entry("1000").custody.holder is not Holder.BROKER:
        await asyncio.sleep(0)
    summary_of = await stage.manager.clean_detached_thread_processes("t")
    assert summary_of.process_ids == ["1000"]
    assert list(stage.thread.entries) == ["2000"]
    record = stage.manager.find("t", "1000")
    assert not isinstance(record, Entry)
    assert record.row["outcome"] == {"kind": "signaled", "signal": 9, "by": "cleaned"}
    attached.close()


# Workers.


async def test_a_worker_that_does_not_come_up_fails_the_call_and_the_next_call_tries_again(stage: Stage) -> None:
    calling = asyncio.create_task(stage.manager.worker(stage.thread))
    await asyncio.sleep(0)
    for epoch in range(1, 6):
        assert stage.thread.life.phase is Phase.STARTING
        stage.manager.worker_died("t", epoch, "exit status 1")
        if epoch < 5:
            assert stage.thread.life.phase is Phase.PAUSING
            stage.manager._live(stage.thread, lifecycle.Event.PAUSE_OVER)
    with pytest.raises(Unavailable, match=r"does not come up .exit status 1.*safe"):
        await calling
    assert stage.thread.row().state == "failed"
    await stage.wake()
    assert stage.world.workers[-1] == ("t", 6)
    assert stage.thread.row().state == "awake"


async def test_the_death_of_a_former_epoch_is_no_news(stage: Stage) -> None:
    former = await stage.wake()
    stage.die()
    await stage.wake()
    stage.die(former)
    assert stage.thread.life.phase is Phase.AWAKE
    assert stage.thread.worker is stage.peer


async def test_a_name_that_no_thread_may_have_does_not_keep_the_broker_down(
    pumps: Pumps, tmp_path: Path, children: Any
) -> None:
    stage = Stage(pumps, tmp_path, children)
    stage.close()
    with closing(sqlite3.connect(tmp_path / "state/journal.db")) as connection, connection:
        connection.execute("INSERT INTO threads VALUES ('../x', 3), ('kept', 3)")
    connection.close()
    stage = Stage(pumps, tmp_path, children)
    assert sorted(stage.manager.threads) == ["kept", "t"]
    assert stage.manager.threads["kept"].epoch == 3
    assert any("../x" in line for line in stage.world.logged)
    stage.close()


# Too many threads.


@pytest.fixture
def full(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage with as many threads as may be: t, and nine more of which nothing is left."""
    monkeypatch.setattr(holding, "THREADS_MAX", 10)
    for number in range(9):
        stage.manager.create(f"old-{number}")
    for thread in stage.manager.threads.values():
        thread.asked_for -= 2 * holding.FORGET_AFTER
    return stage


async def test_a_thread_of_which_nothing_is_left_makes_room_and_is_unknown_also_to_the_next_broker(
    full: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "FORGET_AT_ONCE", 2)
    full.manager.threads["old-3"].asked_for -= 1
    full.manager.journal.thread("old-3").never_ran("1000")
    full.manager.journal.flush()
    full.manager.create("new")
    assert "new" in full.manager.threads
    assert len(full.manager.threads) == 9
    with pytest.raises(UnknownThread):
        full.manager.get("old-3")
    assert set(full.manager.journal.thread_ids) == set(full.manager.threads)
    full.manager.journal.flush()
    with closing(sqlite3.connect(full.manager.journal._database._path)) as file:
        assert {name for (name,) in file.execute("SELECT name FROM threads")} == set(full.manager.threads)
        assert file.execute("SELECT * FROM processes WHERE thread = 'old-3'").fetchall() == []


async def test_what_anybody_may_still_want_of_a_thread_keeps_it(
    full: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, now = full.manager, time.monotonic()
    record = Record.lost({"thread": "old-0", "process_id": "1000", "call_id": "c"}, "rebooted")
    manager.journal.thread("old-0")._keep("lost", record)
    manager.journal.outbox.start("old-1", Program(function="a:b"))
    manager.journal.outbox.new(("old-2", "1000", 0, "exit"), {}, lambda letter: None)
    manager.journal.outbox._keep_seconds = 0.0
    manager.journal.flush()
    await full.wake()
    stopped(full.attach("1000"))
    full.world.living = {5}
    manager.threads["old-3"].epoch = 5
    manager.threads["old-4"].expected = True
    manager.threads["old-5"].asked_for = now
    monkeypatch.setattr(manager, "on_forget", lambda thread: thread.thread_id != "old-6")
    manager.get("old-7")
    await manager.threads["old-8"].handoff.acquire()
    with pytest.raises(LimitReached, match="10 threads exist; use one of them, or wait"):
        manager.create("new")
    manager.threads["old-8"].handoff.release()
    with pytest.raises(LimitReached):  # whoever asks again and again does not have all of them looked at each time
        manager.create("new")
    manager._forget_again_at -= holding.FORGET_PAUSE
    manager.create("new")
    assert "old-8" not in manager.threads


async def test_no_thread_is_forgotten_while_that_cannot_be_written(
    full: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full.manager.journal._database, "commit", lambda *_: ([], "the disk is full"))
    with pytest.raises(LimitReached):
        full.manager.create("new")
    assert len(full.manager.threads) == len(full.manager.journal.thread_ids) == 10


async def test_what_is_over_of_a_thread_does_not_keep_it(full: Stage) -> None:
    delivery = Delivery(full.world, full.manager, Config(idle_sleep_s=0.001))
    box = delivery._box("old-3")
    with delivery.busy(full.manager.threads["old-3"]):
        pass
    while box.to_bed is None or not box.to_bed.done():
        await asyncio.sleep(0.001)
    full.manager.threads["old-3"].asked_for -= 3 * holding.FORGET_AFTER
    full.manager.create("new")
    assert "old-3" not in full.manager.threads
    assert delivery._box("old-4") is not box


async def test_a_list_of_all_processes_asks_for_no_thread(full: Stage) -> None:
    operations = Operations(
        full.world, full.manager, Delivery(full.world, full.manager, Config()), "spliced", lambda: None
    )
    await operations.carry_out(ListProcesses(), None)
    full.manager.create("new")


async def test_a_process_that_is_lost_while_a_rule_that_was_set_again_is_open_wakes(stage: Stage) -> None:
    delivery, outbox = Delivery(stage.world, stage.manager, Config()), stage.manager.journal.outbox
    outbox.new(("t", "1000", 1, "output=x"), {}, lambda letter: None)
    row = {"thread": "t", "process_id": "1000", "outcome": {"kind": "lost", "reason": "rebooted"}}
    delivery._lost({**row, "wake_on": [("output=x", 1)]})
    assert not outbox.knows(("t", "1000", 1, "exit"))
    delivery._lost({**row, "wake_on": [("output=x", 1), ("output=x", 2)]})
    assert outbox.knows(("t", "1000", 2, "exit"))
