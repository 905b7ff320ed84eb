"""Which process makes room for a new one.  Decides; does nothing.

Never one of the 8 most recently used; ended ones first; then the least recently used: agents trained with OpenAI
Codex know this rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PROTECTED = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """One process as the rule sees it; `last_used` is any clock that grows."""

    process_id: str
    last_used: float
    ended: bool


def choose(candidates: Iterable[Candidate], *, spare_live: bool = False) -> str | None:
    """Return the process that goes, or `None` when none may; `spare_live`: only an ended one."""
    oldest_first = sorted(candidates, key=lambda candidate: candidate.last_used)
    free = oldest_first[: max(0, len(oldest_first) - PROTECTED)]
    for candidate in free:
        if candidate.ended:
            return candidate.process_id
    return free[0].process_id if free and not spare_live else None
