"""A thread's program: a function that is loaded into this worker, or a command that is run; one run at a time.

    MODULE:FUNCTION     imported; MODULE is looked for in the directory of `start` first
    FILE.py:FUNCTION    loaded from that file; what stands beside it can be imported
    COMMAND...          a process of the thread, like any other, with the wake as JSON on its standard input

A function is `async def main(session, wake)`.  It runs in the worker's loop, beside its pumps and its calls: one
that blocks (`time.sleep`, a long computation, a request without `await`) keeps them waiting, and its children too
as soon as they have filled their pipes; nothing is lost by that.  What blocks belongs into `asyncio.to_thread`.
What it prints goes to the log.

A command is not ended by the death of its worker: the next one finds it by its call id, and waits on.  It has the
JSON in `OUTLIVE_WAKE` too, unless that is longer than a variable may be.

Always true
    A run is asked for by its number; asked again, it is not run again.
    A worker loads a function once in its life, so that every start has the code as it is then.

Not here
    When it is run, and what its failure means: `broker.delivery`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ..common.client import Host
from ..common.errors import BadRequest, OutliveError, Unavailable
from ..common.messages import Load, Run
from ..common.outcome import Outcome
from ..common.paths import Paths
from ..common.program import Program, Wake
from .agent import Session

# Bytes of a wake that a variable can have: the kernel takes 128 KiB with its name, for each.
VARIABLE_MAX = 100_000
VARIABLE = "OUTLIVE_WAKE"
# The shell reads the wake from a file, and becomes the command.
_COMMAND = ["/bin/sh", "-c", 'input=$1; shift; exec "$@" <"$input"', "sh"]
# Characters of a failure, for people.
_FAILURE_MAX = 2000
# Seconds between two tries to reach a broker that is away: a program is not to fail because of that.
_PAUSE = 1.0

Main = Callable[[Session, Wake], Awaitable[None]]


class Programs:
    """What this worker runs for its thread."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._loaded: tuple[Program, Main] | None = None
        self._host: Host | None = None
        # The run that is under way, or was the last.
        self._run = 0
        self._task: asyncio.Task[str] | None = None
        self._command: tuple[Session, str] | None = None

    async def load(self, body: Load) -> None:
        """Load a function, and see whether it is one; raises `BadRequest`."""
        program = body.program
        if not await asyncio.to_thread(os.path.isdir, program.workdir):  # it may be on a dead network mount
            raise BadRequest(
                f"program {program.label}: directory {os.fsdecode(program.workdir)} does not exist; start it "
                "from one that does"
            )
        if program.function:
            self._main(program)
            return
        name = program.argv[0]
        command = os.path.join(program.workdir, name) if b"/" in name else name
        if not await asyncio.to_thread(shutil.which, os.fsdecode(command), path=os.fsdecode(program.path) or None):
            raise BadRequest(
                f"program {program.label}: {os.fsdecode(name)} cannot be executed, or is not in PATH; "
                "a function is named as FILE.py:FUNCTION or MODULE:FUNCTION"
            )

    async def run(self, body: Run) -> str:
        """Run a program to its return; the answer is its failure, for people, or nothing."""
        if self._task is None or body.wake.run != self._run:
            if self._task and not self._task.done():
                await self._cancel(self._task)
            self._run = body.wake.run
            self._task = asyncio.create_task(self._carry_out(body.program, body.wake))
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._task.cancelled():
                raise OutliveError("the run was ended") from None
            raise

    async def cancel(self) -> None:
        """End the run that is under way, and the command that it is."""
        if self._command:
            session, process_id = self._command
            with suppress(OutliveError):
                await session.kill(process_id)
        if self._task and not self._task.done():
            await self._cancel(self._task)

    async def close(self) -> None:
        """End a function; a command runs on, for the next worker."""
        if self._task and not self._task.done():
            await self._cancel(self._task)
        if self._host:
            await self._host.__aexit__()

    async def _cancel(self, task: asyncio.Task[str]) -> None:
        task.cancel()
        await asyncio.wait({task}, timeout=_PAUSE)  # it may not want to; it dies with us

    async def _carry_out(self, program: Program, wake: Wake) -> str:
        try:
            session = Session(await self._connected(), wake)
            if program.function:
                await self._main(program)(session, wake)
                return ""
            return await self._run_command(program, session, wake)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it is, the run is over, and has failed
            failure = "".join(traceback.format_exception(error))
            print(f"program {program.label}: run {wake.run}: {failure}", file=sys.stderr, flush=True)
            if isinstance(error, BadRequest):
                return str(error)[:_FAILURE_MAX]
            return _place(error)[:_FAILURE_MAX]

    async def _connected(self) -> Host:
        """Return a connection to our broker; it may be away for a while."""
        while self._host is None:
            host = Host(self._paths)
            try:
                self._host = await host.__aenter__()
            except Unavailable:
                await asyncio.sleep(_PAUSE)
        return self._host

    # Functions.

    def _main(self, program: Program) -> Main:
        if self._loaded is None:
            self._loaded = program, _load(program)
        loaded, main = self._loaded
        if loaded != program:
            raise BadRequest(f"program {program.label}: this worker has loaded {loaded.label} before")
        return main

    # Commands.

    async def _run_command(self, program: Program, session: Session, wake: Wake) -> str:
        text = msgspec.json.encode(wake)
        file = self._input(wake, text)
        environment = {"PATH": os.fsdecode(program.path)}
        if len(text) <= VARIABLE_MAX:
            environment[VARIABLE] = text.decode()
        response = await session.exec_command(
            [*_COMMAND, str(file), *program.argv],
            workdir=os.fsdecode(program.workdir),
            env=environment,
            call_id=f"run-{wake.run}-{wake.matches[0].at}",
        )
        if response.outcome is None:
            self._command = session, response.process_id
            await session.wait(response.process_id)
            self._command = None
            response = await session.write_stdin(response.process_id)  # it is collected by that
        file.unlink(missing_ok=True)
        assert response.outcome is not None
        outcome = Outcome(**response.outcome)
        if outcome.exit_code == 0:
            return ""
        return f"{program.label}: {outcome.sentence()}; its output ended with: {response.output[-500:]}"

    def _input(self, wake: Wake, text: bytes) -> Path:
        """Write the wake to where a command reads it from; one that has begun keeps what it opened."""
        folder = self._paths.run / "wakes"
        folder.mkdir(mode=0o700, exist_ok=True)
        file = folder / f"{wake.thread}.json"
        draft = folder / f"{wake.thread}.{os.getpid()}"
        draft.write_bytes(text)
        draft.replace(file)
        return file


def _load(program: Program) -> Main:
    """Return a program's function; raises `BadRequest`, which says what is wrong with it and what to do."""
    where, colon, name = program.function.rpartition(":")
    if not (where and colon and name.isidentifier()):
        raise BadRequest(
            f"program {program.function!r}: write MODULE:FUNCTION or FILE.py:FUNCTION, or -- and a command"
        )
    os.chdir(program.workdir)
    os.environb[b"PATH"] = program.path
    sys.stdout = sys.stderr
    try:
        module = _load_file(program.function, where) if where.endswith(".py") else _import(where)
    except BadRequest:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise BadRequest(
            f"program {program.function}: {where} cannot be imported: {_place(error)}; repair it, and start again"
        ) from None
    main = getattr(module, name, None)
    if main is None:
        raise BadRequest(f"program {program.function}: {where} has nothing called {name}; name a function of it")
    if not inspect.iscoroutinefunction(main):
        raise BadRequest(
            f"program {program.function}: {name} is no coroutine function; write `async def {name}(session, wake)`"
        )
    try:
        inspect.signature(main).bind(None, None)
    except TypeError as error:
        raise BadRequest(
            f"program {program.function}: {name} cannot be called with a session and a wake ({error}); write "
            f"`async def {name}(session, wake)`"
        ) from None
    return main  # type: ignore[no-any-return]


def _load_file(function: str, where: str) -> Any:
    file = os.path.abspath(where)
    if not os.path.isfile(file):
        raise BadRequest(f"program {function}: {file} is no file; name one, relative to the directory of `start`")
    sys.path.insert(0, os.path.dirname(file))
    name = os.path.basename(file).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def _import(where: str) -> Any:
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(where)


def _place(error: BaseException) -> str:
    """Return an error in one line, with the place where it was raised."""
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
