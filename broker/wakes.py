"""What becomes of a wake, and when a thread's program is run with its wakes.  Pure.

A wake begins when something comes true that somebody waits for: a rule of a process, or `start`.  It is written
down (`journal`), and then handed to the thread's program, with all others that are pending; that is a run.  A run
is over when the program has returned, or failed.  A run whose worker died is the same run again, with the same
wakes, so that what it had done by then can be found again; a later one takes whatever is pending.

Always true
    A wake is handed over only once it is written; it is out of the way only by a return, a reader, five failures,
    or a person.
    One run of a thread at a time; what comes meanwhile is pending, and is the next one's.
    Only what the program did counts as a failure: not that its worker was killed, nor that none came up.

Not here
    Rows: `outbox`.  Workers, clocks, who waits: `delivery`, which does what is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

# Seconds before a program that failed, or whose worker died, is run again: the first pause, doubling up to the
# longest.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
# Failures of a program with one wake after which that is a dead letter, until a person looks at it.
FAILURES_MAX = 5


# One wake.


class State(Enum):
    """Where one wake stands; the values are in the file and in `outlive wakes`."""

    NEW = "new"  # not written yet
    PENDING = "pending"
    DELIVERED = "delivered"  # part of a run
    DONE = "done"  # the program has returned
    READ = "read"  # the agent had learned it by itself
    DEAD = "dead"  # five times the program failed
    DROPPED = "dropped"  # by a person, or with the program


class Event(Enum):
    """What happened to a wake."""

    COMMITTED = auto()
    DELIVERED = auto()  # a run took it
    ACKNOWLEDGED = auto()  # the program returned
    FAILED = auto()  # the program failed
    WORKER_DIED = auto()  # and it was not the program's doing
    READ = auto()  # an answer told the agent the same
    RETRIED = auto()  # a person wants it delivered
    DROPPED = auto()  # a person does not
    STOPPED = auto()  # the program was taken away
    REPLACED = auto()  # another program has taken the place of the one whose run had it


@dataclass(frozen=True, slots=True)
class Fate:
    """What is to become of one wake."""

    state: State = State.NEW
    failures: int = 0

    @property
    def is_due(self) -> bool:
        """Whether a run is to take it, or has."""
        return self.state in (State.PENDING, State.DELIVERED)

    @property
    def is_over(self) -> bool:
        """Whether nothing can happen any more."""
        return self.state in (State.DONE, State.DROPPED)


FATES: Mapping[State, Mapping[Event, State]] = {
    State.NEW: {
        Event.COMMITTED: State.PENDING,
        Event.READ: State.READ,
        Event.DROPPED: State.DROPPED,
        Event.STOPPED: State.DROPPED,
    },
    State.PENDING: {
        Event.DELIVERED: State.DELIVERED,
        Event.READ: State.READ,
        Event.RETRIED: State.PENDING,  # without a pause
        Event.DROPPED: State.DROPPED,
        Event.STOPPED: State.DROPPED,
    },
    State.DELIVERED: {
        Event.ACKNOWLEDGED: State.DONE,
        Event.FAILED: State.PENDING,  # or DEAD, see `after`
        # The same run again: a wake that joined it now would be unknown to what that has begun.
        Event.WORKER_DIED: State.DELIVERED,
        # What the other one had begun is not the new one's: it is part of its first run, as if of none before.
        Event.REPLACED: State.PENDING,
        # The program reads what it was woken for.
        Event.READ: State.DELIVERED,
        Event.DROPPED: State.DROPPED,
        Event.STOPPED: State.DROPPED,
    },
    State.DONE: {
        Event.READ: State.DONE,
    },
    State.READ: {
        Event.COMMITTED: State.READ,  # it was read before it was written
        Event.READ: State.READ,
        Event.RETRIED: State.PENDING,
        Event.DROPPED: State.DROPPED,
        Event.STOPPED: State.READ,
    },
    State.DEAD: {
        Event.READ: State.DEAD,  # that the program fails is still for a person to see
        Event.RETRIED: State.PENDING,
        Event.DROPPED: State.DROPPED,
        Event.STOPPED: State.DEAD,
    },
    State.DROPPED: {
        Event.COMMITTED: State.DROPPED,
        # It was dropped in the middle of its run.
        Event.ACKNOWLEDGED: State.DROPPED,
        Event.FAILED: State.DROPPED,
        Event.WORKER_DIED: State.DROPPED,
        Event.READ: State.DROPPED,
        Event.DROPPED: State.DROPPED,
    },
}

_NO_RUN = "it is not part of a run"
_WRITTEN = "it was written before"
_NOT_DUE = "a run takes what is pending"
_OVER = "nothing is left to be done about it"

IMPOSSIBLE_FATES: Mapping[tuple[State, Event], str] = {
    **{
        (state, event): _NO_RUN
        for state in (State.NEW, State.PENDING, State.DONE, State.READ, State.DEAD)
        for event in (Event.ACKNOWLEDGED, Event.FAILED, Event.WORKER_DIED, Event.REPLACED)
    },
    (State.DROPPED, Event.REPLACED): _OVER,
    **{(state, Event.COMMITTED): _WRITTEN for state in (State.PENDING, State.DELIVERED, State.DONE, State.DEAD)},
    **{(state, Event.DELIVERED): _NOT_DUE for state in State if state is not State.PENDING},
    **{
        (state, event): _OVER
        for state in (State.DONE, State.DROPPED)
        for event in (Event.RETRIED, Event.DROPPED, Event.STOPPED)
        if (state, event) != (State.DROPPED, Event.DROPPED)
    },
    (State.NEW, Event.RETRIED): "it is on its way",
    (State.DELIVERED, Event.RETRIED): "its run is not over",
}


def after(fate: Fate, event: Event) -> Fate:
    """Return a wake's fate after `event`; raises `KeyError` for an impossible pair."""
    state = FATES[fate.state][event]
    if event is Event.RETRIED:
        return Fate(state)
    if fate.state is State.DELIVERED and event is Event.FAILED:
        failures = fate.failures + 1
        return Fate(State.DEAD if failures >= FAILURES_MAX else state, failures)
    return Fate(state, fate.failures)


# A thread's runs.


class Phase(Enum):
    """Where a thread stands with its wakes."""

    UNMANNED = auto()  # it has no program: wakes are kept for one
    RESTING = auto()  # nothing is due
    WAKING = auto()  # a worker is wanted
    RUNNING = auto()  # the program runs, or is about to
    PAUSING = auto()  # it failed, its worker died, or none came up to run it


class Happening(Enum):
    """What happened to a thread's wakes, program or worker."""

    STARTED = auto()  # it was given a program
    STOPPED = auto()  # the program was taken away, with all that was due
    POSTED = auto()  # a wake is pending
    RETRIED = auto()  # a person wants one delivered
    WORKER_UP = auto()
    UNREACHABLE = auto()  # the worker does not come up
    RETURNED = auto()
    FAILED = auto()
    WORKER_DIED = auto()  # during the run, and not by the program's doing
    PAUSE_OVER = auto()


class Effect(Enum):
    """What is to be done."""

    WANT_WORKER = auto()
    RUN = auto()  # what a run had before its worker died, else all that is pending
    PAUSE = auto()  # for `Course.pause`
    SLEEP = auto()  # when nobody else needs the worker
    CANCEL = auto()


@dataclass(frozen=True, slots=True)
class Move:
    """The next phase and the effects."""

    phase: Phase
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Course:
    """A thread's phase, and how many tries in a row came to nothing."""

    phase: Phase = Phase.UNMANNED
    troubles: int = 0

    @property
    def pause(self) -> float:
        """Seconds until the next try."""
        return min(FIRST_PAUSE * 2.0 ** max(0, min(self.troubles, 20) - 1), LONGEST_PAUSE)


_WAKE = Move(Phase.WAKING, (Effect.WANT_WORKER,))
_RUN = Move(Phase.RUNNING, (Effect.RUN,))
_PAUSE = Move(Phase.PAUSING, (Effect.PAUSE,))
_TO_BED = Move(Phase.RESTING, (Effect.SLEEP,))
_REST = Move(Phase.RESTING)
_AWAY = Move(Phase.UNMANNED)


def _stay(phase: Phase) -> tuple[Move, Move]:
    return Move(phase), Move(phase)


# For each pair two moves: when something is due then, and when nothing is.
COURSES: Mapping[Phase, Mapping[Happening, tuple[Move, Move]]] = {
    Phase.UNMANNED: {
        # What came true before it had a program is due too.
        Happening.STARTED: (_WAKE, _REST),
        Happening.POSTED: _stay(Phase.UNMANNED),
        Happening.RETRIED: _stay(Phase.UNMANNED),
    },
    Phase.RESTING: {
        Happening.STARTED: (_WAKE, _REST),
        Happening.STOPPED: (_AWAY, _AWAY),
        Happening.POSTED: (_WAKE, _REST),
        Happening.RETRIED: (_WAKE, _REST),
    },
    Phase.WAKING: {
        Happening.STARTED: _stay(Phase.WAKING),
        Happening.STOPPED: (_AWAY, _AWAY),
        Happening.POSTED: _stay(Phase.WAKING),
        Happening.RETRIED: _stay(Phase.WAKING),
        Happening.WORKER_UP: (_RUN, _TO_BED),
        Happening.UNREACHABLE: (_PAUSE, _REST),
    },
    Phase.RUNNING: {
        Happening.STOPPED: (Move(Phase.UNMANNED, (Effect.CANCEL,)), Move(Phase.UNMANNED, (Effect.CANCEL,))),
        Happening.POSTED: _stay(Phase.RUNNING),
        Happening.RETRIED: _stay(Phase.RUNNING),
        # What came meanwhile is next, at once: a busy thread starves nobody.
        Happening.RETURNED: (_RUN, _TO_BED),
        Happening.FAILED: (_PAUSE, _TO_BED),
        # Something may kill it each time, such as what it takes of memory.
        Happening.WORKER_DIED: (_PAUSE, _TO_BED),
    },
    Phase.PAUSING: {
        Happening.STARTED: (_WAKE, _REST),
        Happening.STOPPED: (_AWAY, _AWAY),
        Happening.POSTED: _stay(Phase.PAUSING),
        Happening.RETRIED: (_WAKE, _TO_BED),
        Happening.PAUSE_OVER: (_WAKE, _TO_BED),
    },
}

_NO_PROGRAM = "there is no program that could"
_NOT_WANTED = "no worker was wanted"
_NOTHING_RUNS = "nothing runs"

IMPOSSIBLE_COURSES: Mapping[tuple[Phase, Happening], str] = {
    (Phase.UNMANNED, Happening.STOPPED): _NO_PROGRAM,
    **{
        (phase, happening): _NOT_WANTED
        for phase in Phase
        if phase is not Phase.WAKING
        for happening in (Happening.WORKER_UP, Happening.UNREACHABLE)
    },
    **{
        (phase, happening): _NOTHING_RUNS
        for phase in Phase
        if phase is not Phase.RUNNING
        for happening in (Happening.RETURNED, Happening.FAILED, Happening.WORKER_DIED)
    },
    **{
        (phase, Happening.PAUSE_OVER): "no pause was asked for, or it was cancelled with the phase"
        for phase in Phase
        if phase is not Phase.PAUSING
    },
    (Phase.RUNNING, Happening.STARTED): "a program that runs is stopped before another takes its place",
}


def step(course: Course, happening: Happening, *, due: bool) -> tuple[Course, tuple[Effect, ...]]:
    """Return a thread's course after `happening`, and what to do; raises `KeyError` for an impossible pair.

    `due`: whether a wake is due, now that this has happened.
    """
    move = COURSES[course.phase][happening][0 if due else 1]
    troubles = course.troubles
    if happening in (Happening.FAILED, Happening.UNREACHABLE, Happening.WORKER_DIED):
        troubles += 1
    elif happening in (Happening.RETURNED, Happening.STARTED, Happening.STOPPED, Happening.RETRIED):
        troubles = 0
    return Course(move.phase, troubles), move.effects
