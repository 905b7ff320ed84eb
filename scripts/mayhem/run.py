"""One run: everything that goes on at once in one broker, until the killing is over, and then to its end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outlive

from .. import home
from .accounts import Accounts
from .children import Children
from .mischief import Imp, Stalker
from .scene import Scene
from .tally import Tally
from .upgrades import Upgrades
from .victims import Victims
from .watched import Watchers

# Seconds that everything under way may take once the killing is over.
WIND_UP = 120.0
# The thread of the sleepers, which no stalker wakes.
SLEEPY = "sleepy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run is to be.

    `kind`: worker, broker, keeper, all, upgrade or wakes.  `times` (upgrades or wakes for these kinds, else kills)
    or `seconds` end it, whichever comes first; what runs then is let finish.  `children` that flood, or are waited
    for, at any time, in `threads` awake ones.
    """

    kind: str
    times: int
    seconds: float
    children: int
    threads: int
    seed: int | None


class Run:
    """A plan being carried out."""

    def __init__(self, plan: Plan, host: outlive.Host, folder: Path, tally: Tally) -> None:
        self.plan = plan
        self.tally = tally
        self.scene = Scene(host, folder, tally, plan.seed)
        self.victims = Victims(folder, host.paths)
        self.children = Children(self.scene)
        self.upgrades = Upgrades(self.scene)

    @property
    def done(self) -> int:
        """How much of the plan has been done."""
        return {"upgrade": self.tally.upgrades, "wakes": self.tally.wakes_expected}.get(
            self.plan.kind, self.tally.kills
        )

    async def carry_out(self, show: Callable[[int], None]) -> None:
        """Let everything go on, and count what is wrong."""
        plan, scene, tally = self.plan, self.scene, self.tally
        names = [f"t{number}" for number in range(plan.threads)]
        awake = [await scene.host.thread(name) for name in names]
        asleep = [] if plan.kind in ("worker", "wakes") else [await scene.host.thread(SLEEPY)]
        accounts = Accounts(scene, self.victims, [*awake, *asleep])
        await accounts.open()
        broker = (await scene.host.status())["broker_pid"]
        began = time.monotonic()
        watchers = Watchers(scene, awake) if plan.kind == "wakes" else None
        if watchers:
            await watchers.begin()
        parts = self._watched(watchers) if watchers else self._living(awake, asleep)
        parts |= self._dying(names)
        tasks = {asyncio.create_task(scene.guarded(name, part), name=name) for name, part in parts.items()}
        watch = asyncio.create_task(Stalker.watch(scene.host, self.stalkers))
        try:
            while not scene.over.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(scene.over.wait(), 0.2)
                show(self.done)
                failed = any(task.done() and task.exception() for task in (watch, *tasks))
                if failed or time.monotonic() - began > plan.seconds:
                    scene.over.set()
            tally.seconds = round(time.monotonic() - began, 1)
            tally.kills_per_second = round(tally.kills / tally.seconds, 2)
            done, late = await asyncio.wait(tasks, timeout=WIND_UP)
            for task in late:
                tally.count("calls_failed", 1, f"not finished {WIND_UP:.0f} s after the end: {task.get_name()}")
            for task in done:
                task.result()
        finally:
            for task in (watch, *tasks):
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)
        if plan.kind == "worker":
            now = (await scene.host.status())["broker_pid"]
            tally.count("processes_lost", now != broker, f"broker {broker} became {now}")
        if watchers:
            await watchers.close()
        await accounts.close()

    def _living(
        self, awake: list[outlive.Thread], asleep: list[outlive.Thread]
    ) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what goes on, by name."""
        children = self.children
        parts = {"audit": children.auditing()}
        for thread in awake:
            parts[f"commands in {thread.thread_id}"] = children.churning(thread)
            parts[f"shell of {thread.thread_id}"] = children.typing(thread)
            parts[f"handoffs of {thread.thread_id}"] = children.moving(thread)
        for slot in range(self.plan.children):
            parts[f"flood {slot}"] = children.flooding(awake[slot % len(awake)], slot)
        for thread in asleep:
            parts[f"sleepers of {thread.thread_id}"] = children.dozing(thread)
        return parts

    def _watched(self, watchers: Watchers) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what is waited for, by name."""
        return {
            f"watched {slot}": watchers.watching(watchers.threads[slot % len(watchers.threads)], self.plan.times)
            for slot in range(self.plan.children)
        }

    def _dying(self, names: list[str]) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what dies, by name."""
        plan = self.plan
        self.stalkers: dict[str, Stalker] = {}
        parts: dict[str, Coroutine[Any, Any, None]] = {}
        if plan.kind in ("worker", "all"):
            self.stalkers = {name: Stalker(self.scene, self.victims, name) for name in names}
            for name, stalker in self.stalkers.items():
                parts[f"kills in {name}"] = stalker.stalk(plan.times)
        if plan.kind in ("broker", "keeper", "all"):
            imp = Imp(self.scene, self.victims, plan.kind, [*names, SLEEPY], self.upgrades.attempt)
            parts["mischief"] = imp.play(plan.times)
        if plan.kind == "wakes":
            imp = Imp(self.scene, self.victims, plan.kind, names, self.upgrades.attempt)
            parts["mischief"] = imp.play(sys.maxsize)
        if plan.kind == "upgrade":
            parts["upgrades"] = self.upgrades.go_on(plan.times)
        return parts


async def run(plan: Plan, folder: Path, tally: Tally) -> int:
    """Carry out a plan, with a progress bar; return the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    what = {"upgrade": "upgrades", "wakes": "wakes"}.get(plan.kind, "kills")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(what, total=plan.times)
        try:
            async with outlive.connect() as host:
                await Run(plan, host, folder, tally).carry_out(lambda done: progress.update(bar, completed=done))
                await host.down(force=True)
        except BaseException:
            await home.emptied()
            raise
    left = await home.deserted(folder)
    tally.count("left_running", len(left), f"after the broker went down: {left}")
    return 0 if tally.clean else 1
