"""Children: what they inherit, what becomes of them and of their trees, and who knows how they ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import outlive

from .conftest import HELD, PYTHON, Home, eventually, lives

TWO_WAYS = pytest.mark.parametrize("tty", [True, False])


@TWO_WAYS
async def test_children_inherit_no_descriptor_of_ours_and_default_signals(host: outlive.Host, tty: bool) -> None:
    thread = await host.thread("inherit")
    await thread.exec_command(["sleep", "1000"], tty=True, yield_time_ms=250)  # whose descriptors could leak
    answer = await thread.exec_command(["ls", "-l", "/proc/self/fd"], tty=tty)
    numbers = [line.split(" -> ")[0].split()[-1] for line in answer.output.splitlines() if " -> " in line]
    assert numbers == ["0", "1", "2", "3"]  # 3 is the directory that ls reads
    answer = await thread.exec_command(["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"], tty=tty)
    blocked, ignored = answer.output.split()[1::2]
    assert int(blocked, 16) == 0
    # But for the two that belong to the C library and that no program may set.
    assert int(ignored, 16) & ~(0b11 << 31) == 0
    session, pid = (await thread.exec_command(["sh", "-c", "ps -o sid= -p $$; echo $$"], tty=tty)).output.split()
    assert session == pid


async def test_children_get_the_callers_environment_and_directory_with_our_names_and_overrides(
    host: outlive.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "yes")
    thread = await host.thread("environment")
    answer = await thread.exec_command(["env"], workdir=tmp_path, env={"TERM": "vt100", "MORE": "a b"})
    table = dict(line.split("=", 1) for line in answer.output.splitlines())
    assert (table["OF_THE_CALLER"], table["MORE"], table["TERM"], table["PAGER"]) == ("yes", "a b", "vt100", "cat")
    assert (table["OUTLIVE_THREAD"], table["OUTLIVE_PROCESS"]) == ("environment", answer.process_id)
    assert len(table["OUTLIVE_MARK"]) == 32
    assert not {"OUTLIVE_ROLE", "OUTLIVE_LIMITS"} & set(table)
    assert (await thread.exec_command(["pwd"], workdir=tmp_path)).output == f"{tmp_path}\n"


@TWO_WAYS
@pytest.mark.parametrize(
    ("argv", "workdir", "stage"),
    [
        (["/no/such/program"], ".", "exec"),
        (["no-such-program-anywhere"], ".", "exec"),
        (["/etc/passwd"], ".", "exec"),
        (["true"], "/no/such/directory", "directory"),
    ],
)
async def test_a_command_that_cannot_be_started_is_an_error_that_names_the_stage(
    home: Home, host: outlive.Host, tty: bool, argv: list[str], workdir: str, stage: str
) -> None:
    thread = await host.thread("failing")
    with pytest.raises(outlive.SpawnError) as error:
        await thread.exec_command(argv, tty=tty, workdir=workdir)
    assert error.value.stage == stage
    assert (argv[0] if stage == "exec" else workdir) in str(error.value)
    # Nothing is left of it, and the next command starts.
    assert (await thread.exec_command(["echo", "next"])).output == "next\n"
    assert await thread.processes() == []


@TWO_WAYS
@pytest.mark.parametrize("spawner", ["killed", "stopped"])
async def test_the_exit_status_of_a_child_whose_spawner_was_killed_or_stopped_is_the_real_one(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path], tty: bool, spawner: str
) -> None:
    thread = await host.thread("parentless")
    children = []
    gos = [fifo("a"), fifo("b")]
    for go, line in zip(gos, ("exit 33", "kill -TERM $$"), strict=True):
        argv = ["sh", "-c", HELD, str(go), line]
        children.append((await thread.exec_command(argv, tty=tty, yield_time_ms=250)).process_id)
    pid = home.spawner(await home.worker(host, "parentless"))
    os.kill(pid, signal.SIGKILL if spawner == "killed" else signal.SIGSTOP)
    if spawner == "killed":
        await eventually(lambda: not lives(pid))
    for go in gos:
        go.write_text("go\n")
    assert await thread.wait(children[0]) == outlive.Outcome("exited", code=33)
    assert await thread.wait(children[1]) == outlive.Outcome("signaled", signal=15)
    # The worker goes on, with a new spawner if need be.
    if spawner == "stopped":
        os.kill(pid, signal.SIGCONT)
    assert (await thread.exec_command(["echo", "on"])).output == "on\n"


async def test_a_child_whose_worker_and_spawner_are_killed_at_once_keeps_its_exit_code(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("both")
    argv = ["sh", "-c", HELD, str(go := fifo("go")), "exit 12"]
    child = await thread.exec_command(argv, tty=True, yield_time_ms=250)
    worker = await home.worker(host, "both")
    spawner = home.spawner(worker)
    os.kill(worker, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it ends with its worker
        os.kill(spawner, signal.SIGKILL)
    go.write_text("go\n")
    assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=12)


async def test_nohup_and_setsid_children_live_on_after_their_leader_and_die_with_the_tree(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("tree")
    line = (
        "nohup sleep 1000 >/dev/null 2>&1 & echo $!; setsid sleep 1000 >/dev/null 2>&1 & echo $!; "
        "env -i sleep 1000 >/dev/null & echo $!; echo done; read wait"
    )
    child = await thread.exec_command(["sh", "-c", line], tty=True, yield_time_ms=250)
    while b"done" not in (text := await thread.output(child.process_id)):
        await thread.read_output(child.process_id, len(text), wait_ms=5000)
    pids = [int(word) for word in text.split()[:3]]
    (row,) = await thread.processes()
    assert all(lives(pid) for pid in [*pids, row.pid or 0])
    (report,) = await thread.kill(child.process_id, signal="KILL")
    assert report["signalled"] >= 3  # one dies of its leader's hang-up, perhaps before its turn
    assert await thread.wait(child.process_id) == outlive.Outcome("signaled", signal=9, by="caller")
    for pid in pids:
        await eventually(lambda pid=pid: not lives(pid))  # type: ignore[misc]


async def test_kill_escalates_only_when_it_is_told_to(host: outlive.Host) -> None:
    thread = await host.thread("stubborn")
    argv = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1000; done"]
    child = await thread.exec_command(argv, tty=True, yield_time_ms=250)
    while b"deaf" not in (text := await thread.output(child.process_id)):
        await thread.read_output(child.process_id, len(text), wait_ms=5000)
    await thread.kill(child.process_id)
    assert [row.process_id for row in await thread.processes()] == [child.process_id]
    await thread.kill(child.process_id, after=0.05)
    assert await thread.processes() == []
    assert await thread.wait(child.process_id) == outlive.Outcome("signaled", signal=9, by="caller")


async def test_a_grandchild_that_keeps_the_terminal_open_does_not_hold_up_the_end_and_is_still_read(
    host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("grand")
    first, second = fifo("first"), fifo("second")
    # The grandchild is deaf to the hang-up that its leader's exit sends.
    line = f"trap '' HUP; (read go <{second}; echo late) & read go <{first}; echo early; exit 4"
    child = await thread.exec_command(["sh", "-c", line], tty=True, yield_time_ms=250)
    first.write_text("go\n")
    assert await thread.wait(child.process_id) == outlive.Outcome("exited", code=4)
    assert await thread.output(child.process_id) == b"early\r\n"
    second.write_text("go\n")
    while await thread.output(child.process_id) != b"early\r\nlate\r\n":
        await thread.read_output(child.process_id, 7, wait_ms=100)


@TWO_WAYS
async def test_a_big_output_and_an_instant_exit_are_complete(host: outlive.Host, tty: bool) -> None:
    thread = await host.thread("instant")
    script = "import os, sys; os.write(1, b'x' * 99_999 + b'!'); os._exit(0)"
    for _ in range(10):
        answer = await thread.exec_command([*PYTHON, script], tty=tty, max_output_tokens=100_000)
        assert (len(answer.output), answer.output[-1], answer.exit_code) == (100_000, "!", 0)


@pytest.mark.long
@TWO_WAYS
async def test_a_megabyte_and_a_half_and_an_instant_exit_are_complete_200_times_on_a_busy_machine(
    host: outlive.Host, tty: bool
) -> None:
    thread = await host.thread("busy")
    noise = [(await thread.exec_command(["sh", "-c", "while :; do :; done"], yield_time_ms=250)) for _ in range(3)]
    script = "import os; data = b'x' * 1_499_999 + b'!'\nwhile data: data = data[os.write(1, data):]\nos._exit(0)"
    for _ in range(200):
        child = await thread.exec_command([*PYTHON, script], tty=tty, max_output_tokens=10)
        assert child.exit_code == 0
        last = await thread.read_output(child.process_id, 1_499_990)
        assert (last.written, last.pieces) == (1_500_000, [(1_499_990, b"x" * 9 + b"!")])
    await thread.kill(*(one.process_id for one in noise), signal="KILL")


async def test_a_short_command_reports_its_exit_code_and_no_session_id(host: outlive.Host) -> None:
    thread = await host.thread("short")
    answer = await thread.exec_command("echo out; echo err >&2; exit 3")
    assert (answer.exit_code, answer.session_id, answer.output) == (3, None, "out\nerr\n")
    assert "Process exited with code 3" in answer.text()


async def test_a_poll_after_a_too_short_yield_returns_the_rest(
    host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    thread = await host.thread("yield")
    go = fifo("go")
    child = await thread.exec_command(["sh", "-c", 'echo one; read go <"$0"; echo two', str(go)], yield_time_ms=250)
    assert child.session_id == int(child.process_id)
    poll = asyncio.create_task(thread.write_stdin(child.process_id))
    go.write_text("go\n")
    answer = await poll
    assert child.output + answer.output == "one\ntwo\n"
    assert (answer.exit_code, answer.session_id) == (0, None)
    again = await thread.write_stdin(child.process_id)
    assert (again.exit_code, again.output) == (0, "")


async def test_stdin_of_a_process_on_pipes_is_closed_and_says_how_to_get_one(host: outlive.Host) -> None:
    thread = await host.thread("pipes")
    assert (await thread.exec_command(["cat"])).exit_code == 0
    child = await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
    with pytest.raises(outlive.StdinClosed, match="tty=true"):
        await thread.write_stdin(child.process_id, "x")
