"""The two tools as models know them: sessions, yields, ids, limits, errors, events."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from outlive.common import launch
from outlive.common.errors import BadRequest, LimitReached, SpawnError, StdinClosed, UnknownProcess
from outlive.common.held import exec_yield, write_yield
from outlive.common.messages import Collected, Delta, ExecCommand, ReadOutput
from outlive.common.names import RANDOM_IDS
from outlive.common.outcome import Outcome
from outlive.common.response import Response
from outlive.common.transcript import Gap, Transcript
from outlive.worker.commands import PLAIN_ENVIRONMENT, command_line

FOREVER = float("inf")
SLEEP = [b"/bin/sleep", b"1000"]
SHELL = [b"/bin/sh"]


def parts_of(held: Any) -> list[Any]:
    return list(held.transcript.read(0, held.transcript.written))


# Sessions.


async def test_a_shell_keeps_its_variables_and_two_shells_do_not_share_them(house: Any) -> None:
    desk = house.desk()
    one, two = await desk.start(SHELL, tty=True), await desk.start(SHELL, tty=True)
    await desk.say(one, b"x=first\n", b"x=first\r\n")
    await desk.say(two, b"x=second\n", b"x=second\r\n")
    assert b"x is first" in await desk.say(one, b"echo x is $x\n", b"x is first")
    assert b"x is second" in await desk.say(two, b"echo x is $x\n", b"x is second")


async def test_a_short_command_has_its_exit_code_and_no_session(house: Any) -> None:
    response = await house.desk().run("echo hello; exit 3")
    assert (response.exit_code, response.session_id, response.output) == (3, None, "hello\n")
    assert response.outcome == {"kind": "exited", "code": 3}
    assert re.fullmatch(
        r"Chunk ID: [0-9a-f]{6}\n"
        r"Wall time: \d+\.\d{4} seconds\n"
        r"Process exited with code 3\n"
        r"Original token count: 2\n"
        r"Output:\n"
        r"hello\n",
        response.text(),
    )


async def test_a_process_that_lives_has_a_session_and_no_exit_code(house: Any) -> None:
    response = await house.desk().run(SLEEP, ms=250)
    assert (response.exit_code, response.session_id) == (None, int(response.process_id))
    assert f"Process running with session ID {response.process_id}\n" in response.text()


async def test_a_signal_death_is_told_as_one_and_counts_as_a_shell_would(house: Any) -> None:
    response = await house.desk().run("kill -9 $$")
    assert response.exit_code == 137
    assert "Process ended by signal 9 (SIGKILL)\n" in response.text()


async def test_a_poll_after_a_too_short_yield_returns_the_rest(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start("echo early; read go; echo late; exit 4", shown=b"early\r\n", tty=True)
    poll = asyncio.create_task(desk.write(process_id))
    await desk.held(process_id).type(b"\n", FOREVER)
    rest = await poll
    assert (rest.output, rest.exit_code, rest.session_id) == ("\r\nlate\r\n", 4, None)


async def test_a_finished_process_answers_with_its_outcome_until_its_answer_was_sent(house: Any) -> None:
    desk = house.desk()
    response = await desk.run("exit 5")
    for _ in range(2):
        again = await desk.write(response.process_id)
        assert (again.exit_code, again.output) == (5, "")
    typed = await desk.write(response.process_id, b"too late\n")
    assert typed.warnings == ["the process has ended; nothing was typed"]
    desk.manager.settle()
    assert desk.said[-1] == Collected(process_id=response.process_id)
    with pytest.raises(UnknownProcess):
        await desk.write(response.process_id)


async def test_an_end_that_nobody_was_told_of_is_not_collected(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start("read go; echo unread", tty=True)
    held = desk.held(process_id)
    await held.type(b"\n", FOREVER)
    assert await held.until_ended()
    desk.manager.settle()
    assert desk.manager.process_ids == [process_id]
    assert (await desk.write(process_id)).output == "\r\nunread\r\n"
    desk.manager.settle()
    assert desk.manager.process_ids == []


async def test_typing_returns_what_was_printed_since_the_last_call(house: Any) -> None:
    desk = house.desk()
    loop = "stty -echo; echo ready; while read w; do echo got $w; done"
    process_id = await desk.start(loop, tty=True, shown=b"ready\r\n")
    for word in ("one", "two"):
        response = await desk.write(process_id, word.encode() + b"\n")
        assert response.typed == 4
        output = response.output
        while len(output) < len(f"got {word}\r\n"):  # a busy machine may need more than one answer
            output += (await desk.write(process_id)).output
        assert output == f"got {word}\r\n"


async def test_ctrl_c_ends_the_foreground_program_and_not_the_shell(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start([b"/bin/sh", b"-i"], tty=True)
    # Printed by the program itself: until it is in the foreground, Ctrl-C is for the shell.
    await desk.say(process_id, b"sh -c \"echo r''eady; exec sleep 1000\"\n", b"ready\r\n")
    await desk.say(process_id, b"\x03echo st''ill here\n", b"still here\r\n")


async def test_reading_output_delivers_nothing(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start("echo one; read go; echo two", tty=True, shown=b"one\r\n")
    read = ReadOutput(thread="t", process_id=process_id, offset=5, wait_ms=60_000)
    waiting = asyncio.create_task(desk.manager.read_output(read))
    await desk.held(process_id).type(b"\n", FOREVER)
    piece = await waiting
    assert piece.pieces[0][0] == 5
    assert (await desk.write(process_id)).output == "\r\ntwo\r\n"


# Yields and truncation.


@pytest.mark.parametrize(
    ("asked", "exec_s", "type_s", "poll_s"),
    [
        (0, 0.25, 0.25, 5.0),
        (250, 0.25, 0.25, 5.0),
        (2500, 2.5, 2.5, 5.0),
        (5000, 5.0, 5.0, 5.0),
        (30_000, 30.0, 30.0, 30.0),
        (30_001, 30.0, 30.0, 30.001),
        (300_000, 30.0, 30.0, 300.0),
        (86_400_000, 30.0, 30.0, 300.0),
    ],
)
def test_yields_are_clamped(asked: int, exec_s: float, type_s: float, poll_s: float) -> None:
    assert (exec_yield(asked), write_yield(asked, b"x"), write_yield(asked, b"")) == (exec_s, type_s, poll_s)


async def test_too_long_an_output_keeps_its_head_and_tail(house: Any) -> None:
    response = await house.desk().run("seq 1 5000", max_output_tokens=10)
    assert response.original_token_count == -(-23_893 // 4)
    head, _, rest = response.output.partition("…")
    count, _, tail = rest.partition(" tokens truncated…")
    assert "\n".join(str(number) for number in range(1, 11)).startswith(head)
    assert len(head) == 20
    assert tail == "4997\n4998\n4999\n5000\n"[-20:]
    assert int(count) == -(-(23_893 - 40) // 4)


async def test_no_tokens_wanted_is_no_output_and_still_a_count(house: Any) -> None:
    response = await house.desk().run("echo 1234567", max_output_tokens=0)
    assert (response.output, response.original_token_count) == ("…2 tokens truncated…", 2)


# Call ids.


async def test_the_same_call_again_returns_the_same_process_with_its_output_from_the_beginning(
    house: Any, tmp_path: Path
) -> None:
    desk = house.desk()
    command = f"echo ran >>{tmp_path}/runs; echo hello; exit 6"
    first = await desk.run(command, call_id="c")
    again = await desk.run(command, call_id="c")
    assert (again.process_id, again.output, again.exit_code) == (first.process_id, "hello\n", 6)
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_the_same_call_at_once_starts_one_process(house: Any, tmp_path: Path) -> None:
    desk = house.desk()
    command = f"echo ran >>{tmp_path}/runs; echo hello"
    responses = await asyncio.gather(*(desk.run(command, call_id="c") for _ in range(8)))
    assert len({response.process_id for response in responses}) == 1
    assert {response.output for response in responses} == {"hello\n"}
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_process_that_is_over_at_once_is_not_let_go_before_all_who_waited_for_its_start_have_it(
    house: Any,
) -> None:
    desk = house.desk()

    async def served() -> Response:
        response = await desk.run("exit 6", call_id="c")
        desk.manager.settle()  # as the session does, once the answer has been sent
        return response

    responses = await asyncio.gather(*(served() for _ in range(8)))
    assert {response.exit_code for response in responses} == {6}
    assert desk.manager.process_ids == []


async def test_what_was_ordered_is_being_started_until_it_is_held(house: Any) -> None:
    """A broker that asked in between, and was told neither, would have another worker start it again."""
    desk = house.desk()
    running = asyncio.ensure_future(desk.start("sleep 1000"))
    while not any(spawner.starts for spawner in house.nursery._spawners):
        await asyncio.sleep(0)
    while not running.done():
        assert desk.manager.starting or desk.manager.deposits()
        await asyncio.sleep(0)
    assert desk.manager.starting == []


async def test_a_call_that_could_not_start_fails_for_all_and_may_come_again(house: Any, tmp_path: Path) -> None:
    desk = house.desk()
    program = os.fsencode(tmp_path / "program")
    results = await asyncio.gather(*(desk.run([program], call_id="c") for _ in range(3)), return_exceptions=True)
    assert [getattr(result, "stage", None) for result in results] == ["exec"] * 3
    (tmp_path / "program").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "program").chmod(0o755)
    assert (await desk.run([program], call_id="c")).exit_code == 7


async def test_output_and_end_are_told_under_the_call_id(house: Any) -> None:
    desk = house.desk()
    desk.manager.want_deltas(True)
    await desk.run("echo hello", call_id="c")
    delta, end = desk.said
    assert isinstance(delta, Delta)
    assert (delta.call_id, delta.chunk) == ("c", b"hello\n")
    assert end == desk.ends()[0]


# Errors that a model meets.


async def test_typing_without_a_terminal_is_refused_with_what_to_do(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start(SLEEP)
    with pytest.raises(StdinClosed, match=r"stdin is closed for this session.*rerun.*tty=true"):
        await desk.write(process_id, b"x")


async def test_an_id_that_is_not_here_is_unknown(house: Any) -> None:
    desk = house.desk()
    with pytest.raises(UnknownProcess, match="4711"):
        await desk.write("4711")
    with pytest.raises(UnknownProcess):
        desk.held("4711")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cmd": ""}, "missing command line"),
        ({"cmd": " \n\t"}, "missing command line"),
        ({"cmd": []}, "missing command line"),
        ({"cmd": [b""]}, "missing command line"),
        ({"cmd": "echo \0"}, "NUL"),
        ({"cmd": [b"echo", b"a\0b"]}, "NUL"),
        ({"cmd": "pwd", "workdir": b"/\0"}, "NUL"),
        ({"cmd": "pwd", "overrides": {b"": b"x"}}, "name"),
        ({"cmd": "pwd", "overrides": {b"A=B": b"x"}}, "A=B"),
        ({"cmd": "pwd", "overrides": {b"A": b"\0"}}, "NUL"),
        ({"cmd": "pwd", "environment": {b"A\0": b""}}, "NUL"),
    ],
)
async def test_what_cannot_be_a_command_is_refused_and_nothing_starts(
    house: Any, fields: dict[str, Any], message: str
) -> None:
    desk = house.desk()
    with pytest.raises(BadRequest, match=message):
        await desk.run(**fields)
    assert (desk.said, desk.manager.process_ids, house.nursery.pids) == ([], [], [])


async def test_a_command_that_could_not_start_names_the_stage_and_the_reason(house: Any) -> None:
    desk = house.desk()
    with pytest.raises(SpawnError, match=r"directory.*/nowhere: No such file") as caught:
        await desk.run("pwd", workdir=b"/nowhere")
    assert caught.value.stage == "directory"
    assert (desk.said, desk.manager.process_ids) == ([], [])


# What children get.


async def test_children_get_a_plain_environment_unless_the_call_sets_it(house: Any) -> None:
    desk = house.desk()
    environment = {
        b"PATH": os.environb[b"PATH"],
        b"TERM": b"xterm",
        b"LANG": b"de_DE",
        b"MINE": b"1",
        launch.ROLE: b"worker",
        launch.LIMITS: b"1,2",
        launch.MARK: b"of an outer process",
    }
    command = [b"env", b"-0"]
    overrides = {b"LANG": b"C", b"PAGER": b"less", b"OUTLIVE_ROLE": b"broker", b"OUTLIVE_LIMITS": b"1,1"}
    response = await desk.run(command, environment=environment, overrides=overrides)
    found = dict(line.split("=", 1) for line in response.output.split("\0") if line)
    plain = {name.decode(): value.decode() for name, value in PLAIN_ENVIRONMENT.items()}
    mark = found.pop("OUTLIVE_MARK")
    assert re.fullmatch("[0-9a-f]{32}", mark)
    assert found == {
        **plain,
        "PATH": os.environ["PATH"],
        "MINE": "1",
        "LANG": "C",
        "PAGER": "less",
        "OUTLIVE_THREAD": "t",
        "OUTLIVE_PROCESS": response.process_id,
    }
    assert desk.held(response.process_id).transcript.facts.mark == mark


def call_of(**fields: Any) -> ExecCommand:
    return ExecCommand(**{"thread": "t", "cmd": "ls", "workdir": b"/", "environment": {}, "call_id": "c", **fields})


@pytest.mark.parametrize(
    ("fields", "argv"),
    [
        ({"cmd": [b"ls", b"-l x"]}, [b"ls", b"-l x"]),
        ({"shell": b"/bin/zsh"}, [b"/bin/zsh", b"-lc", b"ls"]),
        ({"shell": b"/bin/zsh", "login": False}, [b"/bin/zsh", b"-c", b"ls"]),
        ({"environment": {b"SHELL": b"/bin/sh"}}, [b"/bin/sh", b"-lc", b"ls"]),
        ({"cmd": "echo \udcff", "shell": b"sh"}, [b"sh", b"-lc", b"echo \xff"]),
    ],
)
def test_a_command_line_goes_to_the_callers_shell(fields: dict[str, Any], argv: list[bytes]) -> None:
    assert command_line(call_of(**fields)) == argv


@pytest.mark.parametrize("shell", [b"", b"sh", b"/no/such/shell", b"/etc/passwd"])
def test_a_shell_that_does_not_run_is_passed_over(shell: bytes) -> None:
    assert command_line(call_of(environment={b"SHELL": shell}))[0] in (b"/bin/bash", b"/bin/sh")


# Ids.


async def test_an_id_is_not_given_out_again(house: Any) -> None:
    desk = house.desk()
    desk.manager.ids.use(str(number) for number in RANDOM_IDS if number != 4711)
    assert [(await desk.run("true")).process_id for _ in range(3)] == ["4711", "100000", "100001"]
    desk.manager.settle()
    assert (await desk.run("true")).process_id == "100002"


# Limits.


async def crowd(desk: Any, count: int) -> list[str]:
    """Start so many sleeping processes; return their ids, least recently used first."""
    ids = await asyncio.gather(*(desk.start(SLEEP, call_id=f"call-{number}") for number in range(count)))
    return sorted(ids, key=lambda process_id: desk.held(process_id).last_used)


async def use(desk: Any, *process_ids: str) -> None:
    """Use these, in this order: the same call again."""
    for process_id in process_ids:
        held = desk.held(process_id)
        call = asyncio.create_task(desk.run(SLEEP, ms=250, call_id=held.transcript.facts.call_id))
        await call


async def test_the_least_recently_used_of_64_makes_room_and_the_agent_is_told(house: Any) -> None:
    desk = house.desk()
    ids = await crowd(desk, 64)
    await use(desk, ids[0])
    transcript = Transcript(os.dup(desk.held(ids[1]).transcript.fd))
    response = await desk.run(SLEEP, ms=250)
    assert response.warnings[0].startswith(f"process {ids[1]} was ended to make room")
    assert desk.manager.process_ids == sorted([*ids[:1], *ids[2:], response.process_id])
    with pytest.raises(UnknownProcess):
        await desk.write(ids[1])
    while Collected(process_id=ids[1]) not in desk.said:
        await asyncio.sleep(0.001)
    assert transcript.live().outcome == Outcome("signaled", signal=9, by="pruned")
    os.close(transcript.fd)
    assert [(end.process_id, end.announce) for end in desk.ends()] == [(ids[1], False)]

    # An ended one goes before older live ones, without a word: its end was told.
    signal.pidfd_send_signal(desk.held(ids[30]).handles.pidfd, signal.SIGTERM)
    assert await desk.held(ids[30]).until_ended()
    response = await desk.run(SLEEP, ms=250)
    assert not any("was ended" in warning for warning in response.warnings)
    assert ids[30] not in desk.manager.process_ids
    assert ids[2] in desk.manager.process_ids


async def test_where_a_handoff_brought_too_many_only_one_makes_room_for_a_new_one(house: Any) -> None:
    old, new = house.desk(1, max_processes=30), house.desk(2, max_processes=10)
    ids = await crowd(old, 20)
    copies = old.copies()
    await old.manager.export_processes()
    assert new.manager.import_processes(copies) == []
    response = await new.run(SLEEP, ms=250)
    assert [warning.split()[1] for warning in response.warnings if "was ended" in warning] == ids[:1]
    assert len(new.manager.process_ids) == 20


async def test_the_agent_is_warned_from_the_sixtieth_process_on(house: Any) -> None:
    desk = house.desk()
    await crowd(desk, 58)
    warnings = [(await desk.run(SLEEP, ms=250)).warnings for _ in range(3)]
    assert warnings[0] == []
    assert [warning.split()[0] for found in warnings[1:] for warning in found] == ["60", "61"]


async def test_the_eight_most_recent_are_never_ended_for_a_newer_one(house: Any) -> None:
    desk = house.desk(max_processes=8)
    ids = await crowd(desk, 8)
    with pytest.raises(LimitReached, match="max_processes is 8"):
        await desk.run(SLEEP, ms=250)
    assert desk.manager.process_ids == sorted(ids)


async def test_refusing_ends_no_live_process_and_drops_an_ended_one(house: Any) -> None:
    desk = house.desk(max_processes=10, when_full="refuse")
    ids = await crowd(desk, 10)
    with pytest.raises(LimitReached, match="max_processes"):
        await desk.run(SLEEP, ms=250)
    assert desk.manager.process_ids == sorted(ids)
    signal.pidfd_send_signal(desk.held(ids[1]).handles.pidfd, signal.SIGTERM)
    assert await desk.held(ids[1]).until_ended()
    assert (await desk.run(SLEEP, ms=250)).session_id is not None
    assert ids[1] not in desk.manager.process_ids


async def test_a_process_that_is_being_talked_to_is_not_pruned(house: Any) -> None:
    desk = house.desk(max_processes=9)
    ids = await crowd(desk, 9)
    poll = asyncio.create_task(desk.write(ids[0]))
    await asyncio.sleep(0)
    desk.held(ids[0]).last_used = 0.0
    with pytest.raises(LimitReached):
        await desk.run(SLEEP, ms=250)
    assert ids[0] in desk.manager.process_ids
    desk.held(ids[0]).hurry()
    await poll


async def test_the_descriptor_limit_is_refused_by_name(house: Any) -> None:
    desk = house.desk()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    await desk.start(SLEEP)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64 + 3 * 7, hard))
    try:
        await asyncio.gather(*(desk.start(SLEEP) for _ in range(2)))
        with pytest.raises(LimitReached, match="open files"):
            await desk.run("true")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await desk.run("exit 2")).exit_code == 2


# Ends and their events.


async def test_a_natural_end_is_told_once_with_the_aggregated_output(house: Any) -> None:
    desk = house.desk()
    response = await desk.run("echo one; read go; echo two; exit 9", ms=250, tty=True, call_id="c")
    held = desk.held(response.process_id)
    await held.type(b"\n", FOREVER)
    assert await held.until_ended()
    await desk.write(response.process_id)
    desk.manager.settle()
    (end,) = desk.ends()
    assert (end.process_id, end.call_id, end.announce) == (response.process_id, "c", True)
    assert end.output == b"one\r\n\r\ntwo\r\n"


async def test_an_end_forced_from_outside_is_told_like_a_natural_one(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start(SLEEP)
    held = desk.held(process_id)
    signal.pidfd_send_signal(held.handles.pidfd, signal.SIGKILL)
    assert await held.until_ended()
    assert [(end.process_id, end.announce) for end in desk.ends()] == [(process_id, True)]


async def test_terminating_all_announces_no_end(house: Any) -> None:
    desk = house.desk()
    desk.manager.want_deltas(True)
    ids = [await desk.start(SHELL, tty=True), await desk.start(SLEEP)]
    copies = desk.copies()
    said = len(desk.said)
    assert await desk.manager.terminate_all_processes() == sorted(ids)
    assert desk.manager.process_ids == []
    assert not any(isinstance(one, Delta) for one in desk.said[said:])
    assert sorted(end.process_id for end in desk.ends()) == sorted(ids)
    assert not any(end.announce or end.output for end in desk.ends())
    for handles in copies.values():
        assert Transcript(handles.transcript).live().outcome == Outcome("signaled", signal=9, by="shutdown")
        handles.close()


async def test_terminating_waits_for_starts_that_are_under_way(house: Any) -> None:
    desk = house.desk()
    starting = asyncio.create_task(desk.run(SLEEP, ms=30_000))
    await asyncio.sleep(0)
    assert desk.manager.process_ids == []
    (process_id,) = await desk.manager.terminate_all_processes()
    response = await starting
    assert response.process_id == process_id
    assert [end.announce for end in desk.ends()] == [False]


async def test_forgotten_processes_are_dropped_without_a_word(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start(SLEEP)
    pidfd = os.dup(desk.held(process_id).handles.pidfd)
    said = len(desk.said)
    desk.manager.forget([process_id, "4711"])
    assert (desk.manager.process_ids, desk.said[said:]) == ([], [])
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # it lives: it is the broker's business
    os.close(pidfd)


async def test_deltas_are_sent_only_while_somebody_listens(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start("stty -echo; echo ready; while read w; do echo $w; done", tty=True)
    await desk.until(process_id, b"ready\r\n")
    await desk.say(process_id, b"unheard\n", b"unheard\r\n")
    desk.manager.want_deltas(True)
    await desk.say(process_id, b"heard\n", b"heard\r\n")
    desk.manager.want_deltas(False)
    await desk.say(process_id, b"unheard again\n", b"unheard again\r\n")
    deltas = [one for one in desk.said if isinstance(one, Delta)]
    assert b"".join(delta.chunk for delta in deltas) == b"heard\r\n"
    assert deltas[0].offset == len(b"ready\r\nunheard\r\n")


# Families.


@pytest.mark.parametrize(
    "script",
    [
        "sleep 1000 & echo $! >{pids}; exec sleep 1000",
        "nohup sleep 1000 >/dev/null 2>&1 & echo $! >{pids}; exec sleep 1000",
        "setsid sh -c 'echo $$ >{pids}; exec sleep 1000' & exec sleep 1000",
        "env -i setsid sh -c 'echo $$ >{pids}; exec sleep 1000' & exec sleep 1000",
    ],
    ids=["background", "nohup", "setsid", "without the mark"],
)
@pytest.mark.parametrize("tty", [True, False], ids=["pty", "pipe"])
async def test_an_ended_process_takes_its_whole_tree_along(
    house: Any, tmp_path: Path, ended: Any, script: str, tty: bool
) -> None:
    desk = house.desk()
    fifo = tmp_path / "pids"
    os.mkfifo(fifo)
    told = asyncio.create_task(asyncio.to_thread(fifo.read_text))
    await desk.start(script.format(pids=fifo), tty=tty)
    pidfd = os.pidfd_open(int(await told))
    await desk.manager.terminate_all_processes()
    await ended(pidfd)
    os.close(pidfd)


async def test_a_daemon_that_keeps_the_output_open_does_not_hold_up_the_answer_and_is_drained(
    house: Any, tmp_path: Path
) -> None:
    desk = house.desk()
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    response = await desk.run(f"(read go <{fifo}; echo late; exec sleep 0) & echo now; exit 8", ms=30_000)
    assert (response.exit_code, response.output) == (8, "now\n")
    held = desk.held(response.process_id)
    assert held.terminal_open
    fifo.write_text("go\n")
    while held.terminal_open:
        await asyncio.sleep(0.001)
    assert (await desk.write(response.process_id)).output == "late\n"


async def test_a_nohup_child_outlives_its_shell(house: Any, tmp_path: Path, ended: Any) -> None:
    desk = house.desk()
    command = f"nohup sleep 1000 >/dev/null 2>&1 & echo $! >{tmp_path}/pid; exit 0"
    response = await desk.run(command, tty=True)
    assert response.exit_code == 0
    pidfd = os.pidfd_open(int((tmp_path / "pid").read_text()))
    signal.pidfd_send_signal(pidfd, 0)
    await desk.manager.terminate_all_processes()
    await ended(pidfd)
    os.close(pidfd)


# Output.


async def print_and_exit(desk: Any, times: int, tty: bool) -> None:
    lines = b"".join(b"%d\n" % number for number in range(1, 230_001))  # 1.5 MB
    expected = lines.replace(b"\n", b"\r\n") if tty else lines
    for _ in range(times):
        response = await desk.run([b"/usr/bin/seq", b"1", b"230000"], tty=tty, ms=30_000)
        while response.exit_code is None:
            response = await desk.write(response.process_id, ms=300_000)
        held = desk.held(response.process_id)
        assert (response.exit_code, held.transcript.written) == (0, len(expected))
        for part in parts_of(held):
            if not isinstance(part, Gap):
                assert part[1] == expected[part[0] : part[0] + len(part[1])]
        assert response.output.endswith("230000\r\n" if tty else "230000\n")
        desk.manager.settle()


@pytest.mark.parametrize("tty", [True, False], ids=["pty", "pipe"])
async def test_a_long_output_and_an_instant_exit_lose_nothing(house: Any, tty: bool) -> None:
    desk = house.desk()
    await asyncio.gather(*(print_and_exit(desk, 10, tty) for _ in range(2)))
    assert desk.manager.process_ids == []


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tty", [True, False], ids=["pty", "pipe"])
async def test_two_hundred_long_outputs_on_a_busy_machine_lose_nothing(house: Any, tty: bool) -> None:
    desk = house.desk()
    busy = [await desk.start([b"/bin/sh", b"-c", b"while :; do :; done"]) for _ in range(3)]
    await asyncio.gather(*(print_and_exit(desk, 50, tty) for _ in range(4)))
    assert desk.manager.process_ids == sorted(busy)


async def test_a_flood_leaves_memory_bounded_and_ends_at_once_when_told(house: Any) -> None:
    desk = house.desk()
    process_id = await desk.start([b"/usr/bin/yes"], tty=True)
    held = desk.held(process_id)
    while held.pump.written < 8 << 20:
        await held.until_output(held.pump.written, FOREVER)
    # Head, tail and unread window, what has come since the last trim, and the header.
    assert os.fstat(held.transcript.fd).st_blocks * 512 < (512 + 512 + 256 + 256 + 1100) << 10
    assert await desk.manager.terminate_all_processes() == [process_id]


async def test_binary_output_survives_byte_for_byte_in_both_directions(house: Any, tmp_path: Path) -> None:
    desk = house.desk()
    data = bytes(range(256)) * 400
    (tmp_path / "data").write_bytes(data)
    printed = await desk.run([b"/bin/cat", os.fsencode(tmp_path / "data")])
    assert parts_of(desk.held(printed.process_id)) == [(0, data)]

    script = f"stty raw -echo; printf R; exec head -c {len(data)} >{tmp_path}/typed"
    process_id = await desk.start(script, tty=True)
    held = desk.held(process_id)
    await desk.until(process_id, b"R")
    assert await held.type(data, FOREVER) == len(data)
    assert await held.until_ended()
    assert (tmp_path / "typed").read_bytes() == data


async def test_an_instant_exit_is_seen_every_time(house: Any) -> None:
    desk = house.desk()
    for number in range(30):
        response = await desk.run([b"/bin/sh", b"-c", b"echo %d; exit %d" % (number, number)], tty=bool(number % 2))
        assert (response.exit_code, response.output.strip()) == (number, str(number))
    desk.manager.settle()
    assert desk.manager.process_ids == []
