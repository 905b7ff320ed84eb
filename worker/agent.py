"""`Session`: what a program has in its hands, and its API towards its own thread.

It is the `Thread` of the Python API, connected to the worker's own broker, so that a program and a client can do
the same.  A call goes by way of the broker, though the process is held here: the broker knows the calls of workers
before this one, also those whose processes have ended and were collected.

Always true
    A call without an id of its own counts once in its run.  A program that is run again, since it failed or its
    worker died, is given what it had started by then, and what it had been answered: the first, second, … of the
    same calls starts nothing, types nothing and sets no rule a second time.  Typing only as long as a process knows
    its calls (`common.inlet`): a run that had made more than 100 to one, polls among them, types anew.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from ..common.client import Host, Thread
from ..common.errors import BadRequest
from ..common.messages import DetachedProcessSummary, Inventory
from ..common.program import ProcessSummary, Wake


class Session(Thread):
    """One run's view of its thread."""

    def __init__(self, host: Host, wake: Wake) -> None:
        super().__init__(host, wake.thread)
        # The first match is the same whenever this run comes again, and its time tells it from those of a journal
        # that was lost.
        self._run = f"{wake.number} {wake.matches[0].at}"
        self._calls: Counter[str] = Counter()

    async def detach(self, *, keep_worker: bool = False) -> DetachedProcessSummary:
        """Raise `BadRequest`, unless `keep_worker`: a program goes to bed by returning."""
        if not keep_worker:
            raise BadRequest("detach: this is the thread's own program; return, and the thread goes to bed")
        return await super().detach(keep_worker=True)

    async def processes(self) -> list[ProcessSummary]:  # type: ignore[override]
        """Return the thread's processes: those that live, that ended and have unread output, or are lost."""
        return await self.host.call(Inventory(thread=self.thread_id), list[ProcessSummary])

    def _new_id(self, *call: object) -> str:
        """Return the same id for the same call when the run comes again: the first, second, … of its kind."""
        what = f"{self._run} {call!r}"
        self._calls[what] += 1
        digest = hashlib.sha256(f"{what} {self._calls[what]}".encode("utf-8", "surrogatepass")).hexdigest()
        return f"wake-{digest[:24]}"
