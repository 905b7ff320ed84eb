"""`outlive mcp`, as agents meet it: the official client of the Model Context Protocol, real brokers and deaths."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx2
import mcp_types as types
import pytest
from mcp.client.client import Client
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim
from mcp.client.subscriptions import ResourcesListChanged, ResourceUpdated
from mcp.shared.exceptions import MCPError
from msgspec import structs

import outlive
from outlive.common.messages import Output
from outlive.scripts.doors import bridge, tasks, transcripts
from outlive.scripts.doors.bridge import Bridge
from outlive.scripts.doors.catalogue import TOOLS
from outlive.scripts.doors.project import thread_of_folder

from .agents import (
    BEFORE,
    MODES,
    NEWEST,
    OUTLIVE,
    an_endpoint,
    called,
    connected,
    environment,
    over_stdio,
    refused,
    text_of,
)
from .conftest import Home

WAYS = ("transport", "revision")
EVERYWHERE = pytest.mark.parametrize(
    WAYS, [("stdio", NEWEST), ("stdio", BEFORE), ("http", NEWEST), ("http", BEFORE)]
)
# A shell that neither echoes nor prompts.
SHELL = "stty -echo; PS1= exec sh"


def held(fifo: Path, line: str) -> str:
    """Return a command that waits for a line on `fifo`, then runs `line`."""
    return f"read go <{fifo}; {line}"


def let_go(fifo: Path) -> None:
    """Let a command go on that is held by `fifo`."""
    fifo.write_text("go\n")


def bridges(home: Home) -> list[int]:
    """Return the pids of the bridges that run."""
    return [pid for pid in home.pids() if b"\0mcp\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def a_thread(host: outlive.Host, name: str = "agent") -> outlive.Thread:
    return outlive.Thread(host, name)


# What every client sees, over each transport, in each revision.


@EVERYWHERE
async def test_a_client_lists_the_tools_calls_them_and_sees_errors_as_a_model_does(
    home: Home, transport: str, revision: str
) -> None:
    async with connected(home.path, transport, revision) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == list(TOOLS)
        assert all(tool.title and tool.description and tool.output_schema and tool.annotations for tool in tools)

        result = await client.call_tool("exec_command", {"cmd": "printf 'one\\ntwo'; exit 3"})
        assert isinstance(result.structured_content, dict)
        assert result.structured_content["exit_code"] == 3
        assert result.structured_content["output"] == "one\ntwo"
        assert re.fullmatch(
            rf"Chunk ID: {result.structured_content['chunk_id']}\nWall time: \d+\.\d{{4}} seconds\n"
            r"Process exited with code 3\nOriginal token count: 2\nOutput:\none\ntwo",
            text_of(result),
        )

        assert await refused(client, "exec_command", cmd=["ls"]) == (
            "cmd: ['ls']: expected str, got array. A shell command line, of at most 130000 characters; put more "
            "into a file."
        )
        assert await refused(client, "write_stdin", session_id=1) == (
            "session_id: 1: thread agent has no such session; list_sessions with all=true names those there are"
        )
        with pytest.raises(MCPError, match="tool 'ls': there is none of this name; use exec_command"):
            await client.call_tool("ls", {})


@pytest.mark.parametrize(WAYS, [("stdio", NEWEST), ("http", BEFORE)])
async def test_a_client_that_asked_for_it_gets_progress_while_a_call_waits(
    home: Home, fifo: Callable[[str], Path], transport: str, revision: str
) -> None:
    gate = fifo("gate")
    told: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        if not told:
            let_go(gate)
        told.append(message)

    async with connected(home.path, transport, revision) as client:
        started = await called(client, "exec_command", cmd=held(gate, "exit 4"), yield_time_ms=250)
        arguments = {"session_ids": [started["session_id"]], "timeout_ms": 3_600_000}
        result = await client.call_tool("wait", arguments, progress_callback=on_progress)
        assert text_of(result) == f"Session {started['session_id']}: Process exited with code 4"
        assert told[0]
        assert told[0].startswith("wait: waiting for ")


@pytest.mark.parametrize(WAYS, [("stdio", BEFORE), ("http", NEWEST)])
async def test_a_call_that_is_cancelled_ends_no_session(
    home: Home, host: outlive.Host, transport: str, revision: str
) -> None:
    async with connected(home.path, transport, revision) as client:
        calling = asyncio.create_task(
            client.call_tool("exec_command", {"cmd": "sleep 1000", "yield_time_ms": 30_000})
        )
        await home.until(host, event="begin", thread="agent")
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        (session,) = (await called(client, "list_sessions"))["sessions"]
        assert session["state"] == "running"
        waited = await called(client, "wait", session_ids=[session["session_id"]], timeout_ms=0)
        assert waited == {"sessions": [{"session_id": session["session_id"]}], "timed_out": True}


# What the deaths of others cost: nothing.


async def test_one_client_session_survives_the_deaths_of_bridge_worker_and_broker_and_a_detach(
    home: Home,
) -> None:
    asked = 0

    async def answers(client: Client) -> None:
        nonlocal asked
        asked += 1
        await called(client, "write_stdin", session_id=shell, chars=f'echo "{asked}:$answer"\n')
        waited = await called(client, "wait", session_ids=[shell], match=f"(?m)^{asked}:42", timeout_ms=30_000)
        assert waited["sessions"][0]["came_true"] == "match"

    async with over_stdio(home.path, "-t", "agent") as client:
        shell = (await called(client, "exec_command", cmd=SHELL, tty=True, yield_time_ms=250))["session_id"]
        await called(client, "write_stdin", session_id=shell, chars="answer=42\n")
        await answers(client)

        async with outlive.connect() as host:
            os.kill(await home.worker(host, "agent"), signal.SIGKILL)
            await answers(client)

            os.kill((await host.status())["broker_pid"], signal.SIGKILL)
            await answers(client)

            assert (await a_thread(host).detach()).process_ids == [str(shell)]
            await answers(client)

        # In the middle of a call, and as clients end what they have started: with its process group.
        waiting = asyncio.create_task(called(client, "wait", session_ids=[shell], match="never"))
        await called(client, "list_sessions")
        (pid,) = bridges(home)
        os.killpg(pid, signal.SIGKILL)
        with pytest.raises(MCPError, match="Connection closed"):
            await waiting
    async with over_stdio(home.path, "-t", "agent") as client:
        await answers(client)


@pytest.mark.parametrize("victims", ["worker", "broker", "both"])
async def test_a_call_in_whose_middle_somebody_dies_is_answered_in_full(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path], victims: str
) -> None:
    gate = fifo("gate")
    async with over_stdio(home.path, "-t", "agent") as client:
        arguments = {"cmd": held(gate, "echo done; exit 5"), "yield_time_ms": 30_000}
        executing = asyncio.create_task(client.call_tool("exec_command", arguments))
        begun = await home.until(host, event="begin", thread="agent")
        waits = {"session_ids": [int(begun["process_id"])], "timeout_ms": 60_000}
        waiting = asyncio.create_task(client.call_tool("wait", waits))
        if victims != "broker":
            os.kill(await home.worker(host, "agent"), signal.SIGKILL)
        if victims != "worker":
            os.kill((await host.status())["broker_pid"], signal.SIGKILL)
        await home.worker(host, "agent")
        let_go(gate)
        result = await executing
        assert isinstance(result.structured_content, dict)
        assert (result.structured_content["exit_code"], result.structured_content["output"]) == (5, "done\n")
        assert text_of(await waiting) == f"Session {begun['process_id']}: Process exited with code 5"
        assert len((await called(client, "list_sessions", all=True))["sessions"]) == 1


async def test_two_clients_of_one_thread_share_its_sessions(home: Home, host: outlive.Host) -> None:
    async with (
        over_stdio(home.path, "-t", "agent") as one,
        Client(Bridge(a_thread(host)).server, mode="legacy") as two,
    ):
        shell = (await called(one, "exec_command", cmd=SHELL, tty=True, yield_time_ms=250))["session_id"]
        assert [row["session_id"] for row in (await called(two, "list_sessions"))["sessions"]] == [shell]
        await called(two, "write_stdin", session_id=shell, chars="echo from two\n")
        waited = await called(one, "wait", session_ids=[shell], match="from two", timeout_ms=30_000)
        assert waited["sessions"][0]["matched"] == "from two"


async def test_sessions_belong_to_the_thread_of_the_folder_that_the_bridge_runs_in(
    home: Home, host: outlive.Host, tmp_path: Path
) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    async with over_stdio(home.path, cwd=folder) as client:
        assert (await called(client, "exec_command", cmd="pwd"))["output"] == f"{folder}\n"
    assert [row.thread for row in await host.threads()] == [thread_of_folder(folder)]


async def test_huge_arguments_are_refused_by_name(home: Home) -> None:
    async with over_stdio(home.path) as client:
        said = await refused(client, "exec_command", cmd="x" * 3_000_000)
        assert said.startswith("cmd: 'xxxxx")
        assert len(said) < 300
        said = await refused(client, "exec_command", cmd="é" * 100_000)
        assert said.endswith("Argument list too long")
        session = (await called(client, "exec_command", cmd="cat", tty=True, yield_time_ms=250))["session_id"]
        said = await refused(client, "write_stdin", session_id=session, chars="x" * (1 << 21))
        assert said == "chars: 2097152 bytes; at most 1048576 are typed in one call"
        assert "session_id" in await called(client, "write_stdin", session_id=session, chars="x")


async def test_over_http_the_token_is_asked_for_and_foreign_pages_are_refused(home: Home) -> None:
    async with an_endpoint(home.path, "agent") as endpoint, httpx2.AsyncClient() as web:
        right = {"Authorization": "Bearer a token that nobody guesses"}
        assert (await web.post(endpoint.url, json={})).status_code == 401
        assert (await web.post(endpoint.url, json={}, headers={"Authorization": "Bearer wrong"})).status_code == 401
        foreign = await web.post(endpoint.url, json={}, headers={**right, "Origin": "https://example.com"})
        assert foreign.status_code == 403
        rebound = await web.post(endpoint.url, json={}, headers={**right, "Host": "example.com"})
        assert rebound.status_code == 421
        own = await web.post(endpoint.url, json={}, headers={**right, "Origin": "http://localhost:3000"})
        assert own.status_code not in (401, 403, 421)


async def test_a_list_of_long_commands_stays_short(host: outlive.Host) -> None:
    async with Client(Bridge(a_thread(host)).server) as client:
        await called(client, "exec_command", cmd=": " + "x" * 100_000)
        listed = await client.call_tool("list_sessions", {"all": True})
        assert len(text_of(listed)) < 1_000
        assert text_of(listed).endswith("xxx…")


async def test_without_a_broker_and_without_leave_to_start_one_a_model_is_told_so(home: Home) -> None:
    async with over_stdio(home.path, "--no-start") as client:
        assert "no broker" in await refused(client, "list_sessions")
        assert (await refused(client, "exec_command", cmd="true")).endswith(
            "; whether it was started, list_sessions with all=true shows"
        )
    assert home.pids() == []


def test_a_request_that_is_no_message_is_answered_and_the_next_one_too(home: Home) -> None:
    greeting = {"protocolVersion": BEFORE, "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
    lines = [
        r'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "\ud83d"}}',
        '{"jsonrpc": "2.0", "id": "two", "method": "tools/call", "params": 5}',
        "no JSON",
        "",
        json.dumps({"jsonrpc": "2.0", "id": 4, "method": "initialize", "params": greeting}),
    ]
    with subprocess.Popen(
        [OUTLIVE, "mcp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(home.path), text=True
    ) as client:
        assert client.stdin
        assert client.stdout
        client.stdin.write("\n".join(lines) + "\n")
        client.stdin.flush()
        half, odd, garbage, good = [json.loads(client.stdout.readline()) for _ in range(4)]
    assert (half["id"], half["error"]["code"]) == (1, types.PARSE_ERROR)
    assert half["error"]["message"].endswith(r"half a character, such as `\ud83d` alone, is no text: leave it out")
    assert (odd["id"], odd["error"]["message"]) == ("two", "this is no message of JSON-RPC 2.0")
    assert (garbage["id"], garbage["error"]["code"]) == (None, types.PARSE_ERROR)
    assert good["result"]["serverInfo"]["name"] == "outlive"


def test_a_folder_that_is_gone_is_named_with_the_remedy(home_path: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"rmdir ../gone; exec {OUTLIVE} mcp"
    ended = subprocess.run(
        ["sh", "-c", script], cwd=gone, env=environment(home_path), capture_output=True, text=True
    )
    assert ended.stderr == (
        "outlive: the folder that this runs in is gone; start it in another one, or name a thread with --thread\n"
    )


async def test_what_a_model_starts_over_http_does_not_inherit_the_token(home: Home) -> None:
    async with an_endpoint(home.path, "agent") as endpoint, endpoint.client() as client:
        assert (await called(client, "exec_command", cmd="env"))["output"].count("OUTLIVE_MCP_TOKEN") == 0


# The same server without a process of its own: what takes no other transport to be seen.


async def test_no_call_is_silent_for_longer_than_it_may(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "LONGEST", 0.3)
    async with Client(Bridge(a_thread(host)).server) as client:
        session = (await called(client, "exec_command", cmd="cat", tty=True, yield_time_ms=30_000))["session_id"]
        waits = {"session_ids": [session], "timeout_ms": 86_400_000}
        assert await called(client, "wait", **waits) == {"sessions": [{"session_id": session}], "timed_out": True}
        assert await refused(client, "wait", **waits, silence=60) == (
            "silence: 60: the answer has to come within 0.3 s here, so that so long a silence cannot be seen; use "
            "less than 0.3"
        )


async def test_of_a_broker_that_is_stopped_every_request_tells_in_time(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "SILENCE_MAX", 0.3)
    monkeypatch.setattr(transcripts, "_BEGUN_WITHIN", 0.3)
    async with Client(Bridge(a_thread(host)).server) as client:
        pid = (await host.status())["broker_pid"]
        os.kill(pid, signal.SIGSTOP)
        silence = "no answer within 0.3 s; `outlive doctor` in a shell says what is wrong"
        assert (await refused(client, "list_sessions")).startswith(f"list_sessions: {silence}")
        with pytest.raises(MCPError, match=f"resources/list: {silence}"):
            await client.list_resources()
        with pytest.raises(MCPError, match=r"no answer within 0\.3 s; listen again"):
            await client.listen(resource_subscriptions=["outlive://agent/4711"]).__aenter__()
        os.kill(pid, signal.SIGCONT)


class TaskHandle(types.Result):
    """What a task-capable client is given instead of a result, and what it is told about it."""

    result_type: Literal["task"] = "task"
    task_id: str
    status: str
    ttl_ms: int | None
    poll_interval_ms: int


class TaskState(types.Result):
    """The answer to `tasks/get`."""

    result_type: str
    task_id: str
    status: str
    result: dict[str, Any] | None = None


class GetTask(types.Request[tasks.TaskParams, Literal["tasks/get"]]):
    method: Literal["tasks/get"] = "tasks/get"
    name_param = "taskId"


class CancelTask(types.Request[tasks.TaskParams, Literal["tasks/cancel"]]):
    method: Literal["tasks/cancel"] = "tasks/cancel"
    name_param = "taskId"


async def polled(context: ClaimContext | Client, task_id: str) -> TaskState:
    """Ask for a task until it is over."""
    while True:
        request = GetTask(params=tasks.TaskParams(task_id=task_id))
        state = await context.session.send_request(request, TaskState)
        assert state.result_type == "complete"
        if state.status != "working":
            return state


class TasksOfClient(ClientExtension):
    """A client's side of tasks: polls until a task is over."""

    identifier = tasks.EXTENSION

    def claims(self) -> list[ResultClaim[Any]]:
        async def resolve(handle: TaskHandle, context: ClaimContext) -> types.CallToolResult:
            return types.CallToolResult.model_validate((await polled(context, handle.task_id)).result)

        return [ResultClaim(result_type="task", model=TaskHandle, resolve=resolve)]


async def begun_task(client: Client, **arguments: Any) -> TaskHandle:
    """Begin a wait that has to become a task."""
    handle = await client.session.call_tool("wait", arguments, allow_claimed=True)
    assert isinstance(handle, TaskHandle), handle
    assert handle.status == "working"
    return handle


async def test_a_bridge_over_http_that_is_started_again_serves_its_clients_and_goes_on_with_their_tasks(
    home: Home, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    async with (
        an_endpoint(home.path, "agent") as endpoint,
        endpoint.client(extensions=[TasksOfClient()]) as newest,
        endpoint.client("legacy") as before,
    ):
        started = await called(newest, "exec_command", cmd=held(gate, "exit 6"), yield_time_ms=250)
        handle = await begun_task(newest, session_ids=[started["session_id"]], timeout_ms=3_600_000)
        await endpoint.kill()
        await endpoint.start()
        assert len((await called(before, "list_sessions"))["sessions"]) == 1
        polling = asyncio.create_task(polled(newest, handle.task_id))
        let_go(gate)
        state = await polling
    assert state.status == "completed"
    result = types.CallToolResult.model_validate(state.result)
    assert text_of(result) == f"Session {started['session_id']}: Process exited with code 6"
    assert result.structured_content["sessions"][0]["exit_code"] == 6


async def test_a_client_that_knows_tasks_sees_only_the_result(
    host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    server = Bridge(a_thread(host)).server
    async with Client(server, extensions=[TasksOfClient()]) as client:
        started = await called(client, "exec_command", cmd=held(gate, "exit 7"), yield_time_ms=250)
        waits = {"session_ids": [started["session_id"]]}
        waiting = asyncio.create_task(called(client, "wait", **waits, timeout_ms=3_600_000))
        let_go(gate)
        assert (await waiting)["sessions"][0]["exit_code"] == 7
        # What is over at once is no task.
        assert isinstance(await client.session.call_tool("wait", waits, allow_claimed=True), types.CallToolResult)
        assert "use 0 to 86400000" not in await refused(client, "wait", session_ids=[])
        assert (await refused(client, "wait", session_ids=[1])).startswith("session_ids: 1: not all of them are")


async def test_cancelling_a_task_cancels_the_wait_and_never_the_session(host: outlive.Host) -> None:
    server = Bridge(a_thread(host)).server
    async with Client(server, extensions=[TasksOfClient()]) as client:
        session = (await called(client, "exec_command", cmd="sleep 1000", yield_time_ms=250))["session_id"]
        handle = await begun_task(client, session_ids=[session], timeout_ms=3_600_000)
        params = tasks.TaskParams(task_id=handle.task_id)
        await client.session.send_request(CancelTask(params=params), types.EmptyResult)
        assert (await polled(client, handle.task_id)).status == "cancelled"
        (row,) = (await called(client, "list_sessions"))["sessions"]
        assert (row["session_id"], row["state"]) == (session, "running")


async def test_tasks_are_for_clients_that_know_them_and_for_ids_that_are_some(host: outlive.Host) -> None:
    server = Bridge(a_thread(host)).server
    params = tasks.TaskParams(task_id="bm9uc2Vuc2U")
    async with Client(server, extensions=[TasksOfClient()]) as client:
        with pytest.raises(MCPError, match="taskId: 'bm9uc2Vuc2U': there is no such task") as wrong:
            await client.session.send_request(GetTask(params=params), TaskState)
        assert wrong.value.code == types.INVALID_PARAMS
    for mode in MODES.values():
        async with Client(server, mode=mode) as client:
            with pytest.raises(MCPError) as missing:
                await client.session.send_request(GetTask(params=params), TaskState)
            assert missing.value.code == types.MISSING_REQUIRED_CLIENT_CAPABILITY


async def test_transcripts_are_resources_and_a_client_is_told_when_there_is_more(
    host: outlive.Host, fifo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcripts, "UPDATE_PAUSE", 0.05)
    first, second = fifo("first"), fifo("second")
    async with Client(Bridge(a_thread(host)).server) as client:
        line = held(first, "printf one; ") + held(second, "printf two")
        async with client.listen(resources_list_changed=True) as listening:
            session = (await called(client, "exec_command", cmd=line, yield_time_ms=250))["session_id"]
            assert await anext(listening) == ResourcesListChanged()
        uri = f"outlive://agent/{session}"
        (resource,) = (await client.list_resources()).resources
        assert (resource.uri, resource.mime_type) == (uri, "text/plain")
        (template,) = (await client.list_resource_templates()).resource_templates
        assert template.uri_template == "outlive://agent/{session_id}"

        async with client.listen(resource_subscriptions=[uri]) as listening:
            let_go(first)
            assert await anext(listening) == ResourceUpdated(uri)
            (contents,) = (await client.read_resource(uri, cache_mode="refresh")).contents
            assert isinstance(contents, types.TextResourceContents)
            assert contents.text == "one"
            let_go(second)
            while contents.text != "onetwo":
                assert await anext(listening) == ResourceUpdated(uri)
                (contents,) = (await client.read_resource(uri, cache_mode="refresh")).contents
                assert isinstance(contents, types.TextResourceContents)
        for wrong in ("outlive://agent/1", "outlive://other/1", "file:///etc/passwd"):
            with pytest.raises(MCPError, match="uri: "):
                await client.read_resource(wrong)
        # The agent is still to get all of it.
        assert (await called(client, "write_stdin", session_id=session))["output"] == "onetwo"


async def test_a_transcript_that_never_stops_growing_is_read_up_to_where_it_was(
    host: outlive.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = a_thread(host)
    read = thread.read_output

    async def and_more(process_id: str, offset: int = 0, **settings: Any) -> Output:
        output = await read(process_id, offset, **settings)
        if offset < 10_000:  # as much as was read has come meanwhile
            return structs.replace(
                output, pieces=[(offset, b"x" * 10)], next_offset=offset + 10, written=offset + 20
            )
        return structs.replace(output, written=30)

    monkeypatch.setattr(thread, "read_output", and_more)
    async with Client(Bridge(thread).server) as client:
        await called(client, "exec_command", cmd="true")
        (one,) = (await called(client, "list_sessions", all=True))["sessions"]
        (content,) = (await client.read_resource(f"outlive://agent/{one['session_id']}")).contents
        assert isinstance(content, types.TextResourceContents)
        assert content.text == "x" * 30


async def test_a_client_of_before_subscribes_to_a_transcript(
    home: Home, host: outlive.Host, fifo: Callable[[str], Path]
) -> None:
    gate = fifo("gate")
    told: asyncio.Queue[str] = asyncio.Queue()

    async def on_message(message: Any) -> None:
        if isinstance(message, types.ResourceUpdatedNotification):
            told.put_nowait(message.params.uri)

    async with over_stdio(home.path, "-t", "agent", mode="legacy", message_handler=on_message) as client:
        session = (await called(client, "exec_command", cmd=held(gate, "echo x"), yield_time_ms=250))["session_id"]
        uri = f"outlive://agent/{session}"
        with pytest.warns(Warning, match="resources/subscribe is removed"):
            await client.subscribe_resource(uri)
        let_go(gate)
        assert await told.get() == uri
        with pytest.warns(Warning, match="resources/subscribe is removed"), pytest.raises(MCPError, match="uri: "):
            await client.subscribe_resource("outlive://agent/1")


async def test_two_hundred_polls_of_an_ended_session_all_say_how_it_ended(host: outlive.Host) -> None:
    await polls(host, 200)


@pytest.mark.long
async def test_ten_thousand_polls_of_an_ended_session_all_say_how_it_ended(host: outlive.Host) -> None:
    await polls(host, 10_000)


async def polls(host: outlive.Host, count: int) -> None:
    async with Client(Bridge(a_thread(host)).server) as client:
        started = await called(client, "exec_command", cmd="sleep 0.3; exit 8", yield_time_ms=250)
        waited = await called(client, "wait", session_ids=[started["session_id"]])
        assert waited["sessions"][0]["exit_code"] == 8
        for _ in range(count):
            answer = await called(client, "write_stdin", session_id=started["session_id"])
            assert (answer["exit_code"], "session_id" in answer) == (8, False)


def test_without_the_extra_one_is_told_how_to_get_it(home_path: Path) -> None:
    script = "import sys; sys.modules['mcp_types'] = None; from outlive.scripts.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "mcp"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    said = "outlive: mcp_types is not installed; pip install 'outlive[mcp]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_importing_outlive_loads_no_door() -> None:
    heavy = {"mcp", "mcp_types", "pydantic", "agents", "pyte", "starlette", "uvicorn"}
    look = f"import sys; assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)"
    for what in (
        "import outlive; outlive.connect, outlive.Session",
        "import outlive.scripts.cli",
        "import outlive.scripts.doors.catalogue",
    ):
        subprocess.run([sys.executable, "-c", f"{what}; {look}"], check=True)
