"""What is kept of a thread: the ids it has used, and its ended processes until they expire.

    STATE/threads/NAME/ids             one process id a line, appended at each deposit
    STATE/threads/NAME/ended/ID        one file a process, written whole and renamed into place:
                                       a line of JSON with what `ps` shows and the kept ranges, then their bytes

An id in `ids` without a file is expired; one that is in neither was never ours.  Files are private (0600 in 0700
folders).  A file that cannot be read counts as expired; a full disk loses the file, never the process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..common.errors import ExpiredProcess, UnknownProcess
from ..common.messages import Output, outcome_from_wire
from ..common.response import Response, chunk_id, clip, output, tokens
from ..common.transcript import Gap, Transcript

FORMAT = 1
# Calls of a thread that are remembered, also when their processes have expired: what comes again is answered, not
# started again.
CALLS_REMEMBERED = 10_000


@dataclass(slots=True)
class Record:
    """One ended process: its line of `ps`, the kept ranges of its output, and their bytes."""

    row: dict[str, Any]
    written: int
    ranges: list[tuple[int, int]]
    data: bytes = field(repr=False)

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

    def answer(self, max_tokens: int, since: int | None, *, typed_nothing: bool) -> Response:
        """Answer `exec_command` or `write_stdin` of a process that was collected."""
        outcome = outcome_from_wire(self.row["outcome"])
        start = self.written if since is None else since
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
            warnings=["the process has ended; nothing was typed"] if typed_nothing else [],
        )


class ThreadArchive:
    """The archive of one thread.

    `ids`: every id the thread has used.  `calls`: call id → process id of the last ones archived by this broker,
    expired or not.
    """

    def __init__(
        self,
        folder: Path,
        keep_hours: float,
        keep_count: int,
        later: Callable[[Callable[[], None]], None] = lambda write: write(),
    ) -> None:
        """Open or make the folder; raises `OSError` when that cannot be.

        `later`: carries out writes, in their order, perhaps in another thread; what is to be written is known
        here at once.  A write that fails raises `OSError` there.
        """
        self.folder = folder
        self._later = later
        self._ended = folder / "ended"
        self._keep_s = keep_hours * 3600
        self._keep_count = keep_count
        self._ended.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.calls: dict[str, str] = {}
        found = []
        for entry in os.scandir(self._ended):
            if entry.name.isdecimal():
                found.append((entry.stat().st_mtime, entry.name))
            elif entry.name.startswith("."):
                os.unlink(entry.path)  # the draft of a broker that was killed meanwhile
        # id → when it was archived; oldest first.
        self._files: dict[str, float] = {name: at for at, name in sorted(found)}
        self._unwritten: dict[str, Record] = {}
        self.ids = self._read_ids() | set(self._files)

    def _read_ids(self) -> set[str]:
        try:
            # A damaged line must not make the others forgotten: their ids would be given out again.
            text = (self.folder / "ids").read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return set()
        return {line for line in text.split("\n") if line.isdecimal()}

    def use(self, process_id: str) -> None:
        """Remember that the thread has used this id."""
        if process_id not in self.ids:
            self.ids.add(process_id)
            self._later(partial(_append, self.folder / "ids", process_id))

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, process_id: str) -> bool:
        return process_id in self._files

    def keep(self, row: dict[str, Any], transcript: Transcript) -> None:
        """Keep the record of a process that has gone; the oldest make room."""
        process_id = row["process_id"]
        written = transcript.written
        kept = [part for part in transcript.read(0, written) if not isinstance(part, Gap)]
        ranges = [(at, at + len(data)) for at, data in kept]
        record = Record(row, written, ranges, b"".join(data for _, data in kept))
        self._unwritten[process_id] = record
        self._files[process_id] = time.time()
        self.calls[row["call_id"]] = process_id
        if len(self.calls) > CALLS_REMEMBERED:
            del self.calls[next(iter(self.calls))]
        self._later(partial(self._write, process_id, record))
        self.expire()

    def _write(self, process_id: str, record: Record) -> None:
        try:
            if process_id in self._files:
                _write_record(self._ended / process_id, record)
        except OSError:
            self._files.pop(process_id, None)
            raise
        finally:
            self._unwritten.pop(process_id, None)

    def expire(self) -> None:
        """Remove what is too old or too much."""
        oldest = time.time() - self._keep_s
        while self._files:
            process_id = next(iter(self._files))
            if self._files[process_id] >= oldest and len(self._files) <= self._keep_count:
                return
            del self._files[process_id]
            self._unwritten.pop(process_id, None)
            self._later(partial((self._ended / process_id).unlink, missing_ok=True))

    def get(self, process_id: str) -> Record:
        """Return the record of an ended process; raises `ExpiredProcess` or `UnknownProcess`."""
        self.expire()
        if (unwritten := self._unwritten.get(process_id)) is not None:
            return unwritten
        if process_id in self._files:
            try:
                return _read(self._ended / process_id)
            except (OSError, ValueError, KeyError, TypeError):
                del self._files[process_id]
        if process_id in self.ids:
            raise ExpiredProcess(f"process {process_id} ended, and its outcome and output have expired")
        raise UnknownProcess(
            f"process {process_id} was never started in thread {self.folder.name}; see `outlive ps`"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the line of `ps` of every ended process, oldest first."""
        self.expire()
        for process_id in list(self._files):
            if (unwritten := self._unwritten.get(process_id)) is not None:
                yield unwritten.row
                continue
            try:
                with open(self._ended / process_id, "rb") as file:
                    yield json.loads(file.readline())["row"]
            except (OSError, ValueError, KeyError, TypeError):
                continue


def _append(path: Path, process_id: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"\n{process_id}\n".encode())  # the first newline ends a line torn by a full disk
    finally:
        os.close(fd)


def _write_record(target: Path, record: Record) -> None:
    """Write a record whole, and rename it into place."""
    head = {"format": FORMAT, "row": record.row, "written": record.written, "ranges": record.ranges}
    draft = target.with_name(f".{target.name}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for piece in (json.dumps(head).encode() + b"\n", record.data):
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
    except OSError:
        os.unlink(draft)
        raise
    finally:
        os.close(fd)
    os.rename(draft, target)


def _read(path: Path) -> Record:
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}")
        ranges = [(int(first), int(last)) for first, last in head["ranges"]]
        record = Record(dict(head["row"]), int(head["written"]), ranges, file.read())
    sizes = [last - first for first, last in ranges]
    if min(sizes, default=0) < 0 or sum(sizes) != len(record.data):
        raise ValueError(f"{len(record.data)} bytes for ranges {ranges}")
    return record
