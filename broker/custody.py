"""Custody of one process: who holds it, and every move between holders.

A worker deposits copies of a process's descriptors with the broker, so that the process can outlive the worker.
For a moment both could drain the terminal, and either may die in that moment.  This module decides what the
broker does next; `holding` does it.

Always true
    At most one party pumps: the broker starts only after the worker said that it has stopped, or is proved
    dead, and it stops before it gives the descriptors away.
    The broker never gives up its own descriptors before the process is gone, so that no step of a handoff has
    a dangerous moment: a worker that dies in any of them is a `WorkerLost` like any other.

Not here
    Descriptors, sockets, clocks.  Who waits for what: `operations`, `workers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """Where a process stands."""

    STARTING = "starting"  # deposited, not yet started
    ATTACHED = "attached"  # the thread's worker pumps
    DETACHED = "detached"  # the broker pumps
    ENDED = "ended"  # its last holder pumps while the terminal is open
    GONE = "gone"  # archived or never ran; nothing is held


class Holder(Enum):
    """Who pumps, or may."""

    NOBODY = auto()
    WORKER = auto()
    BROKER = auto()


class Event(Enum):
    """What happened, in the past tense; the first three are what a deposit comes to."""

    STARTED = auto()  # terminal and pidfd arrived, from a worker that is there
    STARTED_ALONE = auto()  # they arrived, or were found, and the worker has died meanwhile
    NEVER_RAN = auto()  # the spawner said so, or it is gone and the header lacks the mark
    VANISHED = auto()  # it ran, and nothing of it can be found
    DETACHED = auto()  # the worker said that it has stopped pumping
    REATTACHED = auto()  # the broker decided to give it to a worker
    SKIPPED = auto()  # that worker refused it
    CLAIMED = auto()  # a worker that registered has it, and its lease: it was on its way when a former broker died
    WORKER_LOST = auto()  # the kernel says that the holder is dead
    ENDED = auto()  # the holder says: outcome known, output drained
    COLLECTED = auto()  # the thread has had the end and all output
    CLEANED = auto()  # a caller wants it gone, and it has ended or is being ended
    EXPIRED = auto()  # it ended too long ago, or too many have


class Effect(Enum):
    """What is to be done, in this order; `holding` does it."""

    STOP_PUMP = auto()
    START_PUMP = auto()
    SEND_HANDLES = auto()  # whoever decided the reattachment does: many go in one parcel (`threads`)
    RECORD_LOST = auto()
    ANNOUNCE = auto()
    END_TREE = auto()
    FORGET_AT_WORKER = auto()
    ARCHIVE = auto()
    CLOSE_HANDLES = auto()


@dataclass(frozen=True, slots=True)
class Move:
    """One move: the next state, who holds it then (`None`: as before), and the effects."""

    state: State
    effects: tuple[Effect, ...] = ()
    holder: Holder | None = None


@dataclass(frozen=True, slots=True)
class Custody:
    """Where one process stands, and who holds it."""

    state: State = State.STARTING
    holder: Holder = Holder.NOBODY


_TO_BROKER = (Effect.START_PUMP,)
_TO_WORKER = (Effect.STOP_PUMP, Effect.SEND_HANDLES)
_AWAY = (Effect.STOP_PUMP, Effect.ARCHIVE, Effect.CLOSE_HANDLES)

MOVES: Mapping[State, Mapping[Event, Move]] = {
    State.STARTING: {
        Event.STARTED: Move(State.ATTACHED, holder=Holder.WORKER),
        # The spawner finishes its deposit after its worker's death; nobody else has the process now.
        Event.STARTED_ALONE: Move(State.DETACHED, _TO_BROKER, Holder.BROKER),
        Event.NEVER_RAN: Move(State.GONE, (Effect.CLOSE_HANDLES,)),
        Event.VANISHED: Move(State.ENDED, (Effect.RECORD_LOST, Effect.START_PUMP), Holder.BROKER),
        # Its spawner may be in the middle of the fork: wait for what it says, or for its own end.
        Event.WORKER_LOST: Move(State.STARTING),
    },
    State.ATTACHED: {
        Event.DETACHED: Move(State.DETACHED, _TO_BROKER, Holder.BROKER),
        # The worker refused a reattachment: it never pumped.
        Event.SKIPPED: Move(State.DETACHED, _TO_BROKER, Holder.BROKER),
        # No word from the worker is needed: we have had our own descriptors since the deposit.
        Event.WORKER_LOST: Move(State.DETACHED, _TO_BROKER, Holder.BROKER),
        Event.ENDED: Move(State.ENDED, (Effect.ANNOUNCE,)),
    },
    State.DETACHED: {
        Event.REATTACHED: Move(State.ATTACHED, _TO_WORKER, Holder.WORKER),
        Event.CLAIMED: Move(State.ATTACHED, (Effect.STOP_PUMP,), Holder.WORKER),
        # No announcement: a detached process sends no events; its one end event goes out at reattach.
        Event.ENDED: Move(State.ENDED),
        # It is still here until it has ended, so that its outcome is real.
        Event.CLEANED: Move(State.DETACHED, (Effect.END_TREE,)),
    },
    State.ENDED: {
        # What is still open is drained by whoever holds it.
        Event.DETACHED: Move(State.ENDED, _TO_BROKER, Holder.BROKER),
        Event.SKIPPED: Move(State.ENDED, _TO_BROKER, Holder.BROKER),
        Event.WORKER_LOST: Move(State.ENDED, _TO_BROKER, Holder.BROKER),
        Event.REATTACHED: Move(State.ENDED, _TO_WORKER, Holder.WORKER),
        Event.CLAIMED: Move(State.ENDED, (Effect.STOP_PUMP,), Holder.WORKER),
        # Said again by a worker that took it back, or registered with a new broker.
        Event.ENDED: Move(State.ENDED, (Effect.ANNOUNCE,)),
        Event.COLLECTED: Move(State.GONE, _AWAY, Holder.NOBODY),
        Event.CLEANED: Move(State.GONE, (Effect.FORGET_AT_WORKER, *_AWAY), Holder.NOBODY),
        Event.EXPIRED: Move(State.GONE, (Effect.FORGET_AT_WORKER, *_AWAY), Holder.NOBODY),
    },
    State.GONE: {},
}

_UNSTARTED = "only a deposit comes to that, once"
_LIVES = "it has not ended"
_NOT_OURS = "the broker does not hold it"
_NOT_THEIRS = "no worker holds it"
_OVER = "nothing of it is left; late words about it are dropped before they get here"

# The pairs that cannot happen, each with its reason; together with MOVES they are all pairs.
IMPOSSIBLE: Mapping[tuple[State, Event], str] = {
    **{
        (state, event): _UNSTARTED
        for state in (State.ATTACHED, State.DETACHED, State.ENDED)
        for event in (Event.STARTED, Event.STARTED_ALONE, Event.NEVER_RAN, Event.VANISHED)
    },
    (State.STARTING, Event.DETACHED): "a worker waits for its starts before it detaches",
    (State.STARTING, Event.REATTACHED): _NOT_OURS,
    (State.STARTING, Event.SKIPPED): _NOT_OURS,
    (State.STARTING, Event.CLAIMED): "a worker deposits what it has before it registers",
    (State.STARTING, Event.ENDED): "an end is told by a holder, and there is none yet",
    (State.STARTING, Event.COLLECTED): _LIVES,
    (State.STARTING, Event.CLEANED): "clean waits for starts",
    (State.STARTING, Event.EXPIRED): _LIVES,
    (State.ATTACHED, Event.REATTACHED): _NOT_OURS,
    (State.ATTACHED, Event.CLAIMED): "it is the worker's already",
    (State.ATTACHED, Event.COLLECTED): _LIVES,
    (State.ATTACHED, Event.CLEANED): "clean leaves attached processes alone",
    (State.ATTACHED, Event.EXPIRED): _LIVES,
    (State.DETACHED, Event.DETACHED): _NOT_THEIRS,
    (State.DETACHED, Event.SKIPPED): _NOT_THEIRS,
    (State.DETACHED, Event.WORKER_LOST): _NOT_THEIRS,
    (State.DETACHED, Event.COLLECTED): _LIVES,
    (State.DETACHED, Event.EXPIRED): _LIVES,
    **{(State.GONE, event): _OVER for event in Event},
}


def step(custody: Custody, event: Event) -> tuple[Custody, tuple[Effect, ...]]:
    """Return where the process stands after `event`, and what to do; raises `KeyError` for an impossible pair."""
    move = MOVES[custody.state][event]
    return Custody(move.state, move.holder or custody.holder), move.effects
