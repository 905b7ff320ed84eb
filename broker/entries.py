"""What the broker knows of one process, and of one thread: records, and how they are shown.

No decisions and no I/O beyond looking into the headers of transcript and inlet; who waits for a change of a record
waits here.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress

from ..common import kernel
from ..common.descriptors import Handles
from ..common.errors import PeerError
from ..common.inlet import Inlet
from ..common.messages import ProcessRow, ThreadRow
from ..common.outcome import Outcome
from ..common.transcript import Transcript
from .custody import Custody, State
from .journal import ThreadJournal
from .lifecycle import Life, Phase
from .peers import Peer
from .records import CALLS_KEPT, rfc3339

# Characters of a command line where many are shown, or it is not what is asked for.
COMMAND_MAX = 1000


def brief(command: list[str], most: int = COMMAND_MAX) -> list[str]:
    """Return an argv with at most `most` characters, and with `…` where it was cut."""
    kept: list[str] = []
    for word in command:
        if len(word) > most:
            return [*kept, word[: max(0, most)] + "…"]
        kept.append(word)
        most -= len(word) + 1
    return kept


class Changing:
    """A record that others wait for."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    async def changed(self) -> None:
        """Wait for the next change."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            with suppress(ValueError):
                self._waiters.remove(waiter)

    def tell(self) -> None:
        """Let everybody who waits look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class Entry(Changing):
    """What the broker knows and holds of one process."""

    __slots__ = (
        "announced",
        "custody",
        "ending",
        "epoch",
        "handles",
        "key",
        "pid",
        "stream",
        "talks",
        "told",
        "transcript",
    )

    def __init__(self, key: tuple[str, str], epoch: int) -> None:
        super().__init__()
        self.key = key
        self.epoch = epoch
        self.custody = Custody()
        self.handles = Handles()
        self.transcript: Transcript | None = None
        self.pid = 0
        # Whether the one end event went out.
        self.announced = False
        # Where the stream of deltas goes on: (next number, offset).
        self.stream: tuple[int, int] | None = None
        # Whether an answer told of its end.
        self.told = False
        # Calls that we answer from our own copies at this moment.
        self.talks = 0
        self.ending: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Where it stands."""
        return self.custody.state

    @property
    def call_id(self) -> str:
        """The call that started it."""
        return self.transcript.facts.call_id if self.transcript else ""

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, once that is known."""
        return self.transcript.live().outcome if self.transcript else None

    def last_calls(self) -> dict[str, tuple[int, int]]:
        """Return what its last calls typed, by their names; also if its inlet makes no sense any more.

        See `Record.calls`.  Nobody holds it by now.
        """
        assert self.transcript is not None
        if self.handles.inlet < 0:
            name, since = self.transcript.asked()
            return {name.hex(): (0, since)}
        try:
            inlet = Inlet(self.handles.inlet, self.transcript.facts.mark)
            inlet.load()
            position = inlet.position
        except (PeerError, OSError):
            return {}
        return {call.name.hex(): (call.typed(position), call.since) for call in inlet.last(CALLS_KEPT)}

    def row(self, worker_pid: int | None) -> ProcessRow:
        """Return its line of `ps`; `worker_pid`: its thread's."""
        transcript = self.transcript
        assert transcript is not None
        facts, live = transcript.facts, transcript.live()
        ended = self.state in (State.ENDED, State.GONE)
        columns, rows = self._size() if facts.tty else (None, None)
        return ProcessRow(
            thread=facts.thread_id,
            process_id=facts.process_id,
            call_id=facts.call_id,
            pid=live.pid or None,
            state="ended" if ended else self.state.value,  # type: ignore[arg-type]
            worker_pid=worker_pid if self.state is State.ATTACHED else None,
            command=[os.fsdecode(word) for word in facts.argv],
            cwd=os.fsdecode(facts.cwd),
            tty=facts.tty,
            started_at=rfc3339(facts.started_at_ns),
            bytes_written=transcript.written,
            bytes_delivered=live.delivered,
            outcome=live.outcome.to_wire() if live.outcome and ended else None,
            wake_on=list(facts.wake_on),
            columns=columns,
            rows=rows,
        )

    def _size(self) -> tuple[int, int]:
        """Return columns and rows of its terminal; before it has come to us, those that it was asked for with."""
        assert self.transcript is not None
        if self.handles.terminal >= 0:
            with suppress(OSError):
                return kernel.window_size(self.handles.terminal)
        return self.transcript.facts.columns, self.transcript.facts.rows


class Thread(Changing):
    """One agent thread: its processes, its part of the journal, its worker."""

    def __init__(self, thread_id: str, journal: ThreadJournal) -> None:
        super().__init__()
        self.thread_id = thread_id
        self.journal = journal
        self.entries: dict[str, Entry] = {}
        self.life = Life()
        self.epoch = journal.epoch
        self.worker_pid: int | None = None
        self.worker: Peer | None = None
        # The epoch whose channel is closed, for good if its worker is dead.
        self.hung_up = 0
        # Epochs whose worker is dead while its spawner lives and has no channel to us: a former broker's.
        self.unfinished: set[int] = set()
        # Workers that are dead while their spawners still hold their channels: a start may come out of these.
        self.former: set[Peer] = set()
        self.failure = ""
        # One handoff at a time; and the one that a new worker begins with.
        self.handoff = asyncio.Lock()
        self.taking_back: asyncio.Task[None] | None = None
        # Whether its worker survived a former broker and has not reported yet: its processes are not known before.
        self.expected = False
        # When somebody last asked for it, on the monotonic clock.
        self.asked_for = time.monotonic()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing of it runs, is held, or is under way."""
        at_rest = self.life.phase in (Phase.ASLEEP, Phase.FAILED)
        under_way = self.expected or self.unfinished or self.former or self.handoff.locked()
        taking_back = self.taking_back and not self.taking_back.done()
        return at_rest and not (self.entries or self.worker or under_way or taking_back)

    def entry_of_call(self, call_id: str) -> Entry | None:
        """Return the process that this call started, if it is still held."""
        for entry in self.entries.values():
            if call_id and entry.call_id == call_id:
                return entry
        return None

    def row(self) -> ThreadRow:
        """Return its line of `threads`."""
        states = [entry.state for entry in self.entries.values()]
        phase = self.life.phase
        asleep = phase is Phase.ASLEEP
        return ThreadRow(
            thread=self.thread_id,
            state="failed" if phase is Phase.FAILED else "asleep" if asleep else "awake",
            worker_pid=self.worker_pid,
            epoch=self.epoch,
            attached=states.count(State.ATTACHED) + states.count(State.STARTING),
            detached=states.count(State.DETACHED),
            ended=states.count(State.ENDED) + len(self.journal),
        )
