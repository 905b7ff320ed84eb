"""`watch` and `wait`: rules that are set on processes which have started, for their thread or for one caller.

A rule for the thread is in the journal before whoever pumps hears of it, and before the answer.  A caller's rule is
known to this broker only: a caller that lost it asks again.

Always true
    Neither wakes a sleeping thread.
    Whoever pumps is told all that was added: a word that comes late, or twice, changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b

from ..common import kernel, messages, rules
from ..common.errors import LimitReached, OutliveError, UnknownProcess
from ..common.messages import LookFor, RuleRow, WaitRow, outcome_from_wire
from ..common.names import check_process
from ..common.outcome import Outcome
from ..common.rules import Exit, Output, Rule, Silence
from ..common.transcript import Gap
from .custody import Holder, State
from .entries import Entry
from .peers import WorkerGone
from .records import Record
from .rulebook import Line
from .threads import ThreadManager
from .watches import Armed, Match
from .world import World


class Watching:
    """What requests about rules do."""

    def __init__(self, world: World, threads: ThreadManager) -> None:
        self._world = world
        self._threads = threads

    async def watch(self, call: messages.Watch, deadline: float | None) -> list[RuleRow]:
        """Set rules whose coming true wakes the thread; what is true already wakes it now."""
        wanted = rules.parse_all(call.rules)
        generation = int.from_bytes(blake2b(call.watch_id.encode("utf-8", "surrogatepass"), digest_size=7).digest())
        key = call.thread, call.process_id
        found = await self._started(*key)
        if isinstance(found, Record):
            open_ = self._tell_of(found, key, wanted, generation)
        else:
            open_ = await self._set(found, wanted, generation, deadline)
        return [
            RuleRow(thread=call.thread, process_id=call.process_id, rule=str(rule), open=rule in open_)
            for rule in wanted
        ]

    async def _set(
        self, entry: Entry, wanted: Sequence[Rule], generation: int, deadline: float | None
    ) -> set[Rule]:
        """Set rules on a process that is held; return which of them are open."""
        watches, transcript = self._threads.watches, entry.transcript
        assert transcript is not None
        now = round(kernel.boottime() * 1e9)
        armed: list[Armed] = []
        try:
            for rule in wanted:
                armed.append(watches.add(entry.key, transcript, rule, set_at=now, generation=generation))
        except LimitReached:
            for one in armed:
                if one.set_at == now:
                    watches.remove(entry.key, one)
            raise
        watches.retire(entry.key)
        lines = [
            Line(one.number, generation, str(one.rule), one.slot, one.since, one.set_at)
            for one in armed
            if one.set_at == now
        ]
        await self._written(entry, lines)
        for one in armed:
            one.told = True
        await self._tell_holder(entry, deadline)
        if entry.state is State.ENDED:
            watches.ended(entry.key, entry.outcome)
        elif entry.state is State.GONE:
            self._tell_of(self._record(*entry.key), entry.key, wanted, generation)
        return {one.rule for one in armed if one.open and entry.state is not State.GONE}

    async def _written(self, entry: Entry, lines: list[Line]) -> None:
        """Wait until these are in the journal, and all that was said before: then a slot may be used again."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._threads.journal.rulebook.add(
            entry.key, lines, lambda: None if written.done() else written.set_result(None)
        )
        await written

    async def _tell_holder(self, entry: Entry, deadline: float | None) -> None:
        """Have whoever pumps a process look for what was added, in what is kept too, and hear what it found."""
        threads, watches = self._threads, self._threads.watches
        thread = threads.get(entry.key[0])
        while True:
            await threads.handed_over(thread)
            holder, peer = entry.custody.holder, thread.worker
            if holder is Holder.NOBODY:  # it has gone
                return
            if holder is Holder.BROKER:
                if held := threads.store.get(entry.key):
                    held.look_for(watches.to_look_for(entry.key))
                return
            if peer is None:  # it is coming back, or about to be found dead
                await thread.changed()
                continue
            try:
                order = LookFor(process_id=entry.key[1], rules=watches.to_look_for(entry.key))
                await peer.call(order, self._world.transmit, deadline)
            except WorkerGone:
                await threads.death_proved(thread, peer)
            except UnknownProcess:  # it has given it away, or let it go, and said so
                if entry.custody.holder is holder:
                    await entry.changed()
            else:
                watches.look(entry.key)
                return

    async def wait(self, call: messages.Wait, deadline: float | None) -> WaitRow:
        """Answer when one of the rules is true, or the process has ended."""
        wanted = rules.parse_all(call.rules) or [Exit()]
        key = call.thread, call.process_id
        found = await self._started(*key)
        if isinstance(found, Record):
            return self._recorded(found, key, wanted, call.since)
        came: list[tuple[Rule, Match]] = []
        set_at = round((kernel.boottime() if call.asked_at is None else call.asked_at) * 1e9)
        listened_for = [rule for rule in wanted if rule != Exit()]
        armed = await self._listen(found, listened_for, set_at, call.since, came, deadline)
        try:
            while not came and found.state is not State.GONE:
                if found.state is State.ENDED and (outcome := found.outcome):
                    return _row(key, Exit() if Exit() in wanted else None, Match(outcome=outcome))
                await found.changed()
            if came:
                return _row(key, *came[0])
        finally:
            for one in armed:
                self._threads.watches.remove(key, one)
            if any(isinstance(one.rule, Output | Silence) for one in armed):
                self._threads.spawn(self._tell_holder_less(found))
        return self._recorded(self._record(*key), key, wanted, call.since)

    async def _listen(
        self,
        entry: Entry,
        wanted: Sequence[Rule],
        set_at: int,
        since: int,
        came: list[tuple[Rule, Match]],
        deadline: float | None,
    ) -> list[Armed]:
        watches, transcript = self._threads.watches, entry.transcript
        assert transcript is not None
        armed: list[Armed] = []

        def listener(rule: Rule) -> Callable[[Match], None]:
            def heard(match: Match) -> None:
                came.append((rule, match))
                entry.tell()

            return heard

        try:
            for rule in wanted:
                armed.append(
                    watches.add(entry.key, transcript, rule, set_at=set_at, since=since, heard=listener(rule))
                )
            if any(isinstance(rule, Output | Silence) for rule in wanted):
                await self._written(entry, [])
                for one in armed:
                    one.told = True
                await self._tell_holder(entry, deadline)
        except BaseException:
            for one in armed:
                watches.remove(entry.key, one)
            raise
        return armed

    async def _tell_holder_less(self, entry: Entry) -> None:
        with suppress(OutliveError):  # whoever holds it next hears no more of it
            await self._tell_holder(entry, None)

    # What has gone.

    def _tell_of(self, record: Record, key: tuple[str, str], wanted: Sequence[Rule], generation: int) -> set[Rule]:
        """Tell what is true of a process of which only the record is left; nothing is open any more."""
        matches = {
            rule: match
            for rule in wanted
            if isinstance(rule, Output) and (match := _match_in(record, rule, generation))
        }
        for rule, match in matches.items():
            self._threads.came_true(key, rule, match)
        if len(matches) < len(wanted):
            self._threads.came_true(key, Exit(), Match(generation, outcome=_outcome(record)))
        return set()

    def _recorded(self, record: Record, key: tuple[str, str], wanted: Sequence[Rule], since: int) -> WaitRow:
        for rule in wanted:
            if isinstance(rule, Output) and (match := _match_in(record, rule, since=since)):
                return _row(key, rule, match)
        return _row(key, Exit() if Exit() in wanted else None, Match(outcome=_outcome(record)))

    async def _started(self, thread_id: str, process_id: str) -> Entry | Record:
        """Return a process that has started, or its record."""
        while True:
            found = self._threads.find(thread_id, check_process(process_id))
            if isinstance(found, Record) or (found.state is not State.STARTING and found.transcript):
                return found
            await found.changed()

    def _record(self, thread_id: str, process_id: str) -> Record:
        return self._threads.get(thread_id).journal.get(process_id)


def _outcome(record: Record) -> Outcome | None:
    return outcome_from_wire(record.row["outcome"])


def _match_in(record: Record, rule: Output, generation: int = 0, since: int = 0) -> Match | None:
    for part in record.parts(max(0, since - 1), record.written):
        if isinstance(part, Gap):
            continue
        offset, data = part
        final = offset + len(data) == record.written
        start = max(1 if offset else 0, since - offset)  # what goes before that is only looked at
        if start <= len(data) and (found := rules.search(rule.pattern, data, start, final=final)):
            text = data[found[0] : min(found[1], found[0] + rules.MATCH_MAX)]
            return Match(generation, offset=offset + found[0], text=text)
    return None


def _row(key: tuple[str, str], rule: Rule | None, match: Match) -> WaitRow:
    return WaitRow(
        thread=key[0],
        process_id=key[1],
        rule=None if rule is None else str(rule),
        outcome=match.outcome.to_wire() if match.outcome else None,
        offset=match.offset,
        text=match.text if match.offset is not None else None,
    )
