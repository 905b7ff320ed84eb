"""The sandbox of the Agents SDK: its contract, and what runs that end and applications that die leave of it.

No network: models are scripted.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from agents import RunConfig, Runner, RunState, function_tool, set_tracing_disabled
from agents.sandbox import LocalSnapshotSpec, Manifest, SandboxAgent, SandboxRunConfig
from agents.sandbox.capabilities import Shell
from agents.sandbox.entries import File
from agents.sandbox.errors import (
    ExecTransportError,
    InvalidManifestPathError,
    PtySessionNotFoundError,
    WorkspaceReadNotFoundError,
    WorkspaceRootNotFoundError,
)
from agents.sandbox.session import SandboxSession, SandboxSessionState
from agents.testing import ScriptedModel, assistant_message, function_call

import outlive

from .conftest import HELD, PYTHON, Home, eventually, lives
from .test_broker_restarts import kill_broker, until_said

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

set_tracing_disabled(True)
pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def client() -> outlive.OutliveSandboxClient:
    return outlive.OutliveSandboxClient()


@pytest.fixture
async def sandbox(client: outlive.OutliveSandboxClient) -> AsyncIterator[SandboxSession]:
    """A session that has started."""
    async with await client.create() as session:
        yield session
    await client.delete(session)


def thread_of(session: SandboxSession) -> str:
    return f"sandbox-{session.state.session_id}"


def has_workspace(session: SandboxSession) -> bool:
    return Path(session.state.manifest.root).exists()


def saved(client: outlive.OutliveSandboxClient, session: SandboxSession) -> str:
    """Return what an application would write down of a session."""
    return json.dumps(client.serialize_session_state(session.state))


async def resumed(text: str) -> SandboxSession:
    """Return the session as the next application has it."""
    client = outlive.OutliveSandboxClient()
    session = await client.resume(client.deserialize_session_state(json.loads(text)))
    await session.start()
    return session


async def start(session: SandboxSession, *argv: str, tty: bool = True) -> int:
    """Start a command that goes on; return its id."""
    update = await session.pty_exec_start(*argv, shell=False, tty=tty, yield_time_s=0.25)
    assert update.process_id is not None, update
    return update.process_id


async def living() -> list[str]:
    """Return the ids of all processes that live."""
    async with outlive.connect() as host:
        return [row.process_id for row in await host.processes()]


# The contract.


async def test_a_process_answers_under_its_id_and_tells_its_end_once(sandbox: SandboxSession) -> None:
    assert sandbox.supports_pty()
    line = "stty -echo; read line; echo got $line; exit 3"
    started = await sandbox.pty_exec_start(line, tty=True, yield_time_s=0)
    assert (started.exit_code, await living()) == (None, [str(started.process_id)])
    assert started.process_id is not None
    ended = await sandbox.pty_write_stdin(session_id=started.process_id, chars="x\n", yield_time_s=30)
    assert (ended.process_id, ended.exit_code, ended.output) == (None, 3, b"got x\r\n")
    assert ended.original_token_count == 2
    for unknown in (started.process_id, 999_999, -1, 10**30):
        with pytest.raises(PtySessionNotFoundError, match=f"PTY session not found: {unknown}"):
            await sandbox.pty_write_stdin(session_id=unknown, chars="")


async def test_without_a_terminal_a_process_takes_no_input_and_is_polled(
    sandbox: SandboxSession, fifo: Callable[[str], Path]
) -> None:
    go = fifo("go")
    held = await start(sandbox, "sh", "-c", HELD, str(go), "echo out; echo err >&2", tty=False)
    with pytest.raises(RuntimeError, match=r"^stdin is not available for this process$"):
        await sandbox.pty_write_stdin(session_id=held, chars="x")
    poll = asyncio.create_task(sandbox.pty_write_stdin(session_id=held, chars=""))
    await asyncio.to_thread(go.write_text, "go\n")
    ended = await poll
    assert (ended.exit_code, ended.output) == (0, b"out\nerr\n")


async def test_a_signal_is_a_negative_exit_code_and_warnings_and_truncation_are_in_the_output(
    sandbox: SandboxSession,
) -> None:
    shot = await sandbox.pty_exec_start("kill -9 $$")
    assert (shot.process_id, shot.exit_code) == (None, -9)
    process_id = await start(sandbox, "sleep", "1000")
    async with outlive.connect() as host:
        await outlive.Thread(host, thread_of(sandbox)).kill(str(process_id), signal="KILL")
        await outlive.Thread(host, thread_of(sandbox)).wait(str(process_id))
    ended = await sandbox.pty_write_stdin(session_id=process_id, chars="x")
    assert (ended.exit_code, ended.output) == (-9, b"Warning: the process has ended; nothing was typed\n")
    long = await sandbox.pty_exec_start("printf %01000d 7", max_output_tokens=10)
    assert long.original_token_count == 250
    assert long.output.decode() == "0" * 20 + "…240 tokens truncated…" + "0" * 19 + "7"
    whole = await sandbox.pty_exec_start("printf %0100000d 7")
    assert len(whole.output) == 100_000


async def test_what_cannot_be_started_says_why(sandbox: SandboxSession) -> None:
    with pytest.raises(ExecTransportError, match=r"could not be started \(exec\): nosuch"):
        await sandbox.pty_exec_start("nosuch", shell=False)
    os.rmdir(sandbox.state.manifest.root)
    with pytest.raises(WorkspaceRootNotFoundError):
        await sandbox.pty_exec_start("true")


async def test_a_lost_process_says_so_and_has_no_exit_code(home: Home, sandbox: SandboxSession) -> None:
    process_id = await start(sandbox, "sleep", "1000")
    async with outlive.connect() as host:
        await outlive.Thread(host, thread_of(sandbox)).detach()
    (broker, keeper) = home.pids("broker") + home.pids("broker.keeper")
    for pid in (keeper, broker):  # outside systemd that costs what sleeps
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not lives(broker) and not lives(keeper))
    update = await sandbox.pty_write_stdin(session_id=process_id, chars="")
    assert (update.process_id, update.exit_code) == (None, None)
    assert update.output.startswith(b"Process lost: ")


async def test_commands_have_the_environment_of_the_manifest_and_what_the_client_lets_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "of the application")
    show = 'echo "$SECRET|$TERM|$MINE|$HOME|$PWD|$PAGER"'
    manifest = Manifest(environment={"value": {"MINE": "own", "PAGER": "less"}})
    found = []
    for client in (
        outlive.OutliveSandboxClient(),
        outlive.OutliveSandboxClient(inherit_host_environment=False),
    ):
        async with await client.create(manifest=manifest) as session:
            root = session.state.manifest.root
            found.append((await session.pty_exec_start(show)).output.decode().replace(root, "ROOT"))
    assert found == ["of the application|dumb|own|ROOT|ROOT|less\n", "|dumb|own|ROOT|ROOT|less\n"]


async def test_files_are_read_and_written_in_the_workspace_and_nowhere_else(
    sandbox: SandboxSession, tmp_path: Path
) -> None:
    root = Path(sandbox.state.manifest.root)
    await sandbox.mkdir("folder", parents=True)
    await sandbox.write(Path("folder/file"), io.BytesIO(b"text"))
    assert (root / "folder" / "file").read_bytes() == b"text"
    with await sandbox.read(Path("folder/file")) as file:
        assert file.read() == b"text"
    assert [Path(entry.path).name for entry in await sandbox.ls("folder")] == ["file"]
    ran = await sandbox.exec("cat folder/file; pwd >&2; exit 3")
    assert (ran.stdout, ran.stderr, ran.exit_code) == (b"text", f"{root}\n".encode(), 3)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (root / "link").symlink_to(outside)
    for escape in ("../outside", str(outside), "link"):
        with pytest.raises(InvalidManifestPathError):
            await sandbox.read(Path(escape))
        with pytest.raises(InvalidManifestPathError):
            await sandbox.write(Path(escape), io.BytesIO(b"yours"))
    assert outside.read_text() == "mine"
    with pytest.raises(WorkspaceReadNotFoundError):
        await sandbox.read(Path("nosuch"))


async def test_a_workspace_that_was_persisted_is_hydrated_elsewhere(
    client: outlive.OutliveSandboxClient, sandbox: SandboxSession
) -> None:
    await sandbox.exec("mkdir a; echo text >a/b; chmod 750 a/b; ln -s a/b c")
    archive = await sandbox.persist_workspace()
    async with await client.create() as other:
        await other.hydrate_workspace(archive)
        shown = await other.exec("cat c; stat -c %a a/b; readlink c")
    await client.delete(other)
    assert shown.stdout == b"text\n750\na/b\n"


async def test_a_state_serializes_and_is_found_by_its_type(
    client: outlive.OutliveSandboxClient, sandbox: SandboxSession
) -> None:
    text = saved(client, sandbox)
    for state in (
        client.deserialize_session_state(json.loads(text)),
        SandboxSessionState.parse(json.loads(text)),
    ):
        assert isinstance(state, outlive.OutliveSandboxSessionState)
        assert state == sandbox.state
    other = {**json.loads(text), "type": "unix_local"}
    with pytest.raises(TypeError, match="UnixLocalSandboxSessionState is of another backend than outlive"):
        await client.resume(SandboxSessionState.parse(other))


# The run ended, or the application died.


async def test_a_state_that_claims_a_folder_of_others_is_refused_before_anything_could_remove_it(
    client: outlive.OutliveSandboxClient, sandbox: SandboxSession, tmp_path: Path
) -> None:
    payload = client.serialize_session_state(sandbox.state)
    payload["manifest"]["root"] = str(tmp_path)  # type: ignore[index]
    payload["workspace_root_owned"] = True
    with pytest.raises(ValueError, match="is not the workspace of session"):
        await client.resume(client.deserialize_session_state(payload))


async def test_a_resumed_session_has_its_processes_and_its_workspace_as_it_was(
    client: outlive.OutliveSandboxClient, tmp_path: Path
) -> None:
    manifest = Manifest(entries={"file": File(content=b"of the manifest")})
    first = await client.create(manifest=manifest, snapshot=LocalSnapshotSpec(base_path=tmp_path / "snapshots"))
    await first.start()
    await first.stop()  # which makes a snapshot
    await first.start()
    repl = await start(first, *PYTHON[:-1], "-q")
    await first.pty_write_stdin(session_id=repl, chars="answer = 6 * 7\n")
    await first.exec("echo changed >file")
    second = await resumed(saved(client, first))
    reply = await second.pty_write_stdin(session_id=repl, chars="print(answer)\n", yield_time_s=0.5)
    assert (reply.process_id, b"\n42\r\n" in reply.output) == (repl, True)
    assert (await second.exec("cat file")).stdout == b"changed\n"
    await second.aclose()
    assert await living() == []
    await client.delete(second)
    assert not has_workspace(second)
    third = await resumed(saved(client, second))  # from the snapshot: nothing lives that has a workspace
    assert (await third.exec("cat file")).stdout == b"changed\n"
    with pytest.raises(PtySessionNotFoundError) as gone:
        await third.pty_write_stdin(session_id=repl, chars="")
    assert gone.value.context["reason"] == "a run that is over ended it"
    await third.aclose()
    await client.delete(third)


async def test_a_state_written_down_before_the_start_leads_to_what_lives_by_now(
    client: outlive.OutliveSandboxClient,
) -> None:
    first = await client.create(manifest=Manifest(entries={"file": File(content=b"of the manifest")}))
    text = saved(client, first)
    await first.start()
    process_id = await start(first, "cat")
    await first.exec("echo changed >file")
    second = await resumed(text)
    assert (await second.exec("cat file")).stdout == b"changed\n"
    assert (await second.pty_write_stdin(session_id=process_id, chars="x\n")).output == b"x\r\nx\r\n"
    await second.aclose()
    await client.delete(second)


async def test_the_end_of_a_run_ends_its_processes(client: outlive.OutliveSandboxClient) -> None:
    async with await client.create() as session:
        for end in (session.stop, session.shutdown, session.pty_terminate_all, session.aclose):
            process_id = await start(session, "sleep", "1000")
            await end()
            assert await living() == []
            with pytest.raises(PtySessionNotFoundError):
                await session.pty_write_stdin(session_id=process_id, chars="")
    await client.delete(session)


async def test_what_is_kept_on_purpose_lives_on_asleep_until_it_is_ended_on_purpose(
    client: outlive.OutliveSandboxClient,
) -> None:
    session = await client.create(options=outlive.OutliveSandboxClientOptions(keep_on_exit=True))
    await session.start()
    process_id = await start(session, "cat")
    await session.aclose()
    await client.delete(session)
    async with outlive.connect() as host:
        assert [(row.state, row.detached) for row in await host.threads()] == [("asleep", 1)]
    again = await resumed(saved(client, session))
    reply = await again.pty_write_stdin(session_id=process_id, chars="x\n")
    assert reply.output == b"x\r\nx\r\n"
    await again.pty_terminate_all()
    assert await living() == []
    await client.delete(again)
    assert not has_workspace(session)


async def test_a_session_that_starts_no_process_needs_no_broker(home: Home) -> None:
    client = outlive.OutliveSandboxClient()
    async with await client.create() as session:
        await session.exec("true")
    await client.delete(session)
    assert home.pids() == []


async def test_a_call_is_answered_and_counts_once_though_worker_and_broker_are_killed_within_it(
    home: Home, sandbox: SandboxSession, fifo: Callable[[str], Path], tmp_path: Path
) -> None:
    async def kill_both() -> None:
        async with outlive.connect() as host:
            await home.kill_worker(host, thread_of(sandbox))
        await kill_broker(home)

    go, runs = fifo("go"), tmp_path / "runs"
    line = f"echo run >>{runs}; stty -echo; read go <{go}; while read line; do echo got $line; done"
    call = asyncio.create_task(sandbox.pty_exec_start(line, tty=True, yield_time_s=3))
    await eventually(runs.exists)
    await kill_both()
    started = await call
    assert (started.process_id, await asyncio.to_thread(runs.read_text)) == (int(*await living()), "run\n")
    await asyncio.to_thread(go.write_text, "go\n")
    process_id = started.process_id or 0
    call = asyncio.create_task(sandbox.pty_write_stdin(session_id=process_id, chars="once\n", yield_time_s=3))
    await until_said(home, thread_of(sandbox), str(process_id), b"got once")
    await kill_both()
    reply = await call
    assert (reply.process_id, reply.output) == (process_id, b"got once\r\n")


# Agents.


def exec_command(cmd: str, **arguments: object) -> Any:
    arguments = {"cmd": cmd, "tty": True, "yield_time_ms": 250, **arguments}
    return function_call("exec_command", json.dumps(arguments), call_id="exec")


def write_stdin(session_id: int, chars: str) -> Any:
    arguments = {"session_id": session_id, "chars": chars, "yield_time_ms": 500}
    return function_call("write_stdin", json.dumps(arguments), call_id="write")


def last_output(call: Any) -> str:
    """Return the result of the tool that a model called last, as it is shown to it."""
    return str(call.input[-1]["output"])


def session_id_in(text: str) -> int:
    found = re.search(r"^Process running with session ID (\d+)$", text, re.MULTILINE)
    assert found, text
    return int(found[1])


def agent_of(steps: Sequence[Any], **arguments: Any) -> SandboxAgent:
    return SandboxAgent(name="scripted", model=ScriptedModel(steps), capabilities=[Shell()], **arguments)


# An application, but for the README's code: its agent starts a REPL and assigns a variable there, tells the id when
# its model is asked once more, and never hears from that again.
APPLICATION = """
import asyncio, re, sys
from agents.testing import ScriptedModel, function_call

def call(name, **arguments):
    return [function_call(name, json.dumps(arguments), call_id=name)]

def repl(asked):
    return int(re.search(r"session ID (\\d+)", asked.input[-1]["output"])[1])

def assign(asked):
    return call("write_stdin", session_id=repl(asked), chars="answer = 6 * 7\\n")

async def never(asked):
    print(repl(asked), flush=True)
    await asyncio.Event().wait()

start = call("exec_command", cmd=f"exec {sys.executable} -q", tty=True, yield_time_ms=250)
model = ScriptedModel([start, {"responder": assign}, {"responder": never}])
asyncio.run(ask(SandboxAgent(name="scripted", model=model), "How much is 6 * 7?", Path("saved.json")))
"""


async def test_the_code_of_the_readme_finds_its_repl_after_kill_9_of_the_application(tmp_path: Path) -> None:
    section = README.split("\n## In the Agents SDK\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code + APPLICATION),
        cwd=tmp_path,
        env={**os.environ, "OPENAI_AGENTS_DISABLE_TRACING": "1"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    repl = int(await process.stdout.readline())
    process.kill()
    await process.communicate()

    scope: dict[str, Any] = {}
    exec(code, scope)
    tell = [{"responder": lambda call: [assistant_message(last_output(call))]}]
    agent = agent_of([[write_stdin(repl, "print(answer)\n")], *tell])
    told = await scope["ask"](agent, "And?", tmp_path / "saved.json")
    assert session_id_in(told) == repl
    assert "\n42\n" in told.replace("\r", "")


async def test_a_repl_that_is_kept_lives_through_a_pause_for_approval(client: outlive.OutliveSandboxClient) -> None:
    asked = function_tool(lambda: "yes", name_override="ask_a_person", needs_approval=True)
    run_config = RunConfig(
        sandbox=SandboxRunConfig(client=client, options=outlive.OutliveSandboxClientOptions(keep_on_exit=True))
    )
    first = agent_of(
        [[exec_command("exec cat")], [function_call("ask_a_person", "{}", call_id="ask")]], tools=[asked]
    )
    paused = await Runner.run(first, "Go.", run_config=run_config)
    (cat,) = await living()
    second = agent_of(
        [[write_stdin(int(cat), "x\n")], {"responder": lambda call: [assistant_message(last_output(call))]}],
        tools=[asked],
    )
    state = await RunState.from_json(second, paused.to_state().to_json())
    (interruption,) = state.get_interruptions()
    state.approve(interruption)
    result = await Runner.run(second, state, run_config=run_config)
    assert "x\r\nx\r\n" in result.final_output
    assert await living() == [cat]


async def test_the_processes_of_a_run_that_made_its_own_session_are_ended_with_it(
    client: outlive.OutliveSandboxClient,
) -> None:
    alive: list[str] = []

    async def look(call: Any) -> Any:
        alive.extend(await living())
        return [assistant_message("done")]

    agent = agent_of([[exec_command("exec cat")], {"responder": look}])
    await Runner.run(agent, "Go.", run_config=RunConfig(sandbox=SandboxRunConfig(client=client)))
    assert (len(alive), await living()) == (1, [])


async def test_the_example_goes_on_with_its_shell_and_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "scripts" / "examples" / "outlived_agent.py"))
    tell = {"responder": lambda call: [assistant_message(last_output(call))]}
    started = await example["ask"](agent_of([[exec_command("exec cat")], tell]), "Go.")
    told = await example["ask"](agent_of([[write_stdin(session_id_in(started), "x\n")], tell]), "On.")
    assert "x\r\nx\r\n" in told
    await example["end"]()
    assert await living() == []


# The comparison, and what is loaded when.


async def run_python(*arguments: str) -> tuple[int | None, str]:
    """Run Python; return its exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_the_comparison_shows_that_theirs_is_lost_and_ours_answers() -> None:
    status, output = await run_python("-m", "outlive.scripts.compare")
    assert re.search(r"^  UnixLocalSandboxClient +PTY session not found: \d+$", output, re.MULTILINE), output
    assert re.search(r"^  OutliveSandboxClient +42$", output, re.MULTILINE), output
    assert status == 0


async def test_the_sdk_is_loaded_only_for_its_sandbox_and_a_missing_one_is_named() -> None:
    loaded = "import outlive, sys; print({'agents', 'mcp', 'pydantic', 'pyte'} & set(sys.modules))"
    assert await run_python("-c", loaded) == (0, "set()\n")
    missing = "import outlive, sys; sys.modules['agents'] = None; outlive.OutliveSandboxClient"
    status, output = await run_python("-c", missing)
    assert status == 1
    assert "the sandbox needs outlive[openai-agents]" in output
