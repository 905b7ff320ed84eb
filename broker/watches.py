"""What is watched of each process, and which wake rules have come true.  Decides; its edges are given to it.

    exit       the custody of the process says so: `ended`
    output     whoever pumps has written it into the header (`scanner`): `look`
    silence    so long after the start, the rule, or the last output that the header tells
    deadline   so long after the start, or after the rule was set
    port       the kernel's list of listening sockets, looked through now and then

`on_match(key, rule, match)` is called once for each rule that came true, and at its end for a process of which a
rule was still open: whoever waits for what cannot come any more must hear of the end.  A broker that comes up arms
everything anew, from headers and journal, so that what has been told before is told again unless `fired` knows it.

Always true
    Instants are on `CLOCK_BOOTTIME` and counted from the header or the journal: neither a suspended machine nor a
    restarted broker counts from zero again.
    While no rule about a clock or a port is open there is no alarm.
    A rule that came true, or whose process has ended, is closed, and costs nothing.

Not here
    What a wake does: the outbox.  Looking for output: `common.scanner`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from ..common import rules
from ..common.errors import PeerError
from ..common.outcome import Outcome
from ..common.rules import Deadline, Exit, Output, Port, Rule, Silence
from ..common.transcript import Gap, Transcript

Key = tuple[str, str]
# Nanoseconds between two looks at who listens, while somebody waits for a port.
PORT_PAUSE = 500_000_000


@dataclass(frozen=True, slots=True)
class Match:
    """How a rule came true.

    `generation`: 0 for a rule that the process was started with, or that was set once; one more each time that it
    is set again after it came true.  `outcome`: of an end.  `offset`, `text`: where in the output, and what.
    """

    generation: int = 0
    outcome: Outcome | None = None
    offset: int | None = None
    text: bytes = b""


@dataclass(slots=True, eq=False)
class Armed:
    """One rule of one process.

    `number`: by which holders know it.  `since`: when it was set, in nanoseconds since boot.
    """

    rule: Rule
    number: int
    since: int
    generation: int = 0
    open: bool = True


@dataclass(slots=True)
class _Watch:
    transcript: Transcript
    armed: list[Armed] = field(default_factory=list)
    outcome: Outcome | None = None


def _boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Watches:
    """All watched processes of a broker.

    `set_alarm`: have `alarm` called at this instant; `None`: never.  `listening`: the TCP ports of this host on
    which something listens.
    """

    def __init__(
        self,
        on_match: Callable[[Key, Rule, Match], None],
        *,
        set_alarm: Callable[[int | None], None],
        listening: Callable[[], set[int]],
        fired: Callable[[Key, Rule, int], bool] = lambda key, rule, generation: False,
        now: Callable[[], int] = _boottime,
    ) -> None:
        self.on_match = on_match
        self.fired = fired
        self._set_alarm = set_alarm
        self._listening = listening
        self._now = now
        self._watches: dict[Key, _Watch] = {}
        # Open rules about a clock, or a port: when to look at each.
        self._due: dict[Armed, tuple[int, Key]] = {}
        self._alarm: int | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._watches

    def arm(self, key: Key, transcript: Transcript, added: Iterable[Armed] = ()) -> None:
        """A process has started, or was found: watch for the rules in its header, and those `added` since."""
        if key in self._watches or not (transcript.facts.wake_on or added):
            return
        watch = self._watches[key] = _Watch(transcript)
        started = transcript.marked_at() or self._now()
        for number, rule in enumerate(rules.known(transcript.facts.wake_on)):
            if rule is not None:
                watch.armed.append(Armed(rule, number, started))
        watch.armed += added
        for armed in watch.armed:
            armed.open = armed.open and not self.fired(key, armed.rule, armed.generation)
            self._schedule(key, watch, armed)
        self.look(key)
        self._reset()

    def look(self, key: Key) -> None:
        """Something may have been found in a process's output: the header tells."""
        watch = self._watches.get(key)
        if watch is None or not any(isinstance(armed.rule, Output) and armed.open for armed in watch.armed):
            return
        with suppress(PeerError):
            for found in watch.transcript.matches():
                for armed in watch.armed:
                    if armed.number == found.number and isinstance(armed.rule, Output):
                        text = text_of(watch.transcript, found.start, found.end)
                        self._fire(key, armed, Match(armed.generation, offset=found.start, text=text))

    def ended(self, key: Key, outcome: Outcome | None) -> None:
        """A process has ended; nothing more will come true of it."""
        self.look(key)
        watch = self._watches.get(key)
        if watch is None or watch.outcome:
            return
        watch.outcome = outcome
        still_open = [armed for armed in watch.armed if armed.open]
        for armed in still_open:
            armed.open = False
            self._due.pop(armed, None)
        if still_open:
            ends = [armed.generation for armed in still_open if isinstance(armed.rule, Exit)]
            generation = max(ends or [0])
            if ends or not self.fired(key, Exit(), generation):
                self.on_match(key, Exit(), Match(generation, outcome=outcome))
        self._reset()

    def drop(self, key: Key) -> None:
        """Nothing is held of a process any more."""
        if watch := self._watches.pop(key, None):
            for armed in watch.armed:
                self._due.pop(armed, None)
            self._reset()

    def alarm(self) -> None:
        """The alarm has gone off."""
        self._alarm = None
        now = self._now()
        ports: set[int] | None = None
        for armed, (due, key) in list(self._due.items()):
            if due > now or armed not in self._due:
                continue
            watch = self._watches[key]
            if isinstance(armed.rule, Port):
                ports = self._listening() if ports is None else ports
                if armed.rule.number not in ports:
                    self._due[armed] = now + PORT_PAUSE, key
                    continue
            elif (later := _instant(watch, armed)) > now:  # it has printed something meanwhile
                self._due[armed] = later, key
                continue
            self._fire(key, armed, Match(armed.generation))
        self._reset()

    def close(self) -> None:
        """Watch nothing any more."""
        self._watches.clear()
        self._due.clear()
        self._reset()

    def _fire(self, key: Key, armed: Armed, match: Match) -> None:
        if armed.open:
            armed.open = False
            self._due.pop(armed, None)
            self.on_match(key, armed.rule, match)

    def _schedule(self, key: Key, watch: _Watch, armed: Armed) -> None:
        if armed.open and isinstance(armed.rule, Silence | Deadline | Port):
            self._due[armed] = self._now() if isinstance(armed.rule, Port) else _instant(watch, armed), key

    def _reset(self) -> None:
        soonest = min((due for due, _ in self._due.values()), default=None)
        if soonest != self._alarm:
            self._alarm = soonest
            self._set_alarm(soonest)


def _instant(watch: _Watch, armed: Armed) -> int:
    """Return when a rule about a clock comes true, as far as is known now."""
    assert isinstance(armed.rule, Silence | Deadline)
    quiet_since = watch.transcript.output_at if isinstance(armed.rule, Silence) else 0
    return max(armed.since, quiet_since) + round(armed.rule.seconds * 1e9)


def text_of(transcript: Transcript, start: int, end: int) -> bytes:
    """Return what is kept of a piece of output, up to `rules.MATCH_MAX` bytes."""
    parts = transcript.read(start, min(end, start + rules.MATCH_MAX))
    return b"".join(part[1] for part in parts if not isinstance(part, Gap))
