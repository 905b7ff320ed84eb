"""`Session`: what a program has in its hands, and its API towards its own thread.

It is the `Thread` of the Python API, connected to the worker's own broker, so that a program and a client can do
the same.  A call goes by way of the broker, though the process is held here: the broker knows the calls of workers
before this one, also those whose processes have ended and were collected.  So a program that is run again, since
its worker died in the middle, is given what it had started by then and what it had been answered: it starts nothing
twice, and types nothing twice.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence

from ..common.client import Host, Thread
from ..common.errors import BadRequest
from ..common.messages import DetachedProcessSummary, Inventory, RuleRow
from ..common.program import ProcessSummary, Wake
from ..common.response import Response


class Session(Thread):
    """One run's view of its thread."""

    def __init__(self, host: Host, wake: Wake) -> None:
        super().__init__(host, wake.thread)
        # The first match is the same whenever this run comes again, and its time tells it from those of a journal
        # that was lost.
        self._run = f"{wake.number} {wake.matches[0].at}"
        self._calls: Counter[str] = Counter()

    async def exec_command(
        self,
        cmd: str | Sequence[str | bytes],
        *,
        workdir: str | os.PathLike[str] | None = None,
        tty: bool = False,
        size: tuple[int, int] = (80, 24),
        yield_time_ms: int = 10_000,
        max_output_tokens: int = 10_000,
        shell: str | None = None,
        login: bool = True,
        env: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        call_id: str | None = None,
        wake_on: Sequence[object] = (),
    ) -> Response:
        """Start a command, as `Thread.exec_command` does; without a `call_id` it counts once in this run.

        That is: when the program is run again since it failed, or its worker died, the same call (the first,
        second, … of this command in this directory) returns the same process.
        """
        return await super().exec_command(
            cmd,
            workdir=workdir,
            tty=tty,
            size=size,
            yield_time_ms=yield_time_ms,
            max_output_tokens=max_output_tokens,
            shell=shell,
            login=login,
            env=env,
            environment=environment,
            call_id=call_id or self._name(cmd, workdir),
            wake_on=wake_on,
        )

    async def write_stdin(
        self,
        process_id: str,
        chars: str | bytes = "",
        *,
        yield_time_ms: int = 250,
        max_output_tokens: int = 10_000,
        resume: bool = True,
        write_id: str | None = None,
    ) -> Response:
        """Type, or poll, as `Thread.write_stdin` does; without a `write_id` it counts once in this run.

        When the program is run again, the same call (the first, second, … of these `chars` to this process) types
        nothing more, and is answered with the output since the first time.
        """
        return await super().write_stdin(
            process_id,
            chars,
            yield_time_ms=yield_time_ms,
            max_output_tokens=max_output_tokens,
            resume=resume,
            write_id=write_id or self._name(["write", process_id, chars], None),
        )

    async def watch(self, process_id: str, *rules: object, watch_id: str | None = None) -> list[RuleRow]:
        """Set rules, as `Thread.watch` does; without a `watch_id` it counts once in this run."""
        named = watch_id or self._name(["watch", process_id, *(str(rule) for rule in rules)], None)
        return await super().watch(process_id, *rules, watch_id=named)

    async def detach(self, *, keep_worker: bool = False) -> DetachedProcessSummary:
        """Raise `BadRequest`, unless `keep_worker`: a program goes to bed by returning."""
        if not keep_worker:
            raise BadRequest("detach: this is the thread's own program; return, and the thread goes to bed")
        return await super().detach(keep_worker=True)

    async def processes(self) -> list[ProcessSummary]:  # type: ignore[override]
        """Return the thread's processes: those that live, that ended and have unread output, or are lost."""
        return await self.host.call(Inventory(thread=self.thread_id), list[ProcessSummary])

    def _name(self, cmd: str | Sequence[str | bytes], workdir: str | os.PathLike[str] | None) -> str:
        """Return the id of a call."""
        what = f"{self._run} {cmd!r} {workdir!r}"
        self._calls[what] += 1
        digest = hashlib.sha256(f"{what} {self._calls[what]}".encode("utf-8", "surrogatepass")).hexdigest()
        return f"wake-{digest[:24]}"
