"""The result of one tool call, as an object and as the text that models know.

Tokens are counted as bytes / 4.  An output that is too long keeps its head and tail around
`…N tokens truncated…`; bytes that the transcript no longer keeps count as truncated.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from .messages import READ_MAX, Output
from .outcome import Outcome
from .transcript import Gap

BYTES_PER_TOKEN = 4


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What `exec_command` and `write_stdin` return.

    `exit_code`: the code, or 128 + N for signal N; `None` while it lives and for `lost`.  `session_id`: a
    number, only while it lives.  `original_token_count`: of the output before it was shortened.
    `output_end`: the offset in the transcript up to which output was delivered.  `typed`: bytes of input
    that the terminal took.  `warnings`: sentences for the agent.
    """

    thread: str
    process_id: str
    chunk_id: str
    wall_time_seconds: float
    exit_code: int | None
    session_id: int | None
    original_token_count: int
    output: str
    outcome: dict[str, Any] | None
    output_end: int
    typed: int = 0
    warnings: list[str] = []
    sentence: str = ""

    def text(self) -> str:
        """Return the result as models know it; exactly one Process line, the one that is true."""
        return "\n".join(
            [
                f"Chunk ID: {self.chunk_id}",
                f"Wall time: {self.wall_time_seconds:.4f} seconds",
                self.sentence or f"Process running with session ID {self.session_id}",
                f"Original token count: {self.original_token_count}",
                *(f"Warning: {warning}" for warning in self.warnings),
                "Output:",
                self.output,
            ]
        )


def chunk_id() -> str:
    """Return six random hex digits: they name one answer in a log."""
    return secrets.token_hex(3)


def tokens(byte_count: int) -> int:
    """Return how many tokens that many bytes are taken for, rounded up."""
    return -(-byte_count // BYTES_PER_TOKEN)


def typed_less(typed: int, size: int, *, ended: bool) -> str:
    """Return the warning that only `typed` of a call's `size` bytes of input were typed."""
    if ended:
        return f"the process has ended; {f'only {typed} of {size} bytes were' if typed else 'nothing was'} typed"
    return f"only {typed} of {size} bytes were typed: the program does not read its input; send the rest again"


def output(
    parts: Iterable[tuple[int, bytes] | Gap],
    offset: int,
    limit: int,
    written: int,
    outcome: Outcome | None,
    *,
    ended: bool,
) -> Output:
    """Return the answer to `read_output`: at most `limit` bytes of what `parts` yields from `offset` on."""
    pieces: list[tuple[int, bytes]] = []
    gaps: list[tuple[int, int]] = []
    room, at = min(limit, READ_MAX), offset
    for part in parts:
        if isinstance(part, Gap):
            gaps.append((part.start, part.end))
            at = part.end
            continue
        start, data = part[0], part[1][:room]
        pieces.append((start, data))
        at = start + len(data)
        room -= len(data)
        if not room:
            break
    return Output(
        pieces=pieces,
        gaps=gaps,
        next_offset=at,
        written=written,
        ended=ended and at >= written,
        outcome=outcome.to_wire() if outcome else None,
    )


def clip(pieces: Iterable[tuple[int, bytes] | Gap], start: int, end: int, max_tokens: int) -> str:
    """Return the bytes `[start, end)` of a transcript as text of about `max_tokens` tokens.

    `pieces` as from `Transcript.read`.  Head and tail get half of the room each.
    """
    room = max_tokens * BYTES_PER_TOKEN
    parts = list(pieces)
    kept = [part for part in parts if not isinstance(part, Gap)]
    if len(kept) == len(parts) and end - start <= room:
        return b"".join(data for _, data in kept).decode("utf-8", "replace")
    head = _run(kept, start, room // 2, forward=True)
    tail = _run(kept, end, room - room // 2, forward=False)
    if len(head) + len(tail) > end - start:  # everything fits but for a gap at an end
        tail = tail[len(head) + len(tail) - (end - start) :]
    head = head[: whole_characters(head)]
    tail = tail[_continuation_bytes(tail) :]
    dropped = tokens(end - start - len(head) - len(tail))
    return f"{head.decode('utf-8', 'replace')}…{dropped} tokens truncated…{tail.decode('utf-8', 'replace')}"


def _run(kept: list[tuple[int, bytes]], bound: int, room: int, *, forward: bool) -> bytes:
    """Return up to `room` bytes that lie without a gap after (before) `bound`."""
    run = b""
    for offset, data in kept if forward else reversed(kept):
        if forward and offset == bound + len(run):
            run += data
        elif not forward and offset + len(data) == bound - len(run):
            run = data + run
        else:
            break
    if not room:
        return b""
    return run[:room] if forward else run[-room:]


def whole_characters(data: bytes) -> int:
    """Return how many bytes of `data` end on a UTF-8 character boundary.

    Holds back at most three bytes, and only if they may become a character; other bytes count as whole.
    """
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data)
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 0
            return len(data) - back if wanted > back else len(data)
    return len(data)


def _continuation_bytes(data: bytes) -> int:
    count = 0
    while count < min(3, len(data)) and 0x80 <= data[count] < 0xC0:
        count += 1
    return count
