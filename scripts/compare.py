"""The Agents SDK's local sandbox and ours, when the application is killed and the next one resumes its session.

Prints what became of each; the exit status is 1 if ours does not answer.  Nothing is left running.

The first application starts a REPL, assigns `x`, and hands out its session's state and the REPL's id, as JSON; then
it is killed with `kill -9`.  The second resumes the session from that state, and types into that id.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from agents.sandbox.errors import PtySessionNotFoundError
from agents.sandbox.manifest import Manifest
from agents.sandbox.sandboxes.unix_local import UnixLocalSandboxClient

from . import home
from .doors.sandbox import OutliveSandboxClient

ANSWER = "42"

Client = type[UnixLocalSandboxClient]
# An application is a process of its own; forked, since the SDK takes more than a second to load.
_FORK = multiprocessing.get_context("fork")


async def begin(client: UnixLocalSandboxClient, workspace: str) -> str:
    """Be the first application; return what the next one needs to know."""
    sandbox = await client.create(manifest=Manifest(root=workspace))
    await sandbox.start()
    repl = await sandbox.pty_exec_start(sys.executable, "-q", shell=False, tty=True, yield_time_s=0.25)
    assert repl.process_id is not None, repl
    await sandbox.pty_write_stdin(session_id=repl.process_id, chars="x = 6 * 7\n")
    return json.dumps({"state": client.serialize_session_state(sandbox.state), "id": repl.process_id})


async def resume(client: UnixLocalSandboxClient, saved: str) -> str:
    """Be the second application; return what it was answered."""
    known = json.loads(saved)
    async with await client.resume(client.deserialize_session_state(known["state"])) as sandbox:
        try:
            reply = await sandbox.pty_write_stdin(
                session_id=known["id"], chars="print(x); exit()\n", yield_time_s=30
            )
        except PtySessionNotFoundError as error:
            return str(error)
        return next((line for line in reply.output.decode().split() if line == ANSWER), str(reply))


def application(
    act: Callable[[UnixLocalSandboxClient, str], Coroutine[Any, Any, str]], client: Client, given: str
) -> str:
    """Run an application, and kill it when it has nothing more to do; return what it said."""

    async def live() -> None:
        try:
            said.send(await act(client(), given))
        except Exception:
            traceback.print_exc()
        finally:
            said.close()  # at once: the SDK's threads may keep a process that has failed
        await asyncio.Event().wait()

    hearing, said = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=lambda: asyncio.run(live()))
    process.start()
    said.close()
    try:
        return str(hearing.recv())
    except EOFError:
        raise SystemExit(f"{act.__name__} with {client.__name__} failed") from None
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Compare."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: leave nothing running
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    print("A REPL knows x = 6 * 7.  kill -9 of the application; the next resumes its sandbox and types print(x):\n")
    with home.temporary_home() as folder:
        for client in (UnixLocalSandboxClient, OutliveSandboxClient):
            saved = application(begin, client, str(folder / client.__name__))
            became = application(resume, client, saved)
            print(f"  {client.__name__:<24}{became}", flush=True)
    return 0 if became == ANSWER else 1


if __name__ == "__main__":
    raise SystemExit(main())
