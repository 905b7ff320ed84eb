"""What the parts of one run share: the host, the choices, the moments to strike at, and how a call is repeated.

A *moment* is named by whoever is about to make a call in it (`scene.at(DEPOSIT, thread)`); who wants to strike then
waits for it (`scene.moment`), and strikes a little later, into the call.

Always true
    Choices come from one seed; what the machine makes of them does not.

Not here
    What is counted: `tally`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import outlive

from .tally import Tally

T = TypeVar("T")
P = ParamSpec("P")

# Seconds that one call may take, repeated as often as it has to be; then it counts as failed.
PATIENCE = 60.0


class Moment(Enum):
    """When to strike."""

    ANY = "at any time"
    # Announced by whoever makes the call.
    DEPOSIT = "at a deposit"
    TYPING = "while somebody types"
    DETACH = "at a detach"
    REATTACH = "at a reattach"
    RESUME = "at a resume"
    UPGRADE = "in an upgrade"
    ENDING = "at an end or a match"
    # Seen by whoever strikes.
    STARTING = "while it starts"
    THEN = "then"


class Scene:
    """The common ground of one run."""

    def __init__(self, host: outlive.Host, folder: Path, tally: Tally, seed: int | None) -> None:
        self.host = host
        self.folder = folder
        self.tally = tally
        self.random = random.Random(seed)
        self.over = asyncio.Event()
        # Called at once when a broker was killed.
        self.on_broker_killed: set[Callable[[], None]] = set()
        self._waiting: dict[asyncio.Future[str], Collection[Moment]] = {}

    # Moments.

    def at(self, moment: Moment, thread_id: str = "") -> None:
        """Say that a call of this kind is about to be made."""
        for waiting, wanted in list(self._waiting.items()):
            if moment in wanted and not waiting.done():
                waiting.set_result(thread_id)

    async def moment(self, *wanted: Moment) -> str:
        """Wait for one of these moments, and return the thread whose it is; empty: the run is over."""
        coming: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[coming] = wanted
        over = asyncio.ensure_future(self.over.wait())
        either: set[asyncio.Future[Any]] = {coming, over}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return coming.result() if coming.done() else ""
        finally:
            over.cancel()
            del self._waiting[coming]

    def broker_killed(self) -> None:
        """Tell whoever has something to do while no broker runs."""
        for act in list(self.on_broker_killed):
            act()

    async def pause(self, longest: float) -> None:
        """Wait for a random while, or until the killing is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), self.random.uniform(0, longest))

    # Calls.

    async def until_done(self, call: Callable[P, Awaitable[T]], *arguments: P.args, **options: P.kwargs) -> T:
        """Repeat a call that is safe to repeat until somebody answers; raises what else goes wrong."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return await call(*arguments, **options)
            except outlive.Unavailable:
                if time.monotonic() > deadline:
                    raise

    async def guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run one of the parts; what it does not foresee is a failed call."""
        try:
            await work
        except (outlive.UnknownProcess, outlive.ExpiredProcess) as error:
            self.tally.count("processes_lost", 1, f"{name}: {error}")
        except (outlive.OutliveError, TimeoutError) as error:
            rows = await self.host.threads()
            self.tally.count("calls_failed", 1, f"{name}: {error!r}; {rows}")
