"""A `SandboxAgent` of OpenAI's Agents SDK whose shells and REPLs outlive the application: kill it, and ask on.

    export OPENAI_API_KEY=…
    python scripts/examples/outlived_agent.py "Start a Python REPL and load numbers.csv into it."
    python scripts/examples/outlived_agent.py "What is the mean of the second column?"
    python scripts/examples/outlived_agent.py

Each line is an application of its own, and may be killed with `kill -9` at any time; the next one finds the REPL
and what it knows.  Without a question the session is ended, with all that runs in it.  The files `sandbox.json` and
`conversation.db` in the current directory are what is kept in between.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from pathlib import Path

from agents import RunConfig, Runner, SQLiteSession
from agents.sandbox import SandboxAgent, SandboxRunConfig
from agents.sandbox.session import SandboxSession, SandboxSessionState

from outlive import OutliveSandboxClient

SAVED = Path("sandbox.json")
client = OutliveSandboxClient()


async def sandbox_of_last_time() -> SandboxSession:
    """Return the session of the last application, however that ended; else a new one."""
    state = saved()
    sandbox = await client.resume(state) if state else await client.create()
    await sandbox.start()
    save(sandbox.state)
    return sandbox


def save(state: SandboxSessionState) -> None:
    """Write down what the next application needs."""
    SAVED.write_text(json.dumps(client.serialize_session_state(state)))


def saved() -> SandboxSessionState | None:
    """Return what the last application wrote down."""
    return client.deserialize_session_state(json.loads(SAVED.read_text())) if SAVED.exists() else None


async def ask(agent: SandboxAgent, question: str) -> str:
    """Have the agent answer; the session stays open, so that what it has started runs on."""
    sandbox = await sandbox_of_last_time()
    run_config = RunConfig(sandbox=SandboxRunConfig(session=sandbox))
    with closing(SQLiteSession("conversation", "conversation.db")) as conversation:
        result = await Runner.run(agent, question, session=conversation, run_config=run_config)
    return str(result.final_output)


async def end() -> None:
    """End everything that runs in the session, and remove its workspace."""
    sandbox = await sandbox_of_last_time()
    await sandbox.aclose()
    await client.delete(sandbox)


if __name__ == "__main__":
    if sys.argv[1:]:
        agent = SandboxAgent(name="Analyst", instructions="Work in one Python REPL; use tty=true, and keep it.")
        print(asyncio.run(ask(agent, sys.argv[1])))
    else:
        asyncio.run(end())
        SAVED.unlink()
