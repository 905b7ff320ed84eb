"""What is looked for in one process's output, by whoever pumps it, before anything of it is punched out.

What is found goes into the transcript's header before anybody is told, and only then is the text that it was found
in counted as scanned.  So whoever dies in between has lost nothing: the next holder looks again at what is not
counted, and the broker reads the header when it hears of a holder's death, or comes up.

Always true
    Output is trimmed only up to what was scanned, while a rule about it is open.
    A rule that was found is in its slot before the scan returns; it is not looked for again.

Not here
    What a match is: `rules`.  What it means: `broker.watches`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from . import rules
from .errors import PeerError
from .messages import AddedRule
from .rules import Output, Rule, Silence
from .transcript import Found, Gap, Transcript


@dataclass(slots=True)
class _Wanted:
    """An open output rule: `since` which byte of the stream, and up to where it has been looked for."""

    number: int
    slot: int
    pattern: str
    since: int
    scanned: int


class Scanner:
    """The output rules of one process, and whether anybody asks when it printed last."""

    __slots__ = ("_added", "_notes_output", "_started_with", "_transcript", "_wanted")

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._started_with = rules.known(transcript.facts.wake_on)
        self._added: list[AddedRule] = []
        self._wanted: dict[int, _Wanted] = {}
        self._arm()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do at all."""
        return not (self._wanted or self._notes_output)

    def use(self, added: Iterable[AddedRule]) -> None:
        """Look also for these, and for no others beside those it was started with."""
        self._added = list(added)
        self._arm()

    def _arm(self) -> None:
        scanned = self._transcript.scanned
        wanted: dict[int, _Wanted] = {}
        kinds: list[Rule | None] = [*self._started_with]
        for number, rule in enumerate(self._started_with):
            if isinstance(rule, Output):
                wanted[number] = _Wanted(number, len(wanted), rule.pattern, 0, scanned)
        for added in self._added:
            (rule,) = rules.known([added.rule])
            kinds.append(rule)
            if isinstance(rule, Output):
                wanted[added.number] = _Wanted(added.number, added.slot, rule.pattern, added.since, added.since)
        with suppress(PeerError):  # a damaged table is no reason not to pump
            for match in self._transcript.matches():
                wanted.pop(match.number, None)
        self._wanted = {number: self._wanted.get(number, one) for number, one in wanted.items()}
        self._notes_output = any(isinstance(rule, Silence) for rule in kinds)

    def printed(self) -> None:
        """The process has printed something."""
        if self._notes_output:
            self._transcript.record_output()

    def scan(self, written: int, *, final: bool = False) -> bool:
        """Look at what was printed up to `written`; tell whether something was found.

        `final`: nothing will follow.
        """
        if not self._wanted:
            return False
        before = len(self._wanted)
        for scanned in {one.scanned for one in self._wanted.values()}:
            group = [one for one in self._wanted.values() if one.scanned == scanned]
            self._scan(group, rules.window(scanned), written, final=final)
        for one in self._wanted.values():
            one.scanned = written
        self._transcript.count_scanned(written)
        return len(self._wanted) < before

    def _scan(self, group: list[_Wanted], begin: int, written: int, *, final: bool) -> None:
        for part in self._transcript.read(begin, written):
            if isinstance(part, Gap):
                continue
            offset, data = part
            last = final and offset + len(data) == written
            for one in list(group):
                start = max(1 if offset else 0, one.since - offset)  # what goes before a gap is not known
                found = rules.search(one.pattern, data, start, final=last) if start <= len(data) else None
                if found:
                    match = Found(one.number, offset + found[0], offset + found[1])
                    self._transcript.record_match(one.slot, match)
                    del self._wanted[one.number]
                    group.remove(one)
