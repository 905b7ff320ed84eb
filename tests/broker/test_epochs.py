"""Locked files, and the processes that inherited the lock."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlive.broker.epochs import Epochs, Survivor
from outlive.common import kernel

VALUES = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=9), st.lists(st.none(), max_size=1))


class Worker:
    """A process with the lock of an epoch, and one of its own, as a spawner."""

    def __init__(self, epochs: Epochs, thread_id: str, epoch: int) -> None:
        fd = epochs.open(thread_id, epoch)
        os.set_inheritable(fd, True)
        self.pids = [os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ) for _ in range(2)]
        epochs.write(fd, self.pids[0])

    def kill(self) -> None:
        """Kill the first one that is left."""
        pid = self.pids.pop(0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        while self.pids:
            self.kill()


@pytest.fixture
def epochs(tmp_path: Path) -> Epochs:
    return Epochs(tmp_path)


def found(epochs: Epochs) -> Iterator[tuple[str, int, int]]:
    """Yield who survived, and close what that comes with."""
    for survivor in epochs.survivors():
        pid = 0
        if survivor.pidfd >= 0:
            pid = kernel.pidfd_pid(survivor.pidfd) or -1
            os.close(survivor.pidfd)
            assert pid == survivor.pid
        yield survivor.thread_id, survivor.epoch, pid


def test_an_epoch_is_over_when_worker_and_spawner_are_both_dead_and_not_before(
    epochs: Epochs, tmp_path: Path
) -> None:
    with Worker(epochs, "a.b-1", 7) as worker:
        pid = worker.pids[0]
        assert [*found(epochs)] == [("a.b-1", 7, pid)]
        assert not epochs.is_over("a.b-1", 7)
        worker.kill()
        assert [*epochs.survivors()] == [Survivor("a.b-1", 7, pid, -1)]
        assert not epochs.is_over("a.b-1", 7)
        worker.kill()
        assert epochs.is_over("a.b-1", 7)
        assert [*tmp_path.iterdir()] == []
        assert epochs.is_over("a.b-1", 7)


def test_the_files_of_the_dead_go_and_those_of_the_living_stay(epochs: Epochs, tmp_path: Path) -> None:
    with Worker(epochs, "t", 2) as worker, Worker(epochs, "t", 1) as dead:
        dead.kill()
        dead.kill()
        (tmp_path / "nonsense").touch()
        (tmp_path / "t.x").touch()
        assert [*found(epochs)] == [("t", 1, 0), ("t", 2, worker.pids[0])], "no epoch comes again"
        assert [path.name for path in tmp_path.iterdir()] == ["t.2"]


def test_an_epoch_that_somebody_still_has_is_not_begun_again(epochs: Epochs) -> None:
    with Worker(epochs, "t", 1), pytest.raises(BlockingIOError):
        epochs.open("t", 1)


def test_a_pid_that_somebody_else_has_now_is_nobodys_worker(epochs: Epochs, tmp_path: Path) -> None:
    with Worker(epochs, "t", 1):
        note = {"pid": os.getpid(), "start": (kernel.start_time(os.getpid()) or 0) - 1}
        (tmp_path / "t.1").write_text(json.dumps(note))
        assert [*epochs.survivors()] == [Survivor("t", 1, os.getpid(), -1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.fixed_dictionaries({"pid": VALUES, "start": VALUES}).map(lambda note: json.dumps(note).encode()),
    )
)
def test_whatever_a_note_says_its_epoch_is_over_when_its_lock_is_free(tmp_path: Path, note: bytes) -> None:
    epochs = Epochs(tmp_path)
    fd = epochs.open("t", 1)
    (tmp_path / "t.1").write_bytes(note)
    for thread_id, epoch, _ in found(epochs):
        assert (thread_id, epoch) == ("t", 1)
    assert not epochs.is_over("t", 1)
    os.close(fd)
    assert [*epochs.survivors()] == [Survivor("t", 1, 0, -1)]
    assert [*epochs.survivors()] == []
