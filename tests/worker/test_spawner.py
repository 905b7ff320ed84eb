"""What a child gets and does not get, how its end is known, and what a command that cannot run costs."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from outlive.common import kernel, launch, notify
from outlive.common.errors import SpawnError
from outlive.common.outcome import Outcome
from outlive.common.transcript import Gap, Transcript

from .conftest import close_nursery, readable


def text(held: Any) -> bytes:
    parts = held.transcript.read(0, held.transcript.written)
    return b"".join(part[1] for part in parts if not isinstance(part, Gap)).replace(b"\r\n", b"\n")


both = pytest.mark.parametrize("tty", [True, False], ids=["pty", "pipe"])


def test_the_spawner_loads_nothing_that_only_makes_its_forks_dearer() -> None:
    code = "import sys, outlive.worker.spawner; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"asyncio", "dataclasses", "inspect", "msgspec", "pathlib", "psutil", "urllib", "zmq"}
    assert not heavy & set(loaded.split())


@both
async def test_what_a_child_prints_is_in_its_transcript(family: Any, tty: bool) -> None:
    one = await family.run(b"/bin/echo", b"one", tty=tty)
    two = await family.run(b"/bin/sh", b"-c", b"echo out; echo err >&2", tty=tty)
    assert (text(one), text(two)) == (b"one\n", b"out\nerr\n")


@both
@pytest.mark.parametrize("code", [0, 1, 126, 255])
async def test_an_exit_code_is_recorded(family: Any, tty: bool, code: int) -> None:
    held = await family.run(b"/bin/sh", b"-c", b"exit %d" % code, tty=tty)
    assert held.transcript.live().outcome == Outcome("exited", code=code)


@both
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGPIPE, signal.SIGXFSZ])
async def test_a_signal_is_recorded(family: Any, tty: bool, number: int) -> None:
    held = await family.run(b"/bin/sh", b"-c", b"ulimit -c 0; kill -%d $$" % number, tty=tty)
    assert held.transcript.live().outcome == Outcome("signaled", signal=number)


@both
async def test_a_child_has_its_pid_and_its_mark_in_the_header_before_it_runs(family: Any, tty: bool) -> None:
    held = await family.run(b"/bin/sh", b"-c", b"echo $$", tty=tty)
    live = held.transcript.live()
    assert live.started
    assert text(held) == b"%d\n" % live.pid


@both
async def test_children_inherit_no_descriptor(family: Any, tty: bool) -> None:
    # With others alive and descriptors of ours that could go along.
    await family.start(b"/bin/sleep", b"1000", tty=True)
    await family.start(b"/bin/sleep", b"1000", tty=False)
    with socket.socket() as ours:
        ours.set_inheritable(True)
        held = await family.run(b"/bin/sh", b"-c", b"exec ls /proc/self/fd", tty=tty)
    assert text(held).split() == [b"0", b"1", b"2", b"3"]  # 3: the folder that ls reads


@both
async def test_children_have_default_signals_and_an_empty_mask(family: Any, tty: bool) -> None:
    held = await family.run(b"/bin/cat", b"/proc/self/status", tty=tty)
    fields = dict(line.split(b":\t", 1) for line in text(held).splitlines() if b":\t" in line)
    # glibc keeps 32 and 33 for itself, and ignores them in whatever posix_spawn starts, such as our spawner.
    own = 1 << 31 | 1 << 32
    assert [int(fields[name], 16) & ~own for name in (b"SigBlk", b"SigIgn", b"SigCgt")] == [0, 0, 0]


@both
async def test_children_lead_a_session_of_their_own(family: Any, tty: bool) -> None:
    held = await family.run(b"/bin/cat", b"/proc/self/stat", tty=tty)
    fields = text(held).rpartition(b") ")[2].split()
    pid = held.transcript.live().pid
    group, session, terminal = (int(field) for field in fields[2:5])
    assert (group, session) == (pid, pid)
    assert (terminal != 0) == tty


async def test_without_a_terminal_standard_input_is_empty(family: Any) -> None:
    held = await family.run(b"/bin/sh", b"-c", b"cat; readlink /proc/self/fd/0")
    assert text(held) == b"/dev/null\n"


async def test_the_terminal_has_its_size_before_the_program_runs(family: Any) -> None:
    held = await family.run(b"/bin/stty", b"size", tty=True, columns=132, rows=43)
    assert text(held) == b"43 132\n"


async def test_a_terminal_echoes_as_terminals_do(family: Any) -> None:
    held = await family.start(b"/bin/cat", tty=True)
    await held.type(b"hello\n", float("inf"))
    await family.until(held, b"hello\r\nhello\r\n")


@both
async def test_children_get_exactly_the_environment_of_the_order(family: Any, tty: bool) -> None:
    environment = {b"PATH": os.environb[b"PATH"], b"A": b"1\n2", b"NO\xffTEXT": b"\xfe\x80", b"EMPTY": b""}
    held = await family.run(b"env", b"-0", environment=environment, tty=tty)
    found = dict(line.split(b"=", 1) for line in text(held).split(b"\0") if line)
    assert found == environment


@both
async def test_an_environment_of_more_than_200_kilobytes_arrives(family: Any, tty: bool) -> None:
    environment = {b"V%d" % number: b"x" * 1000 for number in range(300)}
    script = b'test "$V0$V299" = "$1" && env | wc -c'
    argv = (b"/bin/sh", b"-c", script, b"sh", b"x" * 2000)
    held = await family.run(*argv, environment=environment | {b"PATH": os.environb[b"PATH"]}, tty=tty)
    assert int(text(held)) > 300_000


@both
async def test_words_and_directory_that_are_not_utf_8_arrive(family: Any, tty: bool, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/f\xff\xfe"
    os.mkdir(folder)
    script = b'pwd; printf %s "$1"'
    held = await family.run(b"/bin/sh", b"-c", script, b"sh", b"w\xff\x80", cwd=folder, tty=tty)
    assert text(held) == folder + b"\nw\xff\x80"


@both
async def test_the_first_word_is_handed_on_as_it_was_given(family: Any, tty: bool) -> None:
    held = await family.run(b"sh", b"-c", b"tr '\\0' ' ' </proc/$$/cmdline", tty=tty)
    assert text(held).startswith(b"sh -c ")


@both
async def test_a_program_is_searched_on_the_childs_path_and_in_the_childs_directory(
    family: Any, tty: bool, tmp_path: Path
) -> None:
    for folder in ("bin", "work"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "only-here"
        program.write_text(f"#!/bin/sh\necho {folder}\n")
        program.chmod(0o755)
    cwd = os.fsencode(tmp_path / "work")
    path = {b"PATH": os.fsencode(tmp_path / "bin")}
    assert text(await family.run(b"only-here", environment=path, cwd=cwd, tty=tty)) == b"bin\n"
    assert text(await family.run(b"./only-here", environment={}, cwd=cwd, tty=tty)) == b"work\n"
    assert text(await family.run(b"../bin/only-here", environment={}, cwd=cwd, tty=tty)) == b"bin\n"
    with pytest.raises(SpawnError) as caught:
        await family.start(b"only-here", environment={b"PATH": b"/nowhere"}, cwd=cwd, tty=tty)
    assert caught.value.stage == "exec"


@both
async def test_limits_are_those_from_before_we_raised_them(
    family: Any, tty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fsize = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    wanted = min(soft, hard) - 100
    monkeypatch.setenv(launch.LIMITS.decode(), f"{wanted},{fsize}")
    held = await family.run(b"/bin/sh", b"-c", b"ulimit -Sn; ulimit -Hn", tty=tty)
    assert text(held).split() == [b"%d" % wanted, b"%d" % hard if hard >= 0 else b"unlimited"]


def script(path: Path, first_line: str, mode: int = 0o755) -> bytes:
    path.write_text(first_line + "\n")
    path.chmod(mode)
    return os.fsencode(path)


async def settled(family: Any) -> None:
    """Wait until the spawner has no child, not even a dead one, and no descriptors but its own five."""
    (pid,) = family.nursery.pids
    children = Path(f"/proc/{pid}/task/{pid}/children")
    async with asyncio.timeout(60):
        while await asyncio.to_thread(children.read_text) or len(os.listdir(f"/proc/{pid}/fd")) > 5:
            await asyncio.sleep(0.001)


@both
@pytest.mark.parametrize(
    ("what", "stage", "reason"),
    [
        ("directory", "directory", "No such file or directory"),
        ("directory of no text", "directory", "No such file or directory"),
        ("endless directory", "directory", "File name too long"),
        ("file as directory", "directory", "Not a directory"),
        ("missing", "exec", "No such file or directory"),
        ("missing of no text", "exec", "No such file or directory"),
        ("endless name", "exec", "File name too long"),
        ("missing path", "exec", "No such file or directory"),
        ("not executable", "exec", "Permission denied"),
        ("folder", "exec", "Permission denied"),
        ("bad interpreter", "exec", "No such file or directory"),
        ("no format", "exec", "Exec format error"),
        ("endless word", "exec", "Argument list too long"),
    ],
)
async def test_a_command_that_cannot_run_is_an_error_that_names_the_stage_and_leaves_nothing(
    family: Any, tmp_path: Path, tty: bool, what: str, stage: str, reason: str
) -> None:
    await family.run(b"/bin/true", tty=tty)
    argv: tuple[bytes, ...] = (b"/bin/true",)
    cwd = b"/"
    if what == "directory":
        cwd = b"/nowhere"
    elif what == "directory of no text":
        cwd = b"/nowhere/\xff\xfe"
    elif what == "endless directory":
        cwd = b"/" + b"d" * 100_000
    elif what == "file as directory":
        cwd = b"/etc/passwd"
    elif what == "missing":
        argv = (b"no-such-program",)
    elif what == "missing of no text":
        argv = (b"no-such-\xff",)
    elif what == "endless name":
        argv = (b"/" + b"n" * 100_000,)
    elif what == "missing path":
        argv = (b"/no/such/program",)
    elif what == "not executable":
        argv = (script(tmp_path / "x", "#!/bin/sh", mode=0o644),)
    elif what == "folder":
        argv = (b"/etc",)
    elif what == "bad interpreter":
        argv = (script(tmp_path / "x", "#!/no/such/interpreter"),)
    elif what == "no format":
        argv = (script(tmp_path / "x", "no program"),)
    elif what == "endless word":
        argv = (b"/bin/true", b"w" * 200_000)
    for _ in range(2):
        with pytest.raises(SpawnError, match=reason) as caught:
            await family.start(*argv, cwd=cwd, tty=tty)
        assert caught.value.stage == stage
        assert len(str(caught.value)) < 1000
    await settled(family)
    assert text(await family.run(b"/bin/echo", b"next", tty=tty)) == b"next\n"
    assert len(family.nursery.pids) == 1, "a child that failed must not go on as a second spawner"


async def test_a_command_line_too_long_for_a_header_is_refused_and_the_spawner_lives(family: Any) -> None:
    await family.run(b"/bin/true")
    before = family.nursery.pids
    with pytest.raises(SpawnError, match="at most"):
        await family.start(b"/bin/true", *[b"w" * 100_000] * 25)
    await family.run(b"/bin/true")
    assert family.nursery.pids == before


@both
async def test_fifty_ends_leave_no_zombie_and_no_descriptor(family: Any, tty: bool) -> None:
    await family.run(b"/bin/true", tty=tty)
    for _ in range(50):
        await family.run(b"/bin/true", tty=tty)
        family.helds.pop().close()
    await settled(family)


async def test_a_start_that_fails_once_the_worker_is_gone_costs_the_log_no_traceback(family: Any) -> None:
    await family.run(b"/bin/true")
    (pid,) = family.nursery.pids
    os.kill(pid, signal.SIGSTOP)
    start = asyncio.create_task(family.start(b"/bin/true", cwd=b"/nowhere"))
    while not any(spawner.starts for spawner in family.nursery._spawners):
        await asyncio.sleep(0)
    closing = asyncio.create_task(close_nursery(family.nursery))
    await asyncio.wait({start})
    os.kill(pid, signal.SIGCONT)
    await closing
    assert isinstance(start.exception(), SpawnError)  # of the log, see `family`


async def test_the_spawner_is_not_disturbed_by_keys_and_leads_its_own_session(family: Any) -> None:
    await family.run(b"/bin/true")
    (pid,) = family.nursery.pids
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid, number)
    await family.run(b"/bin/true")
    assert family.nursery.pids == [pid]
    assert os.getsid(pid) == pid


async def test_a_transcript_is_private_and_never_executable(family: Any) -> None:
    held = await family.run(b"/bin/true")
    found = os.fstat(held.transcript.fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert kernel.is_sealed_memfd(held.transcript.fd)
    assert Transcript(held.transcript.fd).facts == held.transcript.facts


# A spawner whose child says its pid and waits before it says that it runs: `FIRST SECOND NOTE TTY`, two named
# pipes, and the file that the command makes.
HALFWAY = """
import os, sys
from outlive.common.transcript import Facts, Lease, Transcript
from outlive.worker import spawner

first, second, note, tty = sys.argv[1:]

class Waiting(dict):
    def items(self):
        with open(first, "w") as file:
            file.write(str(os.getpid()))
        open(second).read()
        return ()

argv = (b"/usr/bin/env", b"touch", os.fsencode(note))
facts = Facts("t", "1000", "c", "m", argv, b"/", bool(tty), 80, 24, 0, "b")
transcript = Transcript.create(facts, Lease(1, 1, 1))
command = spawner._Command(argv, dict(os.environb), transcript, Waiting(), os.getpid())
spawner._fork_on_terminal(command, (24, 80)) if tty else spawner._fork_on_pipe(command, 2)
"""


@both
async def test_a_child_that_has_not_said_that_it_runs_dies_with_its_spawner(tmp_path: Path, tty: bool) -> None:
    first, second, note = tmp_path / "first", tmp_path / "second", tmp_path / "note"
    os.mkfifo(first)
    os.mkfifo(second)
    arguments = [str(first), str(second), str(note), "yes" if tty else ""]
    spawner = await asyncio.create_subprocess_exec(sys.executable, "-c", HALFWAY, *arguments)
    child = os.pidfd_open(int(await asyncio.to_thread(first.read_text)))
    spawner.kill()
    await spawner.wait()
    go = os.open(second, os.O_RDWR)  # it may be gone, and nobody would open the other end
    os.write(go, b"go")
    os.close(go)
    await readable(child)
    os.close(child)
    assert not note.exists()


async def test_a_start_that_nobody_would_know_of_waits_for_the_next_keeper(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = type(family)(tmp_path / "other log")
    monkeypatch.setenv(notify.ADDRESS, str(tmp_path / "keeper"))
    waiting = asyncio.create_task(family.run(b"/bin/true"))
    while not any(spawner.starts for spawner in family.nursery._spawners):
        await asyncio.sleep(0)
    monkeypatch.delenv(notify.ADDRESS)
    await other.run(b"/bin/true")  # as long as it takes one that does not wait
    await other.close()
    there_from = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with notify.listen(tmp_path / "keeper") as listener:
        held = await waiting
        early, forward, late = (notify.receive(listener) for _ in range(3))
    assert held.transcript.marked_at() > there_from
    for packet, count in ((early, 2), (forward, 0), (late, 1)):  # transcript and terminal; the pidfd
        assert packet is not None
        fields, fds, _ = packet
        assert (fields["FDNAME"], len(fds)) == (notify.name_of(held.transcript.facts.mark), count)
        for fd in fds:
            os.close(fd)
