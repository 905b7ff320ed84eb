"""`outlive tool`: the tools for an agent that has only a shell, as it meets them."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

import outlive
from outlive.common.errors import Unavailable
from outlive.common.messages import WaitRow
from outlive.scripts.doors import catalogue
from outlive.scripts.doors.catalogue import TOOLS, call

from .agents import OUTLIVE, environment
from .conftest import Home

Done = subprocess.CompletedProcess[str]


class Shell:
    """An agent's shell."""

    def __init__(self, home: Path) -> None:
        self._environment = environment(home)

    def __call__(self, *words: str, input: str | None = None) -> Done:
        """Run `outlive tool WORDS`."""
        return subprocess.run(
            [OUTLIVE, "tool", *words], env=self._environment, input=input, capture_output=True, text=True
        )

    def answer(self, name: str, **arguments: Any) -> Any:
        """Call a tool that has to succeed, and return its structured answer."""
        done = self("--json", name, json.dumps(arguments))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def tool(home: Home) -> Shell:
    return Shell(home.path)


def test_without_a_name_the_tools_are_listed_with_all_their_arguments(tool: Shell) -> None:
    listed = json.loads(tool("--json").stdout)
    assert [one["name"] for one in listed] == list(TOOLS)
    text = tool().stdout
    for one in listed:
        assert f"\n{one['name']}\n" in f"\n{text}"
        assert all(f"\n    {name} (" in text for name in one["inputSchema"]["properties"])


def test_a_session_is_started_typed_into_waited_for_read_and_ended(tool: Shell) -> None:
    script = 'stty -echo; read answer; echo "got $answer"; read more'
    started = tool.answer("exec_command", cmd=script, tty=True, yield_time_ms=250)
    session = started["session_id"]
    tool.answer("write_stdin", session_id=session, chars="6 * 7\n")
    waited = tool.answer("wait", session_ids=[session], match="got .*7", timeout_ms=30_000)
    assert waited["sessions"] == [
        {"session_id": session, "came_true": "match", "matched": "got 6 * 7", "offset": 0}
    ]
    piece = tool.answer("read_output", session_id=session)
    assert (piece["output"], piece["state"], piece["next_cursor"]) == ("got 6 * 7\r\n", "running", 11)
    assert [row["session_id"] for row in tool.answer("list_sessions")["sessions"]] == [session]
    ended = tool.answer("terminate_session", session_id=session)
    assert ended["outcome"] == {"kind": "signaled", "signal": 15, "by": "caller"}
    assert tool.answer("list_sessions")["sessions"] == []
    # Ended means ended: nothing is done to it again.
    assert tool.answer("terminate_session", session_id=session) == ended


def test_the_text_is_that_of_the_two_tools_as_models_know_them(tool: Shell) -> None:
    lines = tool("exec_command", "-", input='{"cmd": "echo out; exit 9"}').stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["Chunk ID", "Wall time"]
    assert lines[2:] == ["Process exited with code 9", "Original token count: 1", "Output:", "out"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("exec",), 2, "tool 'exec': there is none of this name; use exec_command, write_stdin, list_sessions"),
        (("wait", "{"), 2, "arguments: '{' is no JSON: Expecting property name"),
        (("exec_command", '{"cmd": "\\ud800"}'), 2, r"cmd: '\ud800': has half a character in it"),
        (("exec_command", '{"cmd": "\\u0000"}'), 1, "cmd or workdir: contains a NUL byte"),
        (("wait", "[]"), 2, "arguments: a list; use an object"),
        (("wait", "{}"), 2, "session_ids: missing. Sessions to wait for"),
        (("exec_command", '{"cmd": "ls", "tty": 3}'), 2, "tty: 3: expected bool, got int. Run on a terminal"),
        (("exec_command", '{"cmd": "ls", "cwd": "/"}'), 2, "cwd: there is no such argument; use cmd, workdir"),
        (("read_output", '{"session_id": 4711}'), 1, "session_id: 4711: thread default has no such session"),
        (
            ("exec_command", '{"cmd": "ls", "workdir": "/missing"}'),
            1,
            "the command could not be started (directory): /missing: No such file or directory",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_field_value_and_remedy(
    tool: Shell, words: tuple[str, ...], status: int, said: str
) -> None:
    done = tool(*words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"outlive: {said}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_what_has_no_terminal_is_not_typed_into_and_has_no_screen(tool: Shell) -> None:
    session = tool.answer("exec_command", cmd="sleep 1000", yield_time_ms=250)["session_id"]
    typed = tool("write_stdin", json.dumps({"session_id": session, "chars": "x"}))
    assert "rerun the command with tty=true" in typed.stderr
    screen = tool("screen", json.dumps({"session_id": session}))
    assert f"process {session} has no terminal; see its output with read_output" in screen.stderr


async def test_the_screen_is_what_a_person_would_see(tool: Shell, host: outlive.Host) -> None:
    script = r"printf 'gone\033[2J\033[3;5Hhere\033[?25l'; read x"
    session = tool.answer("exec_command", cmd=script, tty=True, yield_time_ms=250)["session_id"]
    await outlive.Thread(host, "default").wait_until(str(session), {"output": "25l"})
    seen = tool.answer("screen", session_id=session)
    assert [line for line in seen["lines"] if line.strip()] == ["    here"]
    assert seen["cursor"] == {"row": 2, "column": 8, "visible": False}
    text = tool("screen", json.dumps({"session_id": session})).stdout
    assert text.startswith(f"Session {session}: 80 columns, 24 rows; hidden cursor at row 2, column 8\n")


async def test_a_wait_is_over_when_any_or_all_of_what_it_is_for_has_come_true(host: outlive.Host) -> None:
    thread = await host.thread("default")

    async def session(cmd: str) -> int:
        answer = await call(thread, "exec_command", {"cmd": cmd, "yield_time_ms": 250})
        return int(answer.structured()["session_id"])

    async def waited(*sessions: int, **arguments: Any) -> tuple[list[str], bool]:
        answer = (await call(thread, "wait", {"session_ids": sessions, **arguments})).structured()
        return [row.get("came_true", "") for row in answer["sessions"]], answer["timed_out"]

    lasting, ended = await session("echo ready; sleep 1000"), await session("sleep 0.3; exit 3")
    assert await waited(lasting, ended, any=True) == (["", "exit"], False)
    # What has ended is known to have, however short the wait.
    assert await waited(ended, lasting, timeout_ms=0) == (["exit", ""], True)
    assert await waited(ended) == (["exit"], False)
    assert await waited(lasting, silence=0.2) == (["silence"], False)
    assert await waited(lasting, match="ready") == (["match"], False)
    assert await waited(lasting, match="ready", cursor=1, timeout_ms=300) == ([""], True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert await waited(lasting, ended, port=listener.getsockname()[1]) == (["port", ""], False)
    never = {"session_ids": [ended, lasting], "match": "never", "timeout_ms": 300}
    assert (await call(thread, "wait", never)).text() == (
        f"Session {ended}: Process exited with code 3, before what was waited for came true\n"
        f"Session {lasting}: running; not yet\nTimed out; call wait again to go on waiting."
    )


async def test_of_a_broker_that_knows_no_cursor_no_match_before_it_is_believed(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = await host.thread("agent")
    wait_until = thread.wait_until

    async def as_before(process_id: str, *rules: object, since: int = 0) -> WaitRow:
        return await wait_until(process_id, *rules)

    monkeypatch.setattr(thread, "wait_until", as_before)
    shell = await thread.exec_command("echo ready")
    asked = {"session_ids": [int(shell.process_id)], "match": "ready"}
    with pytest.raises(Unavailable, match="cursor: 1: the broker is an older one"):
        await call(thread, "wait", {**asked, "cursor": 1})
    assert (await call(thread, "wait", asked)).structured()["sessions"][0]["offset"] == 0


async def test_of_many_that_have_ended_the_last_are_listed(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "ENDED_LISTED", 2)
    thread = await host.thread("default")
    ended = [int((await thread.exec_command(["true"])).process_id) for _ in range(4)]
    alive = int((await thread.exec_command(["sleep", "1000"], yield_time_ms=250)).process_id)
    listed = await call(thread, "list_sessions", {"all": True})
    rows = listed.structured()
    assert [row["session_id"] for row in rows["sessions"]] == [*ended[2:], alive]
    assert rows["earlier"] == 2
    assert listed.text().startswith("Sessions: 3; 2 more have ended before these\n")
    assert "earlier" not in (await call(thread, "list_sessions", {})).structured()


async def test_a_long_output_is_read_piece_by_piece_and_from_its_end(host: outlive.Host) -> None:
    thread = await host.thread("default")

    async def answer(name: str, **arguments: Any) -> dict[str, Any]:
        return (await call(thread, name, arguments)).structured()

    started = await answer("exec_command", cmd="seq 100000", max_output_tokens=100)
    assert started["original_token_count"] == 147_224
    ((row,),) = (await answer("list_sessions", all=True)).values()
    session = row["session_id"]
    assert started["warnings"] == [f"the output is shortened; read_output of session {session} has more of it"]

    first = await answer("read_output", session_id=session, max_output_tokens=1000)
    assert first["output"] == "".join(f"{n}\n" for n in range(1, 2000))[:4000]
    assert (first["cursor"], first["next_cursor"], first["bytes_written"]) == (0, 4000, 588_895)
    second = await answer("read_output", session_id=session, max_output_tokens=1000, cursor=4000)
    assert first["output"] + second["output"] == "".join(f"{n}\n" for n in range(1, 3000))[:8000]
    last = await answer("read_output", session_id=session, tail=2)
    assert (last["output"], last["next_cursor"]) == ("99999\n100000\n", 588_895)
