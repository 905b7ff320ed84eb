"""What is kept of ended processes, how it answers, and which of it has to go.  Pure.

Always true
    What goes first is what ended first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..common.inlet import name_of
from ..common.messages import Output, WriteStdin, outcome_from_wire
from ..common.outcome import Outcome
from ..common.response import Response, chunk_id, clip, output, tokens, typed_less
from ..common.transcript import Gap, Transcript

# A process of a thread: (thread, process id).
Key = tuple[str, str]

# Calls of an ended process that are remembered: of each caller that it may have, the last.
CALLS_KEPT = 8
# Bytes that a record takes beside its output and its command.
_ROW_SIZE = 1024


@dataclass(slots=True)
class Record:
    """One ended process: its line of `ps`, the kept ranges of its output, and their bytes.

    `calls`: the last ones, by their names (`inlet.name_of`, in hex): how many bytes each typed, and up to where the
    agent had had the output when it began.
    """

    row: dict[str, Any]
    written: int
    ranges: list[tuple[int, int]]
    data: bytes = field(repr=False)
    calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, row: dict[str, Any], transcript: Transcript, calls: Mapping[str, tuple[int, int]]) -> Record:
        """Return the record of a process with this line of `ps`, and these last calls."""
        written = transcript.written
        kept = [part for part in transcript.read(0, written) if not isinstance(part, Gap)]
        ranges = [(at, at + len(data)) for at, data in kept]
        return cls(row, written, ranges, b"".join(data for _, data in kept), calls)

    @classmethod
    def lost(cls, row: dict[str, Any], reason: str) -> Record:
        """Return the record of a process of which nothing is left; `row`: its last known line of `ps`."""
        gone = {"state": "ended", "worker_pid": None, "bytes_written": 0, "bytes_delivered": 0}
        return cls({**row, **gone, "outcome": Outcome.lost(reason).to_wire()}, 0, [], b"")

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.data) + _ROW_SIZE + sum(map(len, self.row.get("command", ())))

    def parts(self, start: int, end: int) -> Iterator[tuple[int, bytes] | Gap]:
        """Yield what is kept of `[start, end)` in order, as `Transcript.read` does."""
        end = min(end, self.written)
        at = start
        base = 0
        for first, last in self.ranges:
            low, high = max(first, start), min(last, end)
            if low < high:
                if low > at:
                    yield Gap(at, low)
                yield low, self.data[base + low - first : base + high - first]
                at = high
            base += last - first
        if at < end:
            yield Gap(at, end)

    def piece(self, offset: int, limit: int) -> Output:
        """Answer `read_output`."""
        outcome = outcome_from_wire(self.row["outcome"])
        return output(self.parts(offset, self.written), offset, limit, self.written, outcome, ended=True)

    def answer_write(self, call: WriteStdin) -> Response:
        """Answer `write_stdin`; a call whose first try was accepted while it lived is answered as such."""
        typed, since = self.calls.get(name_of(call.write_id).hex(), (0, self.written))
        typed, since = min(typed, len(call.chars)), min(since, self.written)
        short = typed < len(call.chars)
        warnings = [typed_less(typed, len(call.chars), ended=True)] if short else []
        return self.answer(call.max_output_tokens, since, typed=typed, warnings=warnings)

    def answer(self, max_tokens: int, start: int, *, typed: int = 0, warnings: Sequence[str] = ()) -> Response:
        """Answer with the output from `start` on; `exec_command`: from the beginning."""
        outcome = outcome_from_wire(self.row["outcome"])
        return Response(
            thread=self.row["thread"],
            process_id=self.row["process_id"],
            chunk_id=chunk_id(),
            wall_time_seconds=0.0,
            exit_code=outcome.exit_code if outcome else None,
            session_id=None,
            original_token_count=tokens(self.written - start),
            output=clip(self.parts(start, self.written), start, self.written, max_tokens),
            outcome=self.row["outcome"],
            output_end=self.written,
            sentence=outcome.sentence() if outcome else "",
            typed=typed,
            warnings=list(warnings),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a record is kept (seconds), how many of a thread, how many bytes in all."""

    seconds: float
    count: int
    size: int


class Shelf:
    """Which records are kept, in the order of their ends, and which have to go."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # When each ended, and its size; oldest first.  Not a dict, whose first item is slow to find after removals.
        self._all: OrderedDict[Key, tuple[float, int]] = OrderedDict()
        self._threads: dict[str, OrderedDict[str, None]] = {}
        # Threads that may have too many.
        self._grown: set[str] = set()
        self.size = 0

    def ids(self, thread_id: str) -> Collection[str]:
        """Return what is kept of a thread, oldest first."""
        return self._threads.get(thread_id, ())

    def __contains__(self, key: Key) -> bool:
        return key in self._all

    def add(self, key: Key, at: float, size: int) -> None:
        """Keep a record that ended at `at`, after all others."""
        self.remove(key)
        self._all[key] = at, size
        self._threads.setdefault(key[0], OrderedDict())[key[1]] = None
        self._grown.add(key[0])
        self.size += size

    def remove(self, key: Key) -> None:
        """Let a record go; nothing happens when it is not there."""
        if found := self._all.pop(key, None):
            del self._threads[key[0]][key[1]]
            self.size -= found[1]

    def forget(self, thread_id: str) -> None:
        """Nothing is kept of this thread, and nothing will be."""
        self._threads.pop(thread_id, None)
        self._grown.discard(thread_id)

    def expire(self, now: float) -> list[Key]:
        """Let go, and return, what is too old or too much at `now` (seconds)."""
        gone = []
        for thread_id in self._grown:
            thread = self._threads[thread_id]
            while len(thread) > self._limits.count:
                gone.append((thread_id, next(iter(thread))))
                self.remove(gone[-1])
        self._grown.clear()
        oldest = now - self._limits.seconds
        while self._all:
            key, (at, _) = next(iter(self._all.items()))
            if at >= oldest and self.size <= self._limits.size:
                break
            gone.append(key)
            self.remove(key)
        return gone


def rfc3339(nanoseconds: int) -> str:
    """Return a time as RFC 3339 UTC, to the millisecond."""
    moment = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
