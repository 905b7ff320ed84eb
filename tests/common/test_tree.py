"""A tree is found by mark, session and parent links; nothing else is ever signalled."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psutil
import pytest

from outlive.common import kernel, launch, tree
from outlive.common.descriptors import Handles

from .conftest import PYTHON, Children, await_end, eventually

# Forks twice into a session of its own, and writes the daemon's pid.
DAEMON = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        path = sys.argv[1]
        with open(path + '~', 'w') as file: file.write(str(os.getpid()))
        os.rename(path + '~', path)
        os.execv('/bin/sleep', ['sleep', '1000'])
    os._exit(0)
os.wait()
"""


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark, of which nothing is left afterwards."""
    mark = secrets.token_hex(16)
    yield mark
    fell(mark, Handles())


def fell(mark: str, handles: Handles) -> None:
    """Kill one tree."""

    async def act() -> None:
        await tree.Feller().fell(mark, handles)

    asyncio.run(act())


def pid_in(path: Path) -> int:
    return int(eventually(lambda: path.exists() and path.read_text()) or 0)


def pids(root: tree.Root) -> set[int]:
    (found,) = tree.members(root)
    return {process.pid for process in found}


def pid_of(handles: Handles) -> int:
    pid = kernel.pidfd_pid(handles.pidfd)
    assert pid is not None
    return pid


def test_a_daemon_of_its_own_session_is_found_by_its_mark_after_all_parents_are_gone(
    children: Children, mark: str, tmp_path: Path
) -> None:
    handles = children.start(*PYTHON, DAEMON, str(tmp_path / "pid"), tty=False, mark=mark)
    daemon = pid_in(tmp_path / "pid")
    await_end(handles.pidfd)
    assert pids(tree.root(mark, handles.pidfd)) == {daemon}
    fell(mark, handles)
    eventually(lambda: not psutil.pid_exists(daemon) or psutil.Process(daemon).status() == psutil.STATUS_ZOMBIE)


def test_a_changed_environment_does_not_hide_a_process(children: Children, mark: str) -> None:
    line = "env -i /bin/sleep 1000 & setsid env -i /bin/sleep 1000 & wait"
    handles = children.start("/bin/sh", "-c", line, tty=False, mark=mark)
    leader = psutil.Process(pid_of(handles))
    eventually(lambda: [child.name() for child in leader.children()] == ["sleep", "sleep"])
    found = leader.children()
    assert pids(tree.root(mark, handles.pidfd)) == {leader.pid, *(child.pid for child in found)}
    fell(mark, handles)
    await_end(handles.pidfd)
    assert psutil.wait_procs(found, timeout=60)[1] == []


def test_two_trees_are_not_mixed_up(children: Children, mark: str) -> None:
    other = secrets.token_hex(16)
    first = children.start("/bin/sleep", "1000", tty=False, mark=mark)
    second = children.start("/bin/sleep", "1000", tty=False, mark=other)
    eventually(lambda: pids(tree.root(mark, first.pidfd)) == {pid_of(first)})
    fell(mark, first)
    await_end(first.pidfd)
    assert not kernel.is_dead(pid_of(second), kernel.start_time(pid_of(second)) or 0)


def test_trees_are_ended_together_and_each_whole(children: Children, mark: str) -> None:
    marks = [mark, secrets.token_hex(16), secrets.token_hex(16)]
    line = "sleep 1000 & setsid sleep 1000 & wait"
    started = [children.start("/bin/sh", "-c", line, tty=False, mark=one) for one in marks]
    roots = [tree.root(one, handles.pidfd) for one, handles in zip(marks, started, strict=True)]
    spared = children.start("/bin/sleep", "1000", tty=False, mark=secrets.token_hex(16))
    eventually(lambda: [len(found) for found in tree.members(*roots)] == [3, 3, 3])

    async def act() -> None:
        feller = tree.Feller()
        await asyncio.gather(*(feller.fell(one, handles) for one, handles in zip(marks, started, strict=True)))

    asyncio.run(act())
    assert tree.members(*roots) == [[], [], []]
    assert not kernel.is_dead(pid_of(spared), kernel.start_time(pid_of(spared)) or 0)


def test_a_signal_reaches_every_process_and_they_are_counted(children: Children, mark: str) -> None:
    handles = children.start("/bin/sh", "-c", "sleep 1000 & sleep 1000 & wait", tty=False, mark=mark)
    root = tree.root(mark, handles.pidfd)
    eventually(lambda: len(pids(root)) == 3)
    assert tree.send(signal.SIGTERM, root) == [3]
    await_end(handles.pidfd)


def test_our_own_runtime_and_its_children_are_spared(children: Children, mark: str) -> None:
    """An agent's command may have started a broker, whose own processes have marks of their own."""
    role = launch.ROLE.decode()
    line = f"{role}=broker setsid env -u OUTLIVE_MARK sh -c 'env -u {role} sleep 1000 & wait' & wait"
    handles = children.start("/bin/sh", "-c", line, tty=False, mark=mark)
    leader = psutil.Process(pid_of(handles))

    def runtime() -> list[psutil.Process]:
        return [child for child in leader.children(recursive=True) if child.name() in ("sh", "sleep")]

    eventually(lambda: {child.name() for child in runtime()} == {"sh", "sleep"})
    spared = runtime()
    try:
        eventually(lambda: pids(tree.root(mark, handles.pidfd)) == {leader.pid})
        fell(mark, handles)
        await_end(handles.pidfd)
        assert all(process.is_running() for process in spared)
    finally:
        for process in spared:
            process.kill()


def test_a_command_that_calls_itself_our_own_runtime_is_not_spared(children: Children, mark: str) -> None:
    handles = children.start(
        "/usr/bin/env", f"{launch.ROLE.decode()}=x", "/bin/sleep", "1000", tty=False, mark=mark
    )
    eventually(lambda: psutil.Process(pid_of(handles)).name() == "sleep")
    assert pids(tree.root(mark, handles.pidfd)) == {pid_of(handles)}


def test_a_reaped_leaders_pid_is_nobodys(children: Children, mark: str) -> None:
    handles = children.start("/bin/true", tty=False, mark=mark)
    pid = pid_of(handles)
    assert tree.root(mark, handles.pidfd).leader == pid
    await_end(handles.pidfd)
    os.waitpid(pid, 0)
    assert tree.root(mark, handles.pidfd).leader is None
    assert tree.root(mark, -1).leader is None


def test_a_recycled_pid_is_not_signalled(children: Children) -> None:
    handles = children.start("/bin/sleep", "1000", tty=False)
    found = psutil.Process(pid_of(handles))
    # As if it had been found when the pid was somebody else's.
    found._create_time = 1.0  # type: ignore[attr-defined]
    found._ident = (found.pid, 1.0)  # type: ignore[attr-defined]
    assert not tree._signal(found, signal.SIGKILL)
    assert not kernel.is_dead(found.pid, kernel.start_time(found.pid) or 0)
    assert tree._signal(psutil.Process(found.pid), signal.SIGKILL)
    await_end(handles.pidfd)


def test_who_was_given_a_pid_since_the_last_search_is_found_by_the_next(children: Children, mark: str) -> None:
    handles = children.start("/bin/sleep", "1000", tty=False, mark=mark)
    start = tree.root(mark, handles.pidfd)
    eventually(lambda: pids(start) == {pid_of(handles)})
    # As if the pid had been somebody else's when all processes were last listed.
    (former,) = (process for process in psutil.process_iter() if process.pid == pid_of(handles))
    former._create_time = 1.0  # type: ignore[attr-defined]
    former._ident = (former.pid, 1.0)  # type: ignore[attr-defined]
    assert pids(start) == {pid_of(handles)}


async def test_whoever_asks_for_the_same_tree_waits_until_it_is_felled(
    children: Children, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = children.start("/bin/sleep", "1000", tty=False, mark=mark)
    start = tree.root(mark, handles.pidfd)
    feller = tree.Feller()
    signalled, left = count(), []
    kill = tree._signal

    def in_uninterruptible_sleep(process: psutil.Process, number: int) -> bool:
        return next(signalled) < 3 or kill(process, number)

    async def ask() -> None:
        await feller.fell(mark, handles)
        left.append(pids(start))

    monkeypatch.setattr(tree, "_signal", in_uninterruptible_sleep)
    await asyncio.gather(ask(), ask())
    assert left == [set(), set()]


async def test_a_tree_is_felled_though_who_asked_was_cancelled(children: Children, mark: str) -> None:
    handles = children.start("/bin/sleep", "1000", tty=False, mark=mark)
    feller = tree.Feller()
    first = asyncio.create_task(feller.fell(mark, handles))
    second = asyncio.create_task(feller.fell(mark, handles))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()
    assert pids(tree.root(mark, handles.pidfd)) == set()


async def test_after_a_search_that_failed_the_next_is_made(
    children: Children, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = children.start("/bin/sleep", "1000", tty=False, mark=mark)
    feller = tree.Feller()
    with monkeypatch.context() as broken:
        broken.setattr(kernel, "pidfd_pid", lambda pidfd: open("/no/such/file"))  # noqa: SIM115
        with pytest.raises(FileNotFoundError):
            await feller.fell(mark, handles)
    await feller.fell(mark, handles)
    assert pids(tree.root(mark, handles.pidfd)) == set()
