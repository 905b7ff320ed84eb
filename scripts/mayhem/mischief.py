"""Who is killed when: a table of mischief, the imp that carries it out, and the stalker of one thread's workers.

A piece of mischief is a list of blows, each with its target, its moment, and how long after that moment it falls.
`THEN` is the moment of the blow before: with no delay, at once.  Which pieces a kind of run draws, and how often,
says `MISCHIEF`.

Always true
    No piece kills a broker and a keeper: without systemd that is outside the promises.
    The imp is one, and waits after each piece until there is one broker, up, whose parent is the living keeper:
    before, the next piece could make two deaths of one.  Workers are under no such protection.

Not here
    Finding and killing: `victims`.  Announcing moments: `children`, `upgrades`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import outlive

from .scene import PATIENCE, Moment, Scene
from .victims import Victim, Victims, parent_of

# Deaths in a row before a worker is up that are mere chance: with each the broker waits longer before the next.
HASTY_MAX = 2
# How often a thread comes under siege, and for how many kills: then it is given up, until the next call.
SIEGE = 0.01
SIEGE_KILLS = 6
# Seconds between two looks for the next one to kill.
_WATCH = 0.002
# Seconds between two looks for a broker that starts; such a look reads a file of each process of ours.
_WATCH_BROKERS = 0.005
# Seconds that a moment, or a broker that starts, is waited for; then the blow falls all the same, or not at all.
_COMES_WITHIN = 3.0


class Target(Enum):
    """Who is killed."""

    WORKER = "worker"
    BROKER = "broker"
    # The broker that an upgrade has just started.
    CANDIDATE = "candidate"
    KEEPER = "keeper"


@dataclass(frozen=True, slots=True)
class Blow:
    """One kill: `within` so many seconds after its moment, at random."""

    target: Target
    moment: Moment
    within: float = 0.0


@dataclass(frozen=True, slots=True)
class Mischief:
    """Blows in a row, and how often the kinds of run draw them."""

    blows: Sequence[Blow]
    weights: Mapping[str, int]

    @property
    def name(self) -> str:
        """What it does, as a line of the report."""
        words = []
        for number, blow in enumerate(self.blows):
            at_once = blow.moment is Moment.THEN and not blow.within
            words.append(f"{blow.target.value} {'at once' if number and at_once else blow.moment.value}")
        return ", ".join(words)


def _mischief(
    broker: int, keeper: int, everything: int, wakes: int, *blows: tuple[Target, Moment, float]
) -> Mischief:
    weights = {"broker": broker, "keeper": keeper, "all": everything, "wakes": wakes}
    return Mischief([Blow(*blow) for blow in blows], {kind: weight for kind, weight in weights.items() if weight})


_W, _B, _C, _K = Target.WORKER, Target.BROKER, Target.CANDIDATE, Target.KEEPER
_THEN = Moment.THEN
# Seconds.  A start of a broker takes about 0.2: a blow may fall before anything of it, and just after it is up.
_STARTING = 0.3
# Seconds from what comes true to the end of the run: the program's worker has to come up first.
_WAKING = 0.6

# fmt: off
MISCHIEF: Sequence[Mischief] = (
    #      broker, keeper, all, wakes
    _mischief(4, 0, 2, 0, (_B, Moment.ANY, 0.5)),
    _mischief(3, 0, 2, 0, (_B, Moment.DEPOSIT, 0.05)),
    _mischief(2, 0, 2, 0, (_B, Moment.TYPING, 0.02)),
    _mischief(2, 0, 2, 0, (_B, Moment.DETACH, 0.03)),
    _mischief(1, 0, 1, 0, (_B, Moment.REATTACH, 0.03)),
    _mischief(2, 0, 2, 0, (_B, Moment.RESUME, 0.15)),
    _mischief(2, 0, 2, 0, (_B, Moment.ANY, 0.2), (_B, Moment.STARTING, _STARTING)),
    _mischief(1, 0, 1, 0, (_B, Moment.ANY, 0.2), *2 * [(_B, Moment.STARTING, _STARTING)]),
    # In either order, at any distance: a worker may die while no broker runs, and while the next one starts.
    _mischief(0, 0, 2, 0, (_W, Moment.ANY, 0.2), (_B, _THEN, 0.0)),
    _mischief(0, 0, 2, 0, (_B, Moment.ANY, 0.2), (_W, _THEN, 0.0)),
    _mischief(0, 0, 2, 0, (_W, Moment.DEPOSIT, 0.05), (_B, _THEN, 0.0)),
    _mischief(0, 0, 2, 0, (_B, Moment.DEPOSIT, 0.05), (_W, _THEN, 0.0)),
    _mischief(0, 0, 2, 0, (_W, Moment.DEPOSIT, 0.05), (_B, _THEN, 0.05)),
    _mischief(0, 0, 2, 0, (_B, Moment.DEPOSIT, 0.05), (_W, _THEN, 0.5)),
    _mischief(0, 0, 1, 0, (_W, Moment.DETACH, 0.03), (_B, _THEN, 0.02)),
    _mischief(0, 0, 1, 0, (_B, Moment.DETACH, 0.03), (_W, _THEN, 0.02)),
    _mischief(0, 0, 1, 0, (_W, Moment.RESUME, 0.15), (_B, _THEN, 0.05)),
    _mischief(0, 0, 1, 0, (_B, Moment.RESUME, 0.15), (_W, _THEN, 0.5)),
    _mischief(0, 0, 1, 0, (_B, Moment.ANY, 0.2), (_B, Moment.STARTING, _STARTING), (_W, _THEN, 0.1)),
    # The keeper, and what takes over after it.
    _mischief(0, 4, 2, 0, (_K, Moment.ANY, 0.5)),
    _mischief(0, 2, 1, 0, (_K, Moment.DEPOSIT, 0.05)),
    _mischief(0, 2, 1, 0, (_K, Moment.DETACH, 0.03)),
    _mischief(0, 2, 1, 0, (_K, Moment.RESUME, 0.15)),
    _mischief(0, 1, 1, 0, (_K, Moment.ANY, 0.2), (_W, _THEN, 0.0)),
    _mischief(0, 1, 1, 0, (_W, Moment.DEPOSIT, 0.05), (_K, _THEN, 0.0)),
    _mischief(0, 1, 1, 0, (_K, Moment.DEPOSIT, 0.05), (_W, _THEN, 0.5)),
    # An upgrade that goes well, and whoever may die in it.
    _mischief(0, 0, 1, 0, (_W, Moment.UPGRADE, 0.6)),
    _mischief(0, 0, 2, 0, (_B, Moment.UPGRADE, 0.6)),
    _mischief(0, 0, 2, 0, (_C, Moment.UPGRADE, 0.6)),
    _mischief(0, 0, 2, 0, (_K, Moment.UPGRADE, 0.6)),
    # Between what comes true, what is written of it, the run, and its end; and in the run of before.
    _mischief(0, 0, 0, 4, (_W, Moment.ENDING, 0.02)),
    _mischief(0, 0, 0, 4, (_W, Moment.ENDING, _WAKING)),
    _mischief(0, 0, 0, 4, (_B, Moment.ENDING, 0.02)),
    _mischief(0, 0, 0, 4, (_B, Moment.ENDING, _WAKING)),
    _mischief(0, 0, 0, 2, (_B, Moment.ANY, 0.2)),
    _mischief(0, 0, 0, 2, (_W, Moment.ENDING, _WAKING), (_W, _THEN, _WAKING)),
    _mischief(0, 0, 0, 2, (_B, Moment.ENDING, 0.02), (_B, Moment.STARTING, _STARTING)),
    _mischief(0, 0, 0, 3, (_W, Moment.ENDING, _WAKING), (_B, _THEN, 0.0)),
    _mischief(0, 0, 0, 3, (_B, Moment.ENDING, _WAKING), (_W, _THEN, 0.0)),
    _mischief(0, 0, 0, 2, (_W, Moment.ENDING, 0.02), (_B, _THEN, 0.1)),
    _mischief(0, 0, 0, 2, (_B, Moment.ENDING, 0.02), (_W, _THEN, 0.5)),
)
# fmt: on


class Stalker:
    """Kills one thread's workers, over and over."""

    def __init__(self, scene: Scene, victims: Victims, thread_id: str) -> None:
        self.scene = scene
        self.victims = victims
        self.thread_id = thread_id
        # The epoch of the last worker that came up.
        self.up = 0

    async def stalk(self, kills: int) -> None:
        """Kill the thread's workers until `kills` were killed in all."""
        tally, roll = self.scene.tally, self.scene.random
        killed, hasty, siege = 0, 0, 0
        while not self.scene.over.is_set():
            worker = self.victims.worker(self.thread_id)
            if worker is None or worker.epoch == killed:
                await asyncio.sleep(_WATCH)
                continue
            kind = roll.random()
            if not siege and kind < SIEGE:
                siege = SIEGE_KILLS
            if siege or (kind < 0.3 and hasty < HASTY_MAX):
                await asyncio.sleep(roll.uniform(0, 0.03))
            elif kind < 0.4 and hasty < HASTY_MAX:
                await asyncio.sleep(roll.uniform(0.03, 0.25))
            else:
                await self._until_up(worker.epoch)
                await asyncio.sleep(roll.uniform(0, 0.05 if kind < 0.7 else 0.5))
            if tally.kills >= kills:
                self.scene.over.set()
            if self.scene.over.is_set():
                return
            killed = worker.epoch
            if worker.kill():
                early = self.up != killed
                hasty, siege = hasty + 1 if early else 0, max(0, siege - 1)
                tally.kills += 1
                tally.kills_of_workers += 1
                tally.kills_before_up += early

    async def _until_up(self, epoch: int) -> None:
        """Wait until a worker is up, or gone by itself."""
        while self.up != epoch and not self.scene.over.is_set():
            await asyncio.sleep(_WATCH)
            worker = self.victims.worker(self.thread_id)
            if worker is None or worker.epoch != epoch:
                return

    @staticmethod
    async def watch(host: outlive.Host, stalkers: Mapping[str, Stalker]) -> None:
        """Note which workers are up, under one broker after the other."""
        while True:
            with suppress(outlive.Unavailable):
                async for event in host.events(recent=True):
                    if event["event"] == "worker" and event["what"] == "up":
                        if stalker := stalkers.get(event["thread"]):
                            stalker.up = event["epoch"]


class Imp:
    """Draws one piece of mischief after the other, and carries it out."""

    def __init__(
        self,
        scene: Scene,
        victims: Victims,
        kind: str,
        threads: Sequence[str],
        upgrade: Callable[[], Coroutine[Any, Any, Any]],
    ) -> None:
        """`threads`: whose workers may be killed; `upgrade`: does one, whatever may happen to it."""
        self.scene = scene
        self.victims = victims
        self.threads = threads
        self.upgrade = upgrade
        drawn = [(piece, piece.weights[kind]) for piece in MISCHIEF if piece.weights.get(kind)]
        self._pieces = [piece for piece, _ in drawn]
        self._weights = [weight for _, weight in drawn]

    async def play(self, kills: int) -> None:
        """Do mischief until `kills` were killed in all."""
        while not self.scene.over.is_set():
            before = await self._one_of_each()
            if before is None:
                return
            (piece,) = self.scene.random.choices(self._pieces, self._weights)
            await self._carry_out(piece, *before)
            if self.scene.tally.kills >= kills:
                self.scene.over.set()

    async def _carry_out(self, piece: Mischief, broker: Victim, keeper: Victim | None) -> None:
        scene, tally = self.scene, self.scene.tally
        thread, known = "", {broker}
        upgrading: asyncio.Task[Any] | None = None
        killed: list[Target] = []
        dying: list[Victim] = []
        for blow in piece.blows:
            if blow.moment is Moment.UPGRADE:
                upgrading = asyncio.create_task(self.upgrade())
            elif blow.moment is Moment.STARTING:
                # The one of the blow before has gone.
                broker = await self._next_broker(known) or broker
                known.add(broker)
            elif blow.moment not in (Moment.ANY, Moment.THEN):
                thread = await self._moment(blow.moment)
            if blow.within:
                await asyncio.sleep(scene.random.uniform(0, blow.within))
            victim: Victim | None
            match blow.target:
                case Target.WORKER:
                    victim = self.victims.worker(thread or scene.random.choice(self.threads))
                case Target.BROKER:
                    victim = broker
                case Target.CANDIDATE:
                    victim = next((one for one in reversed(self.victims.brokers()) if one not in known), None)
                case Target.KEEPER:
                    victim = keeper
            if victim is not None and victim.kill():
                killed.append(blow.target)
                dying.append(victim)
                tally.kills += 1
                tally.kills_of_workers += blow.target is Target.WORKER
                tally.kills_of_brokers += blow.target in (Target.BROKER, Target.CANDIDATE)
                tally.kills_of_keepers += blow.target is Target.KEEPER
                if blow.target is Target.BROKER:
                    scene.broker_killed()
        if killed:
            tally.mischief[piece.name] = tally.mischief.get(piece.name, 0) + 1
        if Target.BROKER in killed:
            began = time.monotonic()
            await scene.until_done(scene.host.status)
            tally.answered(time.monotonic() - began)
        if upgrading is not None:
            await upgrading
        # A keeper that is killed and not dead yet would pass for the living one: the next piece may not begin.
        while any(one.alive for one in dying):
            await asyncio.sleep(_WATCH)

    async def _moment(self, moment: Moment) -> str:
        """Wait for a moment, but not for ever; return the thread whose it is, or none."""
        try:
            async with asyncio.timeout(_COMES_WITHIN):
                return await self.scene.moment(moment)
        except TimeoutError:
            return ""

    async def _next_broker(self, known: set[Victim]) -> Victim | None:
        """Return a broker that starts, as soon as it can be seen."""
        deadline = time.monotonic() + _COMES_WITHIN
        while time.monotonic() < deadline:
            for one in self.victims.brokers():
                if one not in known:
                    return one
            await asyncio.sleep(_WATCH_BROKERS)
        return None

    async def _one_of_each(self) -> tuple[Victim, Victim | None] | None:
        """Wait until one broker is up, under a living keeper; return both, or nothing after long."""
        deadline = time.monotonic() + PATIENCE
        seen: object = None
        while time.monotonic() < deadline:
            status = await self.scene.until_done(self.scene.host.status)
            brokers, keepers = self.victims.brokers(), self.victims.keepers()
            seen = status["broker_pid"], status["keeper_pid"], brokers, keepers
            if [one.pid for one in brokers] == [status["broker_pid"]]:
                parent = parent_of(brokers[0].pid)
                if [one.pid for one in keepers] == [status["keeper_pid"]] == [parent]:
                    return brokers[0], keepers[0]
            await asyncio.sleep(_WATCH_BROKERS)
        self.scene.tally.count("calls_failed", 1, f"not one broker under one keeper after {PATIENCE:.0f} s: {seen}")
        self.scene.over.set()
        return None
