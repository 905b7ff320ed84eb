"""A sandbox for OpenAI's Agents SDK whose processes outlive the application: `SandboxAgent` runs on it unchanged.

The processes of a sandbox session are those of the thread `sandbox-SESSION_ID`, under the same ids: whoever resumes
the session from its state finds them there, whatever became of the application, its worker or the broker.

Always true
    The end of a run ends the session's processes (`stop`, `shutdown`, `aclose`, `pty_terminate_all`, the client's
    `delete`); nothing else does.  An application that dies says none of these, so they live on.
    With `keep_on_exit` only `pty_terminate_all` ends them, and the workspace is there as long as one of them lives.
    Over the workspace of living processes neither the manifest nor a snapshot is laid again.
    One end is told once to each application; then the id is unknown, as the SDK wants it.

Not here
    Files, the workspace's archive and `exec`: these are the SDK's own for this host, from its `unix_local` backend.
    `exec` stays a child of the application: its caller waits for it, and wants stdout and stderr apart, which are
    one stream in a transcript.
    Isolation: commands run as you, on this host.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

try:
    from agents.sandbox.errors import ExecTransportError, PtySessionNotFoundError, WorkspaceRootNotFoundError
except ModuleNotFoundError as error:
    raise ImportError(f"{error}; the sandbox needs outlive[openai-agents]") from None
from agents.sandbox.manifest import Manifest
from agents.sandbox.sandboxes.unix_local import (
    UnixLocalSandboxClient,
    UnixLocalSandboxSession,
    UnixLocalSandboxSessionState,
)
from agents.sandbox.session import BaseSandboxClientOptions, SandboxSession, SandboxSessionState
from agents.sandbox.session.pty_types import PtyExecUpdate
from agents.sandbox.snapshot import SnapshotBase, SnapshotSpec, resolve_snapshot
from agents.sandbox.types import User

from ...common.client import Thread, connect
from ...common.errors import (
    BadRequest,
    ExpiredProcess,
    OutliveError,
    SpawnError,
    StdinClosed,
    UnknownProcess,
    UnknownThread,
)
from ...common.messages import ProcessRow
from ...common.names import check_process
from ...common.paths import Paths, private_folder
from ...common.response import Response

# Without a limit of the caller's the SDK wants everything; a transcript keeps less than this, in tokens of 4 bytes.
_NO_LIMIT = 1_000_000
# Milliseconds; `write_stdin` waits no longer in any case.
_YIELD_MAX = 300_000
# The root that stands for "a workspace of the session's own".
_DEFAULT_ROOT = Manifest().root


class OutliveSandboxClientOptions(BaseSandboxClientOptions):
    """How a session is made.

    `exposed_ports`: those that `resolve_exposed_port` answers for.  `keep_on_exit`: the end of a run, or of the
    session, ends no process and puts the thread to bed; default: they are ended.
    """

    type: Literal["outlive"] = "outlive"
    exposed_ports: tuple[int, ...] = ()
    keep_on_exit: bool = False


class OutliveSandboxSessionState(UnixLocalSandboxSessionState):
    """What finds a session again; `OutliveSandboxClient.serialize_session_state` makes JSON of it."""

    type: Literal["outlive"] = "outlive"  # type: ignore[assignment]  # a state's type is its backend's name
    keep_on_exit: bool = False


class OutliveSandboxSession(UnixLocalSandboxSession):
    """One workspace on this host, and the processes of one thread."""

    state: OutliveSandboxSessionState

    def __init__(self, *, state: OutliveSandboxSessionState) -> None:
        super().__init__(state=state)
        # Whether the thread may have processes: one without any needs no broker.
        self._used = False
        self._reattached = False
        self._told: set[int] = set()

    # Processes.

    async def pty_exec_start(
        self,
        *command: str | Path,
        timeout: float | None = None,
        shell: bool | list[str] = True,
        user: str | User | None = None,
        tty: bool = False,
        yield_time_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> PtyExecUpdate:
        """Start a command in the workspace; return what it printed until its end or for `yield_time_s`.

        `yield_time_s`: default 10, clamped to 0.25–30.  `timeout` is the SDK's, and means nothing: nothing is ended
        for being slow.  Raises `ExecTransportError` when it could not be started, `WorkspaceRootNotFoundError`.
        """
        root = Path(self.state.manifest.root)
        argv = self._prepare_exec_command(*command, shell=shell, user=user)
        allowed = self._host_environment_allowlist
        inherited = {name: value for name, value in os.environ.items() if allowed is None or name in allowed}
        own = {**await self.state.manifest.environment.resolve(), "HOME": str(root)}
        try:
            async with self._thread() as thread:
                response = await thread.exec_command(
                    argv,
                    workdir=root,
                    tty=tty,
                    yield_time_ms=_milliseconds(yield_time_s, 10_000),
                    max_output_tokens=_tokens(max_output_tokens),
                    environment=inherited,
                    env=own,
                )
        except OutliveError as error:
            if isinstance(error, SpawnError) and not await asyncio.to_thread(root.is_dir):
                raise WorkspaceRootNotFoundError(path=root, cause=error) from error
            raise _transport_error(argv, error) from error
        return _update(response)

    async def pty_write_stdin(
        self,
        *,
        session_id: int,
        chars: str,
        yield_time_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> PtyExecUpdate:
        """Type `chars` into a process, or just poll it; return what it printed since the last call.

        `yield_time_s`: default 0.25, clamped to 0.25–30 (empty `chars`: 5–300).  Raises `PtySessionNotFoundError`
        for an id that is not known, or no longer, `RuntimeError` for input to a process without a terminal.
        """
        if session_id in self._told:
            raise _not_found(session_id, "its end was told before")
        try:
            check_process(str(session_id))
        except BadRequest as error:
            raise _not_found(session_id, error) from error
        try:
            async with self._thread() as thread:
                response = await thread.write_stdin(
                    str(session_id),
                    chars,
                    yield_time_ms=_milliseconds(yield_time_s, 250),
                    max_output_tokens=_tokens(max_output_tokens),
                )
        except (UnknownProcess, UnknownThread, ExpiredProcess) as error:
            raise _not_found(session_id, error) from error
        except StdinClosed as error:
            raise RuntimeError("stdin is not available for this process") from error  # the SDK looks at this text
        except OutliveError as error:
            raise _transport_error(("write_stdin", str(session_id)), error) from error
        if (response.outcome or {}).get("by") == "shutdown":
            raise _not_found(session_id, "a run that is over ended it")
        if response.session_id is None:
            self._told.add(session_id)
        return _update(response)

    async def pty_terminate_all(self) -> None:
        """End every process of the session, also what another application started in it."""
        if self._used:
            async with self._thread() as thread:
                with suppress(UnknownThread):
                    await thread.shutdown(all=True)

    async def living(self) -> list[ProcessRow]:
        """Return the session's processes that live."""
        if not self._used:
            return []
        async with self._thread() as thread:
            try:
                return await thread.processes()
            except UnknownThread:
                return []

    @asynccontextmanager
    async def _thread(self) -> AsyncIterator[Thread]:
        """Lend the session's thread, on a connection of this call's own: that takes 1 ms, and suits any loop."""
        self._used = True
        async with connect() as host:
            yield Thread(host, f"sandbox-{self.state.session_id}")

    # What the SDK calls at a session's start and end.

    async def _ensure_backend_started(self) -> None:
        self._reattached = bool(await self.living())
        there = await asyncio.to_thread(os.path.isdir, self.state.manifest.root)
        self._set_start_state_preserved(self._reattached or (self.state.workspace_root_ready and there))

    async def _can_reuse_restorable_snapshot_workspace(self) -> bool:
        return self._reattached or await super()._can_reuse_restorable_snapshot_workspace()

    async def _before_stop(self) -> None:
        if not self.state.keep_on_exit:
            await super()._before_stop()

    async def _before_shutdown(self) -> None:
        if not self.state.keep_on_exit:
            await super()._before_shutdown()
        elif self._used:
            async with self._thread() as thread:
                await thread.detach()


class OutliveSandboxClient(UnixLocalSandboxClient):
    """Creates, resumes and deletes sandbox sessions whose processes outlive the application.

    The parameters are those of the SDK's `UnixLocalSandboxClient`.
    """

    backend_id = "outlive"

    async def create(  # type: ignore[override]  # the options are those of this backend
        self,
        *,
        snapshot: SnapshotSpec | SnapshotBase | None = None,
        manifest: Manifest | None = None,
        options: OutliveSandboxClientOptions | None = None,
    ) -> SandboxSession:
        """Create a session; without a root of its own its workspace is a folder in outlive's state folder."""
        manifest = manifest or Manifest()
        options = options or OutliveSandboxClientOptions()
        self._validate_manifest_for_create(manifest)
        for grant in manifest.extra_path_grants:
            if grant.host_path is not None:
                raise ValueError(
                    f"manifest: the grant of {grant.path} has the host_path {grant.host_path}; "
                    "here both are one path: leave host_path out"
                )
        session_id = uuid.uuid4()
        owned = manifest.root == _DEFAULT_ROOT
        if owned:
            # Not in /tmp: it must be there as long as the processes in it.
            root = Paths.from_environment().state / "workspaces" / str(session_id)
            private_folder(root)
            manifest = manifest.model_copy(update={"root": str(root)}, deep=True)
        return self._session(
            OutliveSandboxSessionState(
                session_id=session_id,
                manifest=manifest,
                snapshot=resolve_snapshot(snapshot, str(session_id)),
                workspace_root_owned=owned,
                exposed_ports=options.exposed_ports,
                keep_on_exit=options.keep_on_exit,
            )
        )

    async def resume(self, state: SandboxSessionState) -> SandboxSession:
        """Return the session of `state`, with the processes that live of it.

        Raises `TypeError` for a state of another backend, `ValueError` for one whose workspace is not its own.
        """
        if not isinstance(state, OutliveSandboxSessionState):
            raise TypeError(f"state: a {type(state).__name__} is of another backend than {self.backend_id}")
        root = state.manifest.root
        if state.workspace_root_owned and Path(root).name != str(state.session_id):  # `delete` would remove it
            raise ValueError(f"state: {root} is not the workspace of session {state.session_id}; it was changed")
        state.assert_path_grants_rebound()
        return self._session(state, used=True)

    async def delete(self, session: SandboxSession) -> SandboxSession:
        """End the session's processes and remove its workspace, if that is its own.

        With `keep_on_exit` nothing is done while a process lives: the SDK calls this at the end of each run.
        """
        inner = session._inner
        if not isinstance(inner, OutliveSandboxSession):
            raise TypeError(f"session: a {type(inner).__name__} is of another backend than {self.backend_id}")
        if inner.state.keep_on_exit and await inner.living():
            return session
        await inner.pty_terminate_all()
        return await super().delete(session)

    def deserialize_session_state(self, payload: dict[str, object]) -> SandboxSessionState:
        """Return the state that `serialize_session_state` made `payload` of."""
        return self._deserialize_session_state_payload(payload, OutliveSandboxSessionState)

    def _session(self, state: OutliveSandboxSessionState, *, used: bool = False) -> SandboxSession:
        inner = OutliveSandboxSession(state=state)
        inner._used = used
        inner._host_environment_allowlist = self._host_environment_allowlist
        return self._wrap_session(inner, instrumentation=self._instrumentation)


def _milliseconds(seconds: float | None, default: int) -> int:
    return default if seconds is None else max(0, min(int(seconds * 1000), _YIELD_MAX))


def _tokens(limit: int | None) -> int:
    return _NO_LIMIT if limit is None else max(0, min(limit, _NO_LIMIT))


def _not_found(session_id: int, reason: object) -> PtySessionNotFoundError:
    return PtySessionNotFoundError(session_id=session_id, context={"reason": str(reason)})


def _transport_error(command: Sequence[str], error: OutliveError) -> ExecTransportError:
    return ExecTransportError(command=command, message=str(error), cause=error)


def _update(response: Response) -> PtyExecUpdate:
    """Return a response as the SDK wants it: a signal is a negative exit code, our words are part of the output."""
    outcome = response.outcome or {}
    lost = [response.sentence] if outcome.get("kind") == "lost" else []
    words = [*(f"Warning: {warning}" for warning in response.warnings), *lost, response.output]
    return PtyExecUpdate(
        process_id=response.session_id,
        output="\n".join(words).encode("utf-8", "replace"),
        exit_code=-outcome["signal"] if outcome.get("kind") == "signaled" else response.exit_code,
        original_token_count=response.original_token_count,
    )
