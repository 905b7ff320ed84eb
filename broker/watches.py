"""What is watched of each process, and which wake rules have come true.  Decides; its edges are given to it.

    exit       the custody of the process says so: `ended`
    output     whoever pumps has written it into the header (`scanner`): `look`
    silence    so long after the start, the rule, or the last output that the header tells
    deadline   so long after the start, or after the rule was set
    port       the kernel's list of listening sockets, looked through now and then

`on_match(key, rule, match)` is called once for each rule that came true, and at its end for a process of which a
rule was still open: whoever waits for what cannot come any more must hear of the end.  A broker that comes up arms
everything anew, from headers and journal, so that what has been told before is told again unless `fired` knows it.
A rule with a listener of its own (`Armed.heard`) is told to that, and concerns nobody else.

Always true
    Instants are on `CLOCK_BOOTTIME` and counted from the header or the journal: neither a suspended machine nor a
    restarted broker counts from zero again.
    While no rule about a clock or a port is open there is no alarm.
    A rule that came true, or whose process has ended, costs nothing; only in what was printed before the end may
    something be found yet.

Not here
    What a wake does: the outbox.  Looking for output: `common.scanner`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from ..common import rules
from ..common.errors import LimitReached, PeerError
from ..common.messages import AddedRule
from ..common.outcome import Outcome
from ..common.rules import Deadline, Exit, Output, Port, Rule, Silence
from ..common.transcript import MATCHES, Gap, Transcript

Key = tuple[str, str]
# Nanoseconds between two looks at who listens, while somebody waits for a port.
PORT_PAUSE = 500_000_000
# Numbers of rules that were added, one after the other.  Those with a listener, whom nobody remembers, get random
# ones beyond, of as many: the header may still tell of a former listener's.
_NUMBERS = range(1000, 1 << 30)


@dataclass(frozen=True, slots=True)
class Match:
    """How a rule came true.

    `generation`: which setting of rules this one came with; 0: the process was started with it.  `outcome`: of an
    end.  `offset`, `text`: where in the output, and what.
    """

    generation: int = 0
    outcome: Outcome | None = None
    offset: int | None = None
    text: bytes = b""


@dataclass(slots=True, eq=False)
class Armed:
    """One rule of one process.

    `number`: by which holders know it.  `set_at`: when, in nanoseconds since boot.  Of an output rule: the `slot`
    in the header, and `since` which offset it is looked for.  `told`: whether holders may be told of an added one.
    """

    rule: Rule
    number: int
    set_at: int
    generation: int = 0
    slot: int = 0
    since: int = 0
    told: bool = False
    heard: Callable[[Match], None] | None = None
    # Whether it came true; and whether it cannot any more, but for output that nobody has looked at yet.
    came: bool = False
    over: bool = False
    # Where its match ends: the same rule, set again, is looked for from there.
    until: int = 0

    @property
    def open(self) -> bool:
        """Whether it may come true."""
        return not (self.came or self.over)


@dataclass(slots=True)
class _Watch:
    transcript: Transcript
    armed: list[Armed] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def open(self) -> list[Armed]:
        return [armed for armed in self.armed if armed.open]

    @property
    def slots(self) -> int:
        """How many slots in the header are those of rules that the process was started with."""
        return sum(isinstance(rule, Output) for rule in rules.known(self.transcript.facts.wake_on))


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
        self._began = now()
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
            # What has started since we have, nobody before us can have told anything about: no look at the disk.
            armed.came = started <= self._began and self.fired(key, armed.rule, armed.generation)
            self._schedule(key, watch, armed)
        self.look(key)
        for armed in watch.armed:
            if armed.came and isinstance(armed.rule, Output):
                armed.until = armed.until or transcript.scanned  # its slot has been used again
        self._reset()

    def add(
        self,
        key: Key,
        transcript: Transcript,
        rule: Rule,
        *,
        set_at: int,
        generation: int = 0,
        since: int = 0,
        heard: Callable[[Match], None] | None = None,
    ) -> Armed:
        """Watch also for this; a rule that is open already is that one.  Raises `LimitReached`.

        `since`: from which byte of the output a match counts, or where the same rule matched before.

        What is looked for in output is so once its holder is told: `told`, `to_look_for`, `look`.
        """
        watch = self._watches.setdefault(key, _Watch(transcript))
        same = [armed for armed in watch.armed if armed.rule == rule and armed.heard is None and heard is None]
        if (mine := next((armed for armed in same if armed.generation == generation), None)) is not None:
            return mine
        if heard is None and self.fired(key, rule, generation):
            return Armed(rule, _NUMBERS.start, 0, generation, came=True)  # set before, and others since: `retire`
        if (open_ := next((armed for armed in same if armed.open), None)) is not None:
            return open_
        if len(watch.open) >= rules.RULES_MAX:
            raise LimitReached(f"process {key[1]}: {rules.RULES_MAX} wake rules are open, and more may not be")
        number = _NUMBERS.start if heard is None else secrets.randbelow(len(_NUMBERS)) + _NUMBERS.stop
        if heard is None:
            number = max([number, *(armed.number + 1 for armed in watch.armed if armed.number in _NUMBERS)])
        armed = Armed(rule, number, set_at, generation, heard=heard)
        if isinstance(rule, Output):
            armed.since = max(since, *(former.until for former in same), 0)
            armed.slot = self._free_slot(key, watch)
        watch.armed.append(armed)
        self._schedule(key, watch, armed)
        self._reset()
        return armed

    def _free_slot(self, key: Key, watch: _Watch) -> int:
        taken = {one.slot for one in watch.open if isinstance(one.rule, Output) and one.number >= _NUMBERS.start}
        # The one that was used longest ago: what is in it was told to everybody by now.
        used = [one.slot for one in watch.armed if isinstance(one.rule, Output) and one.number >= _NUMBERS.start]
        last = {slot: at for at, slot in enumerate(used)}
        free = set(range(watch.slots, MATCHES)) - taken
        if not free:
            raise LimitReached(f"process {key[1]}: {MATCHES} wake rules are about its output, and more may not be")
        return min(free, key=lambda slot: last.get(slot, -1))

    def retire(self, key: Key) -> None:
        """Let go of what came true and has been set again since, which says from where it is looked for.

        Whoever sets a rule each time it came true does so for weeks.
        """
        if watch := self._watches.get(key):
            latest = {armed.rule: armed for armed in watch.armed if armed.heard is None}
            watch.armed = [one for one in watch.armed if one.heard or not one.came or latest[one.rule] is one]

    def remove(self, key: Key, armed: Armed) -> None:
        """Whoever listened to this rule has gone."""
        if watch := self._watches.get(key):
            watch.armed.remove(armed)
            self._due.pop(armed, None)
            if not watch.armed:
                del self._watches[key]
            self._reset()

    def to_look_for(self, key: Key) -> list[AddedRule]:
        """Return what whoever pumps a process has to know beside its header."""
        watch = self._watches.get(key)
        return [
            AddedRule(number=armed.number, slot=armed.slot, rule=str(armed.rule), since=armed.since)
            for armed in (watch.armed if watch else ())
            if armed.told and not armed.came and isinstance(armed.rule, Output | Silence)
        ]

    def texts(self, key: Key) -> list[str]:
        """Return the open rules whose coming true wakes the thread."""
        watch = self._watches.get(key)
        return [str(armed.rule) for armed in (watch.open if watch else ()) if armed.heard is None]

    def look(self, key: Key) -> None:
        """Something may have been found in a process's output: the header tells."""
        watch = self._watches.get(key)
        if watch is None or not any(isinstance(armed.rule, Output) for armed in watch.armed):
            return
        with suppress(PeerError):
            for found in watch.transcript.matches():
                for armed in list(watch.armed):
                    if armed.number == found.number and isinstance(armed.rule, Output) and not armed.until:
                        armed.until = found.end
                        text = text_of(watch.transcript, found.start, found.end)
                        self._fire(key, armed, Match(armed.generation, offset=found.start, text=text))

    def ended(self, key: Key, outcome: Outcome | None) -> None:
        """A process has ended; nothing more will come true of it."""
        self.look(key)
        watch = self._watches.get(key)
        if watch is None:
            return
        watch.outcome = outcome
        still_open = [armed for armed in watch.open if armed.heard is None]
        for armed in watch.open:
            armed.over = True
            self._due.pop(armed, None)
        if still_open:
            ends = [armed.generation for armed in still_open if isinstance(armed.rule, Exit)]
            generation = max(ends or [armed.generation for armed in still_open])
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
        self._alarm = 0  # of the past
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
        if not armed.came:
            armed.came = True
            self._due.pop(armed, None)
            if armed.heard:
                armed.heard(match)
            else:
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
    return max(armed.set_at, quiet_since) + round(armed.rule.seconds * 1e9)


def text_of(transcript: Transcript, start: int, end: int) -> bytes:
    """Return what is kept of a piece of output, up to `rules.MATCH_MAX` bytes."""
    parts = transcript.read(start, min(end, start + rules.MATCH_MAX))
    return b"".join(part[1] for part in parts if not isinstance(part, Gap))
