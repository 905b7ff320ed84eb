"""Sockets, locks and notes with and without somebody behind them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.common import kernel
from outlive.scripts.doctor import folders, runtime
from outlive.scripts.doctor.processes import Seen
from outlive.scripts.doctor.runtime import Answer, Door, Lock, Note, check_door, check_lock, knock

RUN = Path("/home/me/run")
STATES = ("absent", "stale", "listening", "full", "no socket", "unknown")
STATUS: dict[str, Any] = {
    "version": "1.0",
    "protocol": 1,
    "broker_pid": 7,
    "keeper_pid": 6,
    "transcript_mode": "spliced",
    "descriptors_left": 5000,
}


def process(pid: int, role: str = "broker", state: str = "S", started: int = 100) -> Seen:
    return Seen(pid, started, state, role, RUN, "", "?/?", "python -m outlive")


# Sockets.


@pytest.mark.parametrize(
    ("door", "holder", "severity"),
    [
        (Door("channel", RUN, "absent"), 0, "ok"),
        (Door("channel", RUN, "absent"), 7, "error"),
        (Door("channel", RUN, "stale"), 0, "note"),
        (Door("keeper", RUN, "stale"), 7, "warning"),
        (Door("channel", RUN, "no socket"), 0, "warning"),
        (Door("channel", RUN, "unknown", trouble="Permission denied"), 0, "warning"),
        (Door("channel", RUN, "full"), 7, "error"),
        (Door("channel", RUN, "listening", pid=7, user=1000), 7, "ok"),
        (Door("channel", RUN, "listening", pid=7, user=0), 7, "error"),
        (Door("control", RUN, "listening", mode=0o755, pid=7, user=1000), 7, "warning"),
        (Door("keeper", RUN, "listening"), 6, "ok"),
    ],
)
def test_each_state_of_a_socket_has_its_meaning(door: Door, holder: int, severity: str) -> None:
    assert check_door(door, 1000, holder).severity == severity


@given(st.sampled_from(STATES), st.sampled_from(["channel", "keeper"]), st.integers(0, 9), st.integers(-1, 2))
def test_whatever_is_wrong_with_a_socket_comes_with_what_to_do(
    state: str, name: str, holder: int, user: int
) -> None:
    found = check_door(Door(name, RUN, state, pid=holder, user=user), 1, holder)
    assert bool(found.advice) == (found.severity in ("warning", "error"))


def test_sockets_are_tried_out_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "channel"
    assert knock("channel", path).state == "absent"
    assert knock("channel", path / "under").state == "absent"
    path.write_text("")
    assert knock("channel", path).state == "no socket"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        assert knock("channel", path).state == "stale"  # nobody listens yet
        listener.listen(0)
        door = knock("channel", path)
        assert (door.state, door.pid, door.user) == ("listening", os.getpid(), os.getuid())
        for _ in range(10):  # those who hang up before they are accepted stay in the queue
            knock("channel", path)
        assert knock("channel", path).state == "full"
    assert knock("channel", path).state == "stale"


def test_a_keepers_socket_is_tried_out_without_sending(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120) / "keeper"  # longer than a socket's path may be
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
        folder = os.open(path.parent, os.O_PATH)
        listener.bind(f"/proc/self/fd/{folder}/keeper")
        os.close(folder)
        assert knock("keeper", path).state == "listening"
        with pytest.raises(BlockingIOError):
            listener.recv(1)
    assert knock("keeper", path).state == "stale"


# Locks.


@pytest.mark.parametrize(
    ("lock", "severity"),
    [
        (Lock("lock", RUN, False, 0), "ok"),
        (Lock("lock", RUN, True, 0), "ok"),
        (Lock("lock", RUN, True, -1), "note"),
        (Lock("lock", RUN, True, 7, "broker"), "ok"),
        (Lock("keeper.lock", RUN, True, 6, "broker.keeper"), "ok"),
        (Lock("lock", RUN, True, 9, "worker"), "error"),
        (Lock("lock", RUN, True, 9, "", "sleep 1000"), "error"),
    ],
)
def test_a_lock_in_the_wrong_hands_is_an_error(lock: Lock, severity: str) -> None:
    found = check_lock(lock)
    assert found.severity == severity
    assert bool(found.advice) == (severity == "error")


def look(path: Path, role: str = "") -> Lock:
    """Look at a lock, taking us for a process with this role."""
    us = [process(os.getpid(), role)]
    return runtime.look_at_lock(path.name, path, us, runtime.lockers(us, [path]))


def test_a_lock_is_looked_up_and_not_taken(tmp_path: Path) -> None:
    path, us = tmp_path / "lock", [process(os.getpid())]
    assert not look(path).exists
    with path.open("w") as file:
        assert look(path).holder == 0  # open, not locked
        fcntl.flock(file, fcntl.LOCK_EX)
        assert (look(path, "broker").holder, look(path, "broker").role) == (os.getpid(), "broker")
        path.unlink()
        path.write_text("")
        assert look(path).holder == 0
        assert list(runtime.removed(runtime.lockers(us, [path]), path)) == [os.getpid()]
    assert runtime.lockers(us, [path]) == {}


def test_a_lock_that_was_passed_on_belongs_to_whoever_has_it_now(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    # A child takes the lock on our open file and dies, as a broker does that handed its lock over.
    script = "import fcntl, sys; fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX)"
    subprocess.run([sys.executable, "-I", "-S", "-c", script, str(fd)], pass_fds=[fd], check=True)
    assert (look(path, "broker").holder, look(path, "broker").role) == (os.getpid(), "broker")
    os.close(fd)
    assert look(path).holder == 0


def test_a_lock_of_somebody_hidden_is_not_called_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = path.stat()
        listed = runtime.lists_lock(Path("/proc/locks").read_text(), found.st_dev, found.st_ino)
        # Some file systems show another device in /proc/locks than in `stat`: there nobody can tell.
        assert runtime.look_at_lock("lock", path, [], {}).holder == (-1 if listed else 0)


def test_of_several_who_have_a_lock_the_one_whose_it_is_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("")
    there = [process(5, ""), process(6, "broker.keeper"), process(7, "broker")]
    lock = runtime.look_at_lock("lock", path, there, {str(path.resolve()): [5, 6, 7]})
    assert (lock.holder, lock.role) == (7, "broker")


def test_locks_are_read_from_the_kernels_lists() -> None:
    text = (
        "1: FLOCK  ADVISORY  WRITE 4711 00:1a:123456 0 EOF\n"
        "2: POSIX  ADVISORY  READ 4713 08:01:99 0 EOF\n"
        "3: FLOCK  nonsense\n\n"
    )
    assert runtime.lists_lock(text, os.makedev(0, 0x1A), 123456)
    assert not runtime.lists_lock(text, os.makedev(8, 1), 99)
    assert not runtime.lists_lock(text, os.makedev(0, 0x1A), 12345)
    assert runtime.is_locked("pos:\t0\nflags:\t02\nlock:\t1: FLOCK  ADVISORY  WRITE 7 00:1a:1 0 EOF\n")
    assert not runtime.is_locked("pos:\t0\nflags:\t02\nlock:\t1: POSIX  ADVISORY  WRITE 7 00:1a:1 0 EOF\n")


@given(st.text())
def test_any_list_of_locks_is_survived(text: str) -> None:
    runtime.is_locked(text)
    runtime.lists_lock(text, 1, 1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP, errno.EIO])
def test_a_folder_that_we_may_not_enter_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "lstat", refuse)
    assert runtime.look_at_lock("lock", tmp_path / "lock", [], {}).holder == -1
    assert knock("channel", tmp_path / "channel").state == "unknown"
    assert folders.check_folder("f", folders.look(tmp_path, {})).severity == "error"


# The broker.


def severities(answer: Answer) -> dict[str, str]:
    return {found.check: found.severity for found in runtime.check_broker(answer, "1.0", 1, RUN)}


def test_a_broker_that_answers_and_is_what_is_installed_is_fine() -> None:
    assert set(severities(Answer(7, status=STATUS)).values()) == {"ok"}
    assert severities(Answer()) == {"broker": "ok"}


@pytest.mark.parametrize("wrong", [{"stopped": True}, {"silent": True}, {"trouble": "refused"}])
def test_a_broker_that_does_not_answer_is_an_error(wrong: dict[str, Any]) -> None:
    (found,) = runtime.check_broker(replace(Answer(7), **wrong), "1.0", 1, RUN)
    assert (found.severity, found.pids) == ("error", (7,))
    assert found.advice


@pytest.mark.parametrize(
    ("change", "check", "severity"),
    [
        ({"version": "0.9"}, "version", "warning"),
        ({"protocol": 2}, "version", "warning"),
        ({"transcript_mode": "copied"}, "transcript mode", "warning"),
        ({"keeper_pid": None}, "keeper", "warning"),
        ({"keeper_version": "0.9"}, "keeper", "warning"),
        ({"upgrade_failed": "it died"}, "upgrade", "warning"),
        ({"descriptors_left": 50}, "descriptors of the broker", "warning"),
        ({"descriptors_left": -1}, "descriptors of the broker", "error"),
    ],
)
def test_what_a_status_has_to_complain_about_is_told(change: dict[str, Any], check: str, severity: str) -> None:
    found = severities(Answer(7, status={**STATUS, **change}))
    assert found.pop(check) == severity
    assert set(found.values()) == {"ok"}


def test_a_status_of_another_version_that_says_less_is_survived() -> None:
    assert severities(Answer(7, status={}))["broker"] == "ok"


def test_a_broker_that_is_stopped_or_whose_queue_is_full_is_not_asked(tmp_path: Path) -> None:
    from outlive.common.paths import Paths

    paths = Paths.from_environment({"OUTLIVE_HOME": str(tmp_path)})
    door = Door("channel", paths.channel, "listening", pid=7)
    assert runtime.ask(paths, 7, door, [process(7, state="T")], ended=False) == Answer(7, stopped=True)
    assert runtime.ask(paths, 7, replace(door, state="full"), [process(7)], ended=False) == Answer(7, silent=True)
    assert runtime.ask(paths, 0, replace(door, state="absent"), [], ended=True) == Answer()
    assert runtime.ask(paths, 7, replace(door, state="stale"), [process(7)], ended=True) == Answer()


def test_a_broker_whose_folder_was_removed_is_an_error_and_one_that_starts_a_note() -> None:
    there = [process(7), process(8), process(9, "worker"), replace(process(10), run=Path("/other"))]
    lost, starting = runtime.check_brokers([*there, process(11)], RUN, {7}, {8})
    assert (lost.severity, lost.pids) == ("error", (8,))
    assert (starting.severity, starting.pids) == ("note", (11,))
    assert list(runtime.check_brokers(there[:1], RUN, {7}, ())) == []


def test_a_keeper_that_is_stopped_or_has_no_lock_is_told() -> None:
    there = [process(5, "broker.keeper"), process(6, "broker.keeper"), process(7, "broker.keeper", "T"), process(8)]
    other, stopped = runtime.check_keepers(there, RUN, 5)
    assert (other.severity, other.pids) == ("note", (6,))
    assert (stopped.severity, stopped.pids) == ("warning", (7,))


# Workers.


def test_workers_that_are_dead_stopped_old_or_alone_are_told() -> None:
    notes = [Note("a", 1, True), Note("b", 2, True), Note("c", 3, False)]
    there = [process(1, "worker", "T", 50), process(2, "worker", "S", 150)]
    found = list(runtime.check_workers(notes, there, 100.0, 0))
    assert [(one.severity, one.pids) for one in found] == [
        ("note", ()),
        ("warning", (1,)),
        ("note", (1,)),
        ("warning", (1, 2)),
    ]
    (fine,) = runtime.check_workers(notes[:2], there[1:], None, 7)
    assert fine.severity == "ok"


def test_notes_are_read_as_they_are(tmp_path: Path) -> None:
    assert runtime.read_notes(tmp_path / "missing", {}) == []
    us = {"pid": os.getpid(), "start": kernel.start_time(os.getpid())}
    (tmp_path / "a.1").write_text(json.dumps(us))
    (tmp_path / "b.1").write_text(json.dumps({**us, "start": 1}))
    for name, text in (("c", "nonsense"), ("d", "[1]"), ("e", '{"pid": null, "start": 1}'), ("f", "[" * 9999)):
        (tmp_path / name).write_text(text)
    notes = runtime.read_notes(tmp_path, {str(tmp_path.resolve() / "c"): [1]})
    assert [note.name for note in notes if note.alive] == ["a.1"]
    assert [note.name for note in notes if note.locked] == ["c"]
    assert len(notes) == 6


def test_a_note_that_somebody_has_locked_is_not_stale() -> None:
    (found,) = runtime.check_workers([Note("a.1", 0, False, locked=True)], [], None, 7)
    assert found.severity == "ok"


def test_the_installation_is_older_than_this_test() -> None:
    installed, started = runtime.installed_at(), kernel.start_time(os.getpid())
    assert installed is not None
    assert started is not None
    assert installed < started
