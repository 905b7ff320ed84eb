"""The life of one thread's worker: started on demand, replaced at once, backed off, sent to bed, given up.

Always true
    At most one worker process of a thread exists, or none.
    A worker that had come up is replaced at once, however often it dies; only deaths before that are counted.

Not here
    Processes and their descriptors: `custody`.  Pids, clocks: a retry reaches us as an event.  `workers` does what
    is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

# Seconds before a worker that did not come up is tried again: the first pause, doubling up to the longest.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
# Deaths in a row before it came up after which the thread is given up, until somebody asks for it again.
GIVE_UP_AFTER = 5


class Phase(Enum):
    """Where a thread's worker stands."""

    ASLEEP = auto()  # none, on purpose
    STARTING = auto()  # started, not yet registered
    PAUSING = auto()  # died before it came up; to be tried again
    AWAKE = auto()  # registered
    LEAVING = auto()  # told to go to bed
    RETURNING = auto()  # told to go to bed, and wanted again meanwhile
    FAILED = auto()  # given up; processes safe


class Event(Enum):
    """What happened."""

    WANTED = auto()  # a call or a resume needs the worker
    REGISTERED = auto()  # it is up
    DIED = auto()  # the kernel says so
    PAUSE_OVER = auto()
    DISMISSED = auto()  # somebody sends it to bed


class Effect(Enum):
    """What is to be done.  Whoever waits is told after each event besides, and looks at the phase."""

    START_WORKER = auto()
    PAUSE = auto()  # for `Life.pause`
    WELCOME = auto()  # give it what is detached, let waiting calls go on
    SAY_BYE = auto()


@dataclass(frozen=True, slots=True)
class Move:
    """The next phase and the effects."""

    phase: Phase
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Life:
    """A thread's phase, and how many of its workers in a row died before they came up."""

    phase: Phase = Phase.ASLEEP
    failures: int = 0

    @property
    def pause(self) -> float:
        """Seconds until the next try."""
        return min(FIRST_PAUSE * 2.0 ** max(0, self.failures - 1), LONGEST_PAUSE)


_START = Move(Phase.STARTING, (Effect.START_WORKER,))
_UP = Move(Phase.AWAKE, (Effect.WELCOME,))

MOVES: Mapping[Phase, Mapping[Event, Move]] = {
    Phase.ASLEEP: {
        Event.WANTED: _START,
        # One that survived its broker reports to the next.
        Event.REGISTERED: _UP,
        Event.DISMISSED: Move(Phase.ASLEEP),
    },
    Phase.STARTING: {
        Event.WANTED: Move(Phase.STARTING),
        Event.REGISTERED: _UP,
        Event.DIED: Move(Phase.PAUSING, (Effect.PAUSE,)),  # or FAILED, see `step`
    },
    Phase.PAUSING: {
        Event.WANTED: Move(Phase.PAUSING),
        Event.PAUSE_OVER: _START,
        Event.DISMISSED: Move(Phase.ASLEEP),
        # One that survived the former broker was slow to report.
        Event.REGISTERED: _UP,
    },
    Phase.AWAKE: {
        Event.WANTED: Move(Phase.AWAKE),
        Event.DIED: _START,
        Event.DISMISSED: Move(Phase.LEAVING, (Effect.SAY_BYE,)),
        # The same worker again: its channel broke, and it came back.
        Event.REGISTERED: _UP,
    },
    Phase.LEAVING: {
        Event.WANTED: Move(Phase.RETURNING),
        Event.DIED: Move(Phase.ASLEEP),
        Event.DISMISSED: Move(Phase.LEAVING),
        # Its channel was broken when it was sent to bed, so it has not heard of it.
        Event.REGISTERED: Move(Phase.LEAVING, (Effect.SAY_BYE,)),
    },
    Phase.RETURNING: {
        Event.WANTED: Move(Phase.RETURNING),
        Event.DIED: _START,
        Event.DISMISSED: Move(Phase.LEAVING),
        Event.REGISTERED: Move(Phase.RETURNING, (Effect.SAY_BYE,)),
    },
    Phase.FAILED: {
        Event.WANTED: _START,
        Event.DISMISSED: Move(Phase.ASLEEP),
        Event.REGISTERED: _UP,
    },
}

_NO_WORKER = "there is no worker that could"
_NO_PAUSE = "no pause was asked for, or it was cancelled with the phase"

IMPOSSIBLE: Mapping[tuple[Phase, Event], str] = {
    **{(phase, Event.DIED): _NO_WORKER for phase in (Phase.ASLEEP, Phase.PAUSING, Phase.FAILED)},
    **{(phase, Event.PAUSE_OVER): _NO_PAUSE for phase in Phase if phase is not Phase.PAUSING},
    (Phase.STARTING, Event.DISMISSED): "whoever dismisses waits until the worker is up or given up",
}


def step(life: Life, event: Event) -> tuple[Life, tuple[Effect, ...]]:
    """Return the thread's life after `event`, and what to do; raises `KeyError` for an impossible pair."""
    move = MOVES[life.phase][event]
    if life.phase is Phase.STARTING and event is Event.DIED:
        failures = life.failures + 1
        if failures >= GIVE_UP_AFTER:
            return Life(Phase.FAILED, failures), ()
        return Life(move.phase, failures), move.effects
    if event is Event.REGISTERED or life.phase is Phase.FAILED:
        return Life(move.phase), move.effects
    return replace(life, phase=move.phase), move.effects
