"""Processes of our own: they inherit what they are given, and nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from outlive.common import launch

from .conftest import eventually, in_a_child

# Says what it inherited, on the first descriptor that it was given.
TELL = """
import json, os, resource, signal, sys
fds = {int(name): os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
       if os.path.exists(f"/proc/self/fd/{name}")}
with open(f"/proc/self/status") as file:
    status = dict(line.rstrip("\\n").split(":\\t", 1) for line in file if ":\\t" in line)
os.write(int(sys.argv[1]), json.dumps({
    "fds": fds, "environment": dict(os.environ), "sid": os.getsid(0), "pid": os.getpid(),
    "arguments": sys.argv[1:], "blocked": int(status["SigBlk"], 16), "ignored": int(status["SigIgn"], 16),
    "path": sys.path,
}).encode())
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that any Python started from here finds."""
    (tmp_path / "tell_tale.py").write_text(TELL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def told(pipe: tuple[int, int], fds: list[int], **options: Any) -> dict[str, Any]:
    """Launch, and return what the new process said on `pipe`, which must be the first of `fds`."""
    pid = launch.launch("tell_tale", [str(launch.FIRST_FD), "x y"], fds=fds, **options)
    found: dict[str, Any] = json.loads(os.read(pipe[0], 65536))
    os.waitpid(pid, 0)
    found["fds"] = {int(fd): file for fd, file in found["fds"].items()}
    return found


def test_it_has_the_descriptors_it_was_given_and_no_other(pipe: tuple[int, int], tmp_path: Path) -> None:
    stray = os.open(tmp_path / "lock", os.O_CREAT)
    os.set_inheritable(stray, True)  # a shell's `9>lock`
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    given = os.open(tmp_path, os.O_RDONLY)
    found = told(pipe, [pipe[1], given], log=log)
    null = os.devnull
    pipe_file = os.readlink(f"/proc/self/fd/{pipe[1]}")
    assert found["fds"] == {0: null, 1: null, 2: f"{tmp_path}/log", 3: pipe_file, 4: str(tmp_path)}
    os.fstat(stray)
    for fd in (stray, log, given):
        os.close(fd)


def test_given_descriptors_may_have_any_numbers(pipe: tuple[int, int], tmp_path: Path) -> None:
    files, pipe_file = [], os.readlink(f"/proc/self/fd/{pipe[1]}")

    def act() -> None:
        # Each number is one that another of them has to go to, or by way of.
        fds = [os.dup2(pipe[1], 80)]
        for number in (3, 71, 5, 70, 4, 8, 7, 9):
            path = tmp_path / str(number)
            files.append(str(path))
            opened = os.open(path, os.O_CREAT)
            fds.append(opened if opened == number else os.dup2(opened, number))
        mine = (os.dup2(pipe[0], 90), -1)
        found = told(mine, fds)["fds"]
        assert [found[launch.FIRST_FD + at] for at in range(9)] == [pipe_file, *files]
        assert len(found) == 3 + 9

    in_a_child(act)


def test_it_carries_none_of_our_marks_and_leads_a_session(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (launch.THREAD, launch.PROCESS, launch.MARK):
        monkeypatch.setenv(name.decode(), "of a child")
    monkeypatch.setenv(launch.ROLE.decode(), "somebody else's")
    monkeypatch.setenv("KEPT", "yes")
    found = told(pipe, [pipe[1]])
    names = {name for name in found["environment"] if name.startswith("OUTLIVE_")}
    assert launch.ROLE.decode() in names
    assert found["environment"][launch.ROLE.decode()] != "somebody else's"
    assert not names & {name.decode() for name in (launch.THREAD, launch.PROCESS, launch.MARK)}
    assert found["environment"]["KEPT"] == "yes"
    assert found["sid"] == found["pid"]
    assert found["arguments"] == ["3", "x y"]


def test_it_has_signals_as_a_new_process_has(pipe: tuple[int, int]) -> None:
    def act() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        found = told(pipe, [pipe[1]])
        assert found["blocked"] == 0
        ignored = {number for number in signal.valid_signals() if found["ignored"] >> (number - 1) & 1}
        assert ignored <= {signal.SIGPIPE, signal.SIGXFSZ}  # Python's own doing

    in_a_child(act)


def test_a_module_in_the_callers_directory_does_not_shadow_ours(
    pipe: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(folder)
    found = told(pipe, [pipe[1]])
    assert str(folder) not in found["path"]
    assert "" not in found["path"]


def test_a_forsaken_one_is_nobodys_child(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    pid = launch.launch("tell_tale", [str(launch.FIRST_FD)], fds=[write_end], forsaken=True)
    os.close(write_end)
    assert os.waitpid(pid, 0) == (pid, 0)
    with open(read_end, "rb") as pipe:
        found = json.loads(pipe.read())
    assert found["pid"] != pid
    with pytest.raises(ChildProcessError):
        os.waitpid(found["pid"], 0)
    eventually(lambda: not os.path.exists(f"/proc/{found['pid']}"))


# Limits.


def test_limits_are_raised_and_given_back_as_they_were() -> None:
    def act() -> None:
        os.environb.pop(launch.LIMITS, None)
        soft = {resource.RLIMIT_NOFILE: 100, resource.RLIMIT_FSIZE: 1 << 20}
        for limit, value in soft.items():
            resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        launch.raise_limits()
        for limit in soft:
            now, hard = resource.getrlimit(limit)
            assert now == hard
        assert launch.descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        launch.raise_limits()  # as a worker does that a broker has started
        assert {limit: before for limit, (before, _) in launch.original_limits().items()} == soft
        launch.restore_limits(launch.raised_limits())
        assert {limit: resource.getrlimit(limit)[0] for limit in soft} == soft

    in_a_child(act)


def test_unlimited_stays_unlimited() -> None:
    def act() -> None:
        os.environb.pop(launch.LIMITS, None)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        launch.raise_limits()
        launch.restore_limits(launch.raised_limits())
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == before

    in_a_child(act)


def test_this_python_is_the_one_that_is_started(pipe: tuple[int, int]) -> None:
    assert os.path.dirname(os.path.dirname(sys.executable)) in " ".join(told(pipe, [pipe[1]])["path"])
