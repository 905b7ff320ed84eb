"""Descriptors as a broker finds them, in any order and with anything among them; real ones of real children."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import product

import pytest

from outlive.broker.custody import MOVES, State
from outlive.broker.findings import EVENTS, VERDICTS, Leaseholder, Progress, Verdict, identify, progress
from outlive.common import kernel
from outlive.common.descriptors import ROLES, Handles
from outlive.common.errors import PeerError
from outlive.common.inlet import Inlet
from outlive.common.transcript import Facts, Lease, Transcript, mark_started

from .conftest import DEAD, facts_of

SETS = [{"transcript"}, {*ROLES} - {"pidfd", "terminal"}, {*ROLES} - {"pidfd"}, {*ROLES}]


def whole(facts: Facts, pid: int, lease: Lease = DEAD) -> Handles:
    """Return the handles of a process of `facts`, which runs as `pid`: as its spawner makes them."""
    handles = Handles()
    if facts.tty:
        handles.conduit_read, handles.conduit_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        handles.inlet = Inlet.create(facts.mark)
        handles.terminal, slave = os.openpty()
        os.close(slave)
        conduit = os.fstat(handles.conduit_read).st_ino
    else:
        handles.terminal, theirs = os.pipe()
        os.close(theirs)
        conduit = 0
    handles.transcript = Transcript.create(facts, lease, conduit=conduit)
    mark_started(handles.transcript, pid)
    handles.pidfd = os.pidfd_open(pid)
    return handles


@pytest.fixture
def child() -> Iterator[int]:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ)
    yield pid
    os.kill(pid, 9)
    os.waitpid(pid, 0)


@pytest.fixture
def process(child: int) -> Iterator[Handles]:
    handles = whole(facts_of("1000"), child)
    yield handles
    handles.close()


@pytest.fixture
def log() -> list[str]:
    return []


def copies_of(handles: Handles) -> list[int]:
    """Return a second descriptor of each."""
    return [os.dup(fd) for fd in handles.held().values()]


def assert_same(found: Handles, wanted: dict[str, int]) -> None:
    """Each is for what it was, and the others are not there."""
    assert set(found.held()) == set(wanted)
    assert all(kernel.is_same_file(fd, wanted[role]) for role, fd in found.held().items())


@pytest.mark.parametrize("roles", SETS, ids=["earliest", "before the fork", "without its pidfd", "whole"])
@pytest.mark.parametrize("order", range(3))
def test_each_descriptor_is_told_by_looking_at_it_in_whatever_order_they_come(
    process: Handles, log: list[str], roles: set[str], order: int
) -> None:
    wanted = {role: fd for role, fd in process.held().items() if role in roles}
    fds = [os.dup(fd) for fd in wanted.values()]
    random.Random(order).shuffle(fds)
    found = identify(fds, log.append)
    assert_same(found, wanted)
    assert log == []
    found.close()


def test_a_process_on_pipes_has_the_read_end_for_its_terminal(child: int, log: list[str]) -> None:
    facts = facts_of("1000")._replace(tty=False)
    handles = whole(facts, child)
    found = identify(copies_of(handles)[::-1], log.append)
    assert_same(found, handles.held())
    found.close()
    handles.close()


def test_what_was_stored_twice_is_closed_once_and_without_a_word(
    process: Handles, log: list[str], descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    found = identify([*copies_of(process), *copies_of(process)], log.append)
    assert_same(found, process.held())
    assert (descriptors(), log) == (before + len(ROLES), [])
    found.close()


def test_what_is_not_understood_is_closed_with_a_line_and_the_rest_is_served(
    process: Handles, child: int, log: list[str], descriptors: Callable[[], int]
) -> None:
    other = whole(facts_of("1000", thread="other"), os.getpid())
    before = descriptors()
    strangers = [os.open("/dev/null", os.O_RDWR), os.open("/", os.O_PATH), *copies_of(other)]
    found = identify([*copies_of(process), *strangers], log.append)
    assert_same(found, process.held())
    assert descriptors() == before + len(ROLES)
    assert len(log) == len(strangers)
    assert all(line.startswith("descriptor of t/1000: ") and line.endswith("; closed") for line in log)
    found.close()
    other.close()


def test_without_a_sound_transcript_of_this_boot_all_are_closed_and_none_is_served(
    process: Handles, log: list[str], descriptors: Callable[[], int]
) -> None:
    damaged = kernel.memfd("damaged")
    os.ftruncate(damaged, 8192)
    kernel.seal(damaged)
    reboot = Transcript.create(facts_of("1000")._replace(boot_id="another"), DEAD)
    rest = [fd for role, fd in process.held().items() if role != "transcript"]
    before = descriptors()
    for first, why in ((None, "no transcript"), (damaged, "transcript"), (reboot, "another boot")):
        fds = [os.dup(fd) for fd in (rest if first is None else [first, *rest])]
        with pytest.raises(PeerError, match=why):
            identify(fds, log.append)
        assert descriptors() == before
    os.close(damaged)
    os.close(reboot)


def test_an_end_that_was_reaped_leaves_its_pidfd_recognizable(log: list[str]) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], os.environ)
    process = whole(facts_of("1000"), pid)
    os.waitpid(pid, 0)
    found = identify(copies_of(process), log.append)
    assert_same(found, process.held())
    found.close()
    process.close()


def test_how_far_a_start_had_got_is_told_by_header_and_descriptors(process: Handles) -> None:
    transcript = Transcript(process.transcript)
    assert progress(process, transcript) is Progress.COMPLETE
    assert progress(Handles(), transcript) is Progress.MARKED
    unmarked = Transcript.create(facts_of("1001"), DEAD)
    assert progress(Handles(), Transcript(unmarked)) is Progress.UNMARKED
    os.close(unmarked)


def test_every_find_has_its_verdict_and_every_event_its_move() -> None:
    assert set(VERDICTS) == {*product(Progress, Leaseholder)}
    assert set(EVENTS) == {*Leaseholder}
    assert set(EVENTS.values()) <= set(MOVES[State.STARTING])


def test_nobody_looks_into_a_start_that_somebody_who_lives_may_still_finish() -> None:
    looked = {holder for (_, holder), verdict in VERDICTS.items() if verdict is Verdict.LOOK}
    assert looked == {Leaseholder.NOBODY}
