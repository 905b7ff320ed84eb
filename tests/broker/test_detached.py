"""The store drains and types into real children on real terminals, and gives them back as it got them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from outlive.broker.detached import BROKER_EPOCH, DetachedStore
from outlive.common.descriptors import Handles
from outlive.common.errors import HandoffError, PeerError, StdinClosed
from outlive.common.held import Held
from outlive.common.inlet import Inlet
from outlive.common.outcome import Outcome
from outlive.common.pump import Pump, Pumps
from outlive.common.transcript import Gap, Lease, Transcript
from outlive.common.tree import Feller


class Store(DetachedStore):
    """A store that remembers whom it has seen end."""

    def __init__(self, pumps: Pumps) -> None:
        self.ended: list[Held] = []
        super().__init__(pumps, Pump, Feller(), on_ended=self.ended.append)


@pytest.fixture
async def store(pumps: Pumps) -> AsyncIterator[Store]:
    store = Store(pumps)
    yield store
    store.close()


def printed(transcript: Transcript) -> bytes:
    return b"".join(part[1] for part in transcript.read(0, transcript.written) if not isinstance(part, Gap))


async def until(held: Held, text: bytes) -> None:
    """Wait until the child has printed `text`."""
    while text not in printed(held.transcript):
        assert not held.ended, printed(held.transcript)
        await held.until_output(held.pump.written, float("inf"))


async def test_two_processes_are_drained_each_into_its_own_transcript(store: Store, children: Any) -> None:
    helds = {}
    for process_id, word in (("1000", "one"), ("2000", "two")):
        script = (
            f"stty -echo; i=0; while [ $i -lt 2000 ]; do echo {word}-$i; i=$((i+1)); done; exit {process_id[0]}"
        )
        helds[process_id] = store.insert(("t", process_id), children.start(process_id, "/bin/sh", "-c", script))
    for process_id, word in (("1000", "one"), ("2000", "two")):
        held = helds[process_id]
        assert await held.until_ended()
        assert printed(held.transcript) == b"".join(b"%s-%d\r\n" % (word.encode(), i) for i in range(2000))
        assert held.transcript.live().outcome == Outcome("exited", code=int(process_id[0]))
    assert sorted(held.process_id for held in store.ended) == ["1000", "2000"]


async def test_a_detached_process_takes_input(store: Store, children: Any) -> None:
    held = store.insert(("t", "1000"), children.start("1000", "/bin/sh", "-c", "read line; echo got:$line; exit 7"))
    assert await held.type(b"hello\n", float("inf")) == 6
    assert await held.until_ended()
    assert b"got:hello" in printed(held.transcript)
    assert held.outcome == Outcome("exited", code=7)


async def test_what_the_dead_pumper_left_comes_first(store: Store, children: Any) -> None:
    handles = children.start("1000", "/bin/sh", "-c", "stty -echo raw; echo ready; head -c 5; echo")
    os.write(handles.conduit_write, b"left over, ")
    Inlet(handles.inlet, Transcript(handles.transcript).facts.mark).accept(b"name-of-", b"typed", 0)
    held = store.insert(("t", "1000"), handles)
    assert await held.until_ended()
    assert printed(held.transcript).startswith(b"left over, ")
    assert b"typed" in printed(held.transcript)


async def test_the_store_holds_the_lease_while_it_pumps_and_gives_it_back(store: Store, children: Any) -> None:
    handles = children.start("1000", "/bin/cat")
    transcript = store.insert(("t", "1000"), handles).transcript
    assert transcript.live().lease == Lease.mine(BROKER_EPOCH)
    assert ("t", "1000") in store
    given_back = store.remove(("t", "1000"))
    assert given_back is not None
    assert given_back.held().keys() == {
        "transcript",
        "terminal",
        "conduit_read",
        "conduit_write",
        "inlet",
        "pidfd",
    }
    assert Transcript(given_back.transcript).live().lease is None
    assert (len(store), store.remove(("t", "1000"))) == (0, None)
    given_back.close()


async def test_five_times_out_and_in_the_stream_goes_on_where_it_stopped(store: Store, children: Any) -> None:
    keys = [("t", "1000"), ("t", "2000")]
    for key in keys:
        script = f"stty -echo; while read w; do echo {key[1]}:$w; done"
        store.insert(key, children.start(key[1], "/bin/sh", "-c", script))
    for turn in range(5):
        for key in keys:
            held = store.get(key)
            assert held is not None
            await held.type(b"%d\n" % turn, float("inf"))
            await until(held, b"%s:%d\r\n" % (key[1].encode(), turn))
            handles = store.remove(key)
            assert handles is not None
            store.insert(key, handles)
    for key in keys:
        held = store.get(key)
        assert held is not None
        lines = b"".join(b"%s:%d\r\n" % (key[1].encode(), turn) for turn in range(5))
        assert printed(held.transcript).endswith(lines)


async def test_a_live_holder_is_not_robbed_and_the_handles_stay_the_callers(store: Store, children: Any) -> None:
    handles = children.start("1000", "/bin/cat")
    Transcript(handles.transcript).take_lease(Lease.mine(epoch=3))
    with pytest.raises(HandoffError, match="still holds the lease"):
        store.insert(("t", "1000"), handles)
    assert ("t", "1000") not in store
    assert len(handles) == 6
    Transcript(handles.transcript).release_lease()
    store.insert(("t", "1000"), handles)


async def test_a_damaged_transcript_is_refused_and_the_handles_stay_the_callers(store: Store) -> None:
    handles = Handles({"transcript": os.memfd_create("not-ours")})
    with pytest.raises(PeerError):
        store.insert(("t", "1000"), handles)
    assert len(store) == 0
    os.fstat(handles.transcript)
    handles.close()


async def test_a_detached_process_that_is_replaced_is_terminated_with_its_tree(store: Store, children: Any) -> None:
    script = "nohup setsid sleep 1000 >/dev/null 2>&1 & echo $!; exec sleep 1000"
    older = store.insert(("t", "1000"), children.start("1000", "/bin/sh", "-c", script))
    await until(older, b"\n")
    grandchild = os.pidfd_open(int(printed(older.transcript).split()[0]))
    watched = os.dup(older.handles.pidfd)
    header = os.dup(older.transcript.fd)
    newer = store.insert(("t", "1000"), children.start("1000", "/bin/cat"))
    for pidfd in (watched, grandchild):
        gone = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, lambda gone=gone: gone.done() or gone.set_result(None))
        await gone
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
    while older.handles.held():  # seen off, by a thread
        await asyncio.sleep(0.001)
    assert Transcript(header).live().by == "cleaned"
    os.close(header)
    assert store.get(("t", "1000")) is newer
    assert store.ended == [], "its end would be taken for that of the newer one"
    await newer.type(b"alive\n", float("inf"))
    await until(newer, b"alive\r\nalive\r\n")


async def test_the_older_one_lives_when_the_newer_one_cannot_be_taken(store: Store, children: Any) -> None:
    older = store.insert(("t", "1000"), children.start("1000", "/bin/cat"))
    handles = children.start("1000", "/bin/cat")
    Transcript(handles.transcript).take_lease(Lease.mine(epoch=3))
    with pytest.raises(HandoffError):
        store.insert(("t", "1000"), handles)
    handles.close()
    assert store.get(("t", "1000")) is older
    await older.type(b"alive\n", float("inf"))
    await until(older, b"alive\r\nalive\r\n")


async def test_a_signal_death_is_recorded_as_what_it_was(store: Store, children: Any) -> None:
    held = store.insert(("t", "1000"), children.start("1000", "/bin/cat"))
    signal.pidfd_send_signal(held.handles.pidfd, signal.SIGKILL)
    assert await held.until_ended()
    assert held.transcript.live().outcome == Outcome("signaled", signal=9)


async def test_an_end_before_the_store_had_it_is_noticed(store: Store, children: Any) -> None:
    handles = children.start("1000", "/bin/sh", "-c", "echo quick; exit 5")
    await asyncio.to_thread(os.waitid, os.P_PIDFD, handles.pidfd, os.WEXITED | os.WNOWAIT)
    held = store.insert(("t", "1000"), handles)
    assert await held.until_ended()
    assert (held.outcome, printed(held.transcript)) == (Outcome("exited", code=5), b"quick\r\n")


async def test_typing_into_a_process_without_a_terminal_is_refused(store: Store, children: Any) -> None:
    handles = children.start("1000", "/bin/cat")
    handles.close_role("inlet")
    held = store.insert(("t", "1000"), handles)
    with pytest.raises(StdinClosed, match="tty=true"):
        await held.type(b"x", float("inf"))


async def test_closing_the_store_closes_every_descriptor(
    pumps: Pumps, children: Any, descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    store = Store(pumps)
    for process_id in ("1000", "2000"):
        store.insert(("t", process_id), children.start(process_id, "/bin/cat"))
    assert descriptors() == before + 12
    store.close()
    assert descriptors() == before
