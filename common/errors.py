"""What can go wrong, sorted by what the catcher does next.

Every error of ours is an `OutliveError`, so that a command line catches ours and nothing else.  A failed
system call stays an `OSError`.  `kind` is the error's name on the wire; `from_wire` turns it back.
"""

from __future__ import annotations

from typing import ClassVar


class OutliveError(Exception):
    """Anything foreseeable: its text says what was wrong, with which value, and what to do about it."""

    kind: ClassVar[str] = "error"


class BadRequest(OutliveError):
    """The caller asked for something impossible; asking again changes nothing."""

    kind = "bad_request"


class PeerError(OutliveError):
    """The other side broke the protocol: drop that peer, serve the rest."""

    kind = "peer"


class HandoffError(OutliveError):
    """A descriptor did not change hands: the sender still owns it."""

    kind = "handoff"


class SpawnError(OutliveError):
    """The child never ran its program; `stage` says how far it got."""

    kind = "spawn"

    def __init__(self, message: str, stage: str = "spawn") -> None:
        super().__init__(message)
        self.stage = stage


class UnknownThread(OutliveError):
    """No thread of that name was ever used."""

    kind = "unknown_thread"


class UnknownProcess(OutliveError):
    """We never ran it in this thread, or it has been handed to somebody else."""

    kind = "unknown_process"


class ExpiredProcess(OutliveError):
    """It ran and ended, and has been let go: its outcome and output are no longer kept."""

    kind = "expired"


class StdinClosed(OutliveError):
    """The process was started without a terminal, so nothing can be typed into it."""

    kind = "stdin_closed"


class LimitReached(OutliveError):
    """A limit was met; the message names it and its value.  Nothing was started."""

    kind = "limit"


class Unavailable(OutliveError):
    """The broker or the worker could not be reached in time; the same call may be tried again."""

    kind = "unavailable"


class Interrupted(OutliveError):
    """A worker or broker died or fell silent during the call, and what the call had done by then is not known."""

    kind = "interrupted"


class DeadlineExceeded(OutliveError):
    """The request reached its receiver after its deadline, and was not carried out."""

    kind = "deadline"


BY_KIND: dict[str, type[OutliveError]] = {
    error.kind: error
    for error in (
        OutliveError,
        BadRequest,
        PeerError,
        HandoffError,
        SpawnError,
        UnknownThread,
        UnknownProcess,
        ExpiredProcess,
        StdinClosed,
        LimitReached,
        Unavailable,
        Interrupted,
        DeadlineExceeded,
    )
}


def shown(value: object) -> str:
    """Return a value that a peer sent, for an error's text: short, and never deeper than its type."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        text = repr(value[:40] if isinstance(value, str | bytes) else value)
        return text if len(text) <= 80 else f"{text[:80]}…"
    return f"a {type(value).__name__}"


def from_wire(kind: str, message: str, stage: str | None = None) -> OutliveError:
    """Return the error that a reply names; an unknown `kind` (a newer peer) is a plain `OutliveError`."""
    if kind == SpawnError.kind:
        return SpawnError(message, stage or "spawn")
    return BY_KIND.get(kind, OutliveError)(message)
