"""What a resumed agent finds: its processes that live, that ended and were not read to their end, or are lost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ..common.errors import PeerError
from ..common.program import ProcessSummary
from ..common.response import clip
from .custody import State
from .entries import Entry, Thread, brief

# What one message has room for: processes, the newest, after those that are named; tokens of unread output of each,
# and of all of them.  An agent asks for more.
PROCESSES_MAX = 500
TOKENS = 2_500
TOKENS_OF_ALL = 100_000


def of(thread: Thread, named: Iterable[str] = ()) -> list[ProcessSummary]:
    """Return a thread's processes, sorted by their ids as strings; `named`: also these, where they are known."""
    wanted = dict.fromkeys([*named, *reversed(thread.entries), *thread.journal.lost_ids])
    held, recorded = [], []
    for process_id in list(wanted)[:PROCESSES_MAX]:
        entry = thread.entries.get(process_id)
        if entry is None:
            recorded.append(process_id)
        elif entry.transcript and entry.state is not State.STARTING:
            held.append(entry)
    tokens = min(TOKENS, TOKENS_OF_ALL // max(1, len(held)))
    found = [_recorded(row) for row in thread.journal.rows_of(recorded).values() if row["outcome"]]
    for entry in held:
        with suppress(PeerError, OSError):
            found.append(_held(entry, tokens))
    return sorted(found, key=lambda summary: summary.process_id)


def _held(entry: Entry, tokens: int) -> ProcessSummary:
    transcript = entry.transcript
    assert transcript is not None
    facts, live, written = transcript.facts, transcript.live(), transcript.written
    outcome = live.outcome.to_wire() if live.outcome and entry.state is State.ENDED else None
    unread = max(0, written - live.delivered)
    start = written - unread
    return ProcessSummary(
        process_id=facts.process_id,
        call_id=facts.call_id,
        command=brief([os.fsdecode(word) for word in facts.argv]),
        state=_state(outcome),
        outcome=outcome,
        unread=unread,
        output=clip(transcript.read(start, written), start, written, tokens) if outcome else "",
    )


def _recorded(row: dict[str, Any]) -> ProcessSummary:
    return ProcessSummary(
        process_id=row["process_id"],
        call_id=row["call_id"],
        command=brief(row["command"]),
        state=_state(row["outcome"]),
        outcome=row["outcome"],
        unread=max(0, row["bytes_written"] - row["bytes_delivered"]),
        output="",
    )


def _state(outcome: dict[str, Any] | None) -> Any:
    if outcome is None:
        return "alive"
    return "lost" if outcome["kind"] == "lost" else "ended"
