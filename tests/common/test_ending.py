"""How real children ended, learned from each source that knows; never a made-up number."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from outlive.common import ending, kernel
from outlive.common.outcome import Outcome
from outlive.common.transcript import Transcript

from .conftest import Children, await_end, in_a_child

ENDS = [
    pytest.param(lambda: os._exit(0), Outcome("exited", code=0), id="0"),
    pytest.param(lambda: os._exit(41), Outcome("exited", code=41), id="41"),
    pytest.param(lambda: os._exit(255), Outcome("exited", code=255), id="255"),
    pytest.param(lambda: os.kill(os.getpid(), signal.SIGKILL), Outcome("signaled", signal=9), id="KILL"),
]


def knows_ends_of_the_reaped() -> bool:
    """Whether this kernel tells how a process ended after it was reaped (Linux 6.15 and newer)."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    status = kernel.pidfd_exit_status(pidfd)
    os.close(pidfd)
    return status == 7 << 8


needs_pidfd_info = pytest.mark.skipif(
    not knows_ends_of_the_reaped(), reason="this kernel does not tell how a reaped process ended"
)


@pytest.fixture
def transcript(children: Children) -> Transcript:
    return children.transcript()


class Child:
    """A forked child, by pid and pidfd."""

    def __init__(self, children: Children, act: Callable[[], None]) -> None:
        self.pid = children.fork(act)
        self.pidfd = os.pidfd_open(self.pid)


def is_zombie(pid: int) -> bool:
    return kernel.zombie_status(pid) is not None


@pytest.mark.parametrize(("act", "outcome"), ENDS)
def test_the_parent_learns_records_and_reaps(
    children: Children, transcript: Transcript, act: Callable[[], None], outcome: Outcome
) -> None:
    child = Child(children, act)
    await_end(child.pidfd)
    assert ending.learn(child.pidfd, transcript) == outcome
    assert transcript.live().outcome == outcome
    assert kernel.is_reaped(child.pidfd)
    os.close(child.pidfd)


def test_the_end_is_recorded_before_the_child_is_reaped(
    children: Children, transcript: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(children, lambda: os._exit(5))
    await_end(child.pidfd)
    recorded = []
    reap = ending.reap

    def looking(pidfd: int) -> None:
        recorded.append((transcript.live().outcome, is_zombie(child.pid)))
        reap(pidfd)

    monkeypatch.setattr(ending, "reap", looking)
    ending.learn(child.pidfd, transcript)
    assert recorded == [(Outcome("exited", code=5), True)]
    os.close(child.pidfd)


@pytest.mark.parametrize(("act", "outcome"), ENDS)
@needs_pidfd_info
def test_whoever_holds_the_pidfd_learns_after_another_parent_has_reaped(
    children: Children, transcript: Transcript, act: Callable[[], None], outcome: Outcome
) -> None:
    child = Child(children, act)
    os.waitpid(child.pid, 0)
    assert ending.learn(child.pidfd, transcript) == outcome
    os.close(child.pidfd)


@pytest.mark.parametrize(("act", "outcome"), ENDS)
def test_the_zombie_of_another_parent_is_asked_and_left(
    children: Children, transcript: Transcript, act: Callable[[], None], outcome: Outcome
) -> None:
    child = Child(children, act)
    await_end(child.pidfd)

    def ask() -> None:
        assert ending.learn(child.pidfd, transcript) == outcome

    in_a_child(ask)
    assert transcript.live().outcome == outcome
    assert is_zombie(child.pid)
    os.close(child.pidfd)


def test_what_is_recorded_is_believed_and_the_child_reaped(children: Children, transcript: Transcript) -> None:
    child = Child(children, lambda: os._exit(1))
    await_end(child.pidfd)
    transcript.record_outcome(Outcome("exited", code=99))
    assert ending.learn(child.pidfd, transcript) == Outcome("exited", code=99)
    assert kernel.is_reaped(child.pidfd)
    os.close(child.pidfd)


def test_who_ended_it_is_part_of_the_outcome(children: Children, transcript: Transcript) -> None:
    child = Child(children, lambda: signal.pause())
    transcript.record_by("pruned")
    signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    await_end(child.pidfd)
    assert ending.learn(child.pidfd, transcript) == Outcome("signaled", signal=9, by="pruned")
    os.close(child.pidfd)


def test_where_nobody_can_know_it_is_lost_with_the_reason(
    children: Children, transcript: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "pidfd_exit_status", lambda pidfd: None)
    child = Child(children, lambda: os._exit(0))
    os.waitpid(child.pid, 0)
    assert ending.learn(child.pidfd, transcript) is None
    assert transcript.live().outcome is None
    lost = Outcome.lost("it was reaped by a process that kept no record")
    assert ending.lost(child.pidfd, transcript) == lost
    assert ending.learn(child.pidfd, transcript) == lost
    os.close(child.pidfd)


def test_a_record_that_comes_between_the_looks_is_found(
    children: Children, transcript: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded_meanwhile(pidfd: int) -> None:
        transcript.record_outcome(Outcome("exited", code=6))

    monkeypatch.setattr(kernel, "pidfd_exit_status", recorded_meanwhile)
    child = Child(children, lambda: os._exit(0))
    os.waitpid(child.pid, 0)
    assert ending.learn(child.pidfd, transcript) == Outcome("exited", code=6)
    os.close(child.pidfd)


def test_without_a_pidfd_it_is_lost_unless_recorded(transcript: Transcript) -> None:
    assert ending.lost(-1, transcript) == Outcome.lost("its pidfd was never received")


def test_a_living_child_has_no_outcome_and_is_not_reaped(children: Children, transcript: Transcript) -> None:
    child = Child(children, lambda: signal.pause())
    assert ending.learn(child.pidfd, transcript) is None
    assert not kernel.is_reaped(child.pidfd)
    os.close(child.pidfd)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can have a child of another user")
@pytest.mark.parametrize("ours", [True, False], ids=["our child", "somebody's child"])
def test_the_code_of_another_users_process_is_never_taken_for_0(transcript: Transcript, ours: bool) -> None:
    """As of `sudo` or another setuid program: the kernel hides the code in /proc, and shows 0 there."""

    def act() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        pidfd = os.pidfd_open(pid)
        await_end(pidfd)
        ask(pidfd) if ours else in_a_child(lambda: ask(pidfd))

    def ask(pidfd: int) -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        assert ending.learn(pidfd, transcript) == (Outcome("exited", code=7) if ours else None)

    in_a_child(act)
