"""Watchers: output as deltas, an end as one event.  They decide what to say; the link says it.

    stream    pieces of at most 8 KiB on UTF-8 boundaries, at most 10,000 a call, only while anybody listens
    exit      one end event, after the output is drained, with the aggregated output

Both belong to a process, under the call id that started it.  They go on through a natural exit and a forced one,
stop when the process is exported, and are aborted by prune, terminate-all and `Forget`: then nothing is sent but,
for the broker alone, that it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..common.messages import Delta, Ended
from ..common.response import whole_characters
from ..common.transcript import Gap, Transcript

DELTA_MAX = 8 << 10
DELTAS_PER_CALL = 10_000
# Bytes of aggregated output in an end event: head and tail.  Events wait in the broker for slow subscribers, by the
# thousand; who wants more reads the transcript.
AGGREGATE_MAX = 64 << 10


def split(data: bytes, *, final: bool) -> Iterator[bytes]:
    """Yield `data` in deltas; an unfinished character at the end is left out unless this is the end."""
    at = 0
    while at < len(data):
        piece = data[at : at + DELTA_MAX]
        if not (final and at + len(piece) == len(data)):
            piece = piece[: whole_characters(piece)]
        if not piece:
            return
        yield piece
        at += len(piece)


class Watch:
    """The two watchers of one process.

    `offset`: up to which the stream has been sent; `None` until somebody listens.
    """

    __slots__ = ("_aborted", "_send", "offset", "seq", "transcript")

    def __init__(
        self,
        transcript: Transcript,
        send: Callable[[Delta | Ended], None],
        *,
        seq: int = 0,
        offset: int | None = None,
    ) -> None:
        self.transcript = transcript
        self.seq = seq
        self.offset = offset
        self._send = send
        self._aborted = False

    def abort(self) -> None:
        """Say nothing from now on but that it has ended."""
        self._aborted = True

    def output(self, written: int, *, final: bool = False) -> None:
        """Send what was printed since the last delta; a gap is passed over, its bytes being gone."""
        if self._aborted or self.offset is None or self.seq >= DELTAS_PER_CALL:
            return
        facts = self.transcript.facts
        for part in self.transcript.read(self.offset, written):
            if isinstance(part, Gap):
                self.offset = part.end
                continue
            at, data = part
            for piece in split(data, final=final):
                if self.seq >= DELTAS_PER_CALL:
                    return
                self._send(
                    Delta(
                        process_id=facts.process_id,
                        call_id=facts.call_id,
                        seq=self.seq,
                        offset=at,
                        chunk=piece,
                    )
                )
                self.seq += 1
                at += len(piece)
                self.offset = at

    def ended(self, written: int) -> None:
        """Send the rest of the stream and the end event; aborted, say only that it ended."""
        self.output(written, final=True)
        facts = self.transcript.facts
        output = b"" if self._aborted else _aggregate(self.transcript, written)
        self._send(
            Ended(
                process_id=facts.process_id,
                call_id=facts.call_id,
                output=output,
                announce=not self._aborted,
            )
        )


def _aggregate(transcript: Transcript, written: int) -> bytes:
    half = AGGREGATE_MAX // 2
    spans = [(0, written)] if written <= AGGREGATE_MAX else [(0, half), (written - half, written)]
    return b"".join(
        part[1] for start, end in spans for part in transcript.read(start, end) if not isinstance(part, Gap)
    )
