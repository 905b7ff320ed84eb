"""A transcript: a memfd that holds a header and then everything one process printed, by offset, for ever.

Byte *n* of the stream lies at *base* + *n*; `st_size` − *base* bytes were written.  What is not kept is punched
out; what was punched out is recorded first, so that a reader reports a gap and never zeros.  The header makes
a transcript self-describing: whoever finds nothing but descriptors knows all it needs.

    offset  size  field           written by
         0     8  magic           creator       b"OUTLIVE\\0"
         8     2  version         creator       1
        12     4  base            creator       where the stream starts: whole pages
        16     4  static length   creator       of the msgpack map at 512
        24     8  conduit         creator       inode number of that pipe; 0: none
        64     4  pid             child         before it executes its program
        68     4  started         child         1 once pid is valid: the mark that it ran
        72     8  lease start     lease holder  start time of the holder, clock ticks since boot
        80     4  lease pid       lease holder
        84     4  lease epoch     lease holder  of the thread; 0 for the broker
        88     4  lease valid     lease holder  0: released
        92     4  told            lease holder  1 once an answer has told of its end
        96     8  delivered       lease holder  bytes of the stream that the agent has had
       104    32  holes           lease holder  from, to, from, to: offsets of the stream
       136     8  asked           lease holder  the last poll's name, of a process without an inlet: `inlet.name_of`
       144     8  asked since     lease holder  what `delivered` was when that poll began
       152     4  ended by        who ended it  index into `outcome.BYS`, plus one
       160     4  kind            who knows     index into `outcome.KINDS`
       164     4  value           who knows     code or signal
       168     8  ended at        who knows     nanoseconds since 1970
       176     4  outcome valid   who knows     1 once the three above are true
       184   128  reason          who knows     UTF-8, zero-padded, for `lost`
       312     8  marked at       child         nanoseconds since boot, before pid: it had started by then
       320     8  scanned         lease holder  bytes of the stream in which output rules have been looked for
       328     8  output at       lease holder  nanoseconds since boot of the last output, while that matters
       336   128  matches         lease holder  8 slots, for one output rule each: see `Found`
       512     …  static          creator       msgpack map, see `Facts`

All numbers are little-endian; a value is written first, its valid flag after.  The lease is taken under a lock of
the kernel's on its bytes, so that of two who find it free one gets it.

Always true
    The file position, shared by all copies of the descriptor, is where the next byte goes: nobody may lseek,
    read, write or set O_APPEND here.  `pread`, `pwrite` to the header, and the pump only.
    A reader preads first and reads the holes after.
    Values of a header are checked, never trusted: any holder could have written them.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

from . import kernel
from .errors import BadRequest, HandoffError, PeerError, shown
from .names import check_process, check_thread
from .outcome import BYS, KINDS, By, Outcome

MAGIC = b"OUTLIVE\0"
VERSION = 1
PAGE = 4096
_STATIC_AT = 512
# 2 MiB of argv and environment is what Linux accepts for one program; a static part beyond it is no header.
_STATIC_MAX = 2 << 20

_PREFIX = struct.Struct("<8sHHII4xQ")
_STARTED = struct.Struct("<II")
_LEASE = struct.Struct("<QIII")
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_ASKED = struct.Struct("<8sQ")
_HOLES = struct.Struct("<QQQQ")
_OUTCOME = struct.Struct("<IiQI")
_LIVE = struct.Struct("<II QIIII Q QQQQ 16x I4x IiQI4x 128s")
_LIVE_SIZE, _BYS, _KINDS = _LIVE.size, len(BYS), len(KINDS)
_MATCH = struct.Struct("<IIQ")
_CONDUIT_AT, _PID_AT, _LEASE_AT, _TOLD_AT, _DELIVERED_AT, _HOLES_AT, _ASKED_AT = 24, 64, 72, 92, 96, 104, 136
_BY_AT, _OUTCOME_AT, _REASON_AT, _MARKED_AT = 152, 160, 184, 312
_SCANNED_AT, _OUTPUT_AT, _MATCHES_AT = 320, 328, 336
# Output rules that may be looked for at once.
MATCHES = 8


class Limits(NamedTuple):
    """What a transcript keeps, in bytes.

    The defaults are what agents know from OpenAI Codex, 1 MiB, half of it the head, plus a window for an agent
    that has not read yet.  `slack`: how far the tail may grow before it is trimmed, so that a flood is not
    one system call a page.
    """

    head: int = 512 << 10
    tail: int = 512 << 10
    unread: int = 256 << 10
    slack: int = 256 << 10


class Facts(NamedTuple):
    """The static part of a header: what never changes about a process.

    `wake_on`: the texts of the rules it was started with.
    """

    thread_id: str
    process_id: str
    call_id: str
    mark: str
    argv: tuple[bytes, ...]
    cwd: bytes
    tty: bool
    columns: int
    rows: int
    started_at_ns: int
    boot_id: str
    limits: Limits = Limits()
    wake_on: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the msgpack map that stands in a header."""
        limits = self.limits
        raw: bytes = msgpack.packb(
            {
                "thread": self.thread_id,
                "process": self.process_id,
                "call": self.call_id,
                "mark": self.mark,
                "argv": list(self.argv),
                "cwd": self.cwd,
                "tty": self.tty,
                "size": [self.columns, self.rows],
                "started_at": self.started_at_ns,
                "boot": self.boot_id,
                "limits": [limits.head, limits.tail, limits.unread, limits.slack],
                **({"wake_on": list(self.wake_on)} if self.wake_on else {}),
            },
            unicode_errors="surrogateescape",  # a call id is the caller's own word
        )
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> Facts:
        """Understand the static part of a header; raises `PeerError` naming what is wrong with it."""
        try:
            table = msgpack.unpackb(raw, strict_map_key=True, unicode_errors="surrogateescape")
            columns, rows = table["size"]
            facts = cls(
                table["thread"],
                table["process"],
                table["call"],
                table["mark"],
                tuple(table["argv"]),
                table["cwd"],
                table["tty"],
                columns,
                rows,
                table["started_at"],
                table["boot"],
                Limits(*table["limits"]),
                tuple(table.get("wake_on", ())),
            )
        except (ValueError, TypeError, KeyError, msgpack.UnpackException, RecursionError) as error:
            raise PeerError(f"transcript header: its static part is damaged ({error!r})") from None
        facts._check()
        return facts

    def _check(self) -> None:
        for name, value, wanted in zip(self._fields, self, _FACTS, strict=True):
            _demand(name, value, wanted)
        for word in self.argv:
            _demand("argv", word, bytes)
        for rule in self.wake_on:
            _demand("wake_on", rule, str)
        for name, value in zip(Limits._fields, self.limits, strict=True):
            _demand(name, value, int)
        if self.limits.slack < PAGE:
            raise PeerError(f"transcript header: slack is {self.limits.slack}, less than a page")
        try:
            check_thread(self.thread_id)
            check_process(self.process_id)
        except BadRequest as error:
            raise PeerError(f"transcript header: {error}") from None


# The types of the static part, in its order.
_FACTS = (str, str, str, str, tuple, bytes, bool, int, int, int, str, Limits, tuple)


def _demand(name: str, value: Any, wanted: type) -> None:
    # Not isinstance: a bool is no number.
    if type(value) is not wanted or (isinstance(value, int) and not 0 <= value < 1 << 62):
        raise PeerError(f"transcript header: field {name!r} is {shown(value)}, not a sound {wanted.__name__}")


class Lease(NamedTuple):
    """Who pumps: a process, named by pid and start time, and the epoch of its thread (0: the broker)."""

    pid: int
    start_time: int
    epoch: int

    @classmethod
    def mine(cls, epoch: int) -> Lease:
        """Return the lease of the calling process."""
        pid = os.getpid()
        return cls(pid, kernel.start_time(pid) or 0, epoch)

    def holder_is_dead(self) -> bool:
        """Tell whether the kernel proves that the holder is gone; stopped or silent is not gone."""
        return kernel.is_dead(self.pid, self.start_time)


class Gap(NamedTuple):
    """Bytes `start` to `end` (exclusive) of the stream that were printed and are not kept."""

    start: int
    end: int


class Found(NamedTuple):
    """Bytes `start` to `end` of the stream that an output rule of the process matched.

    In its slot: 4 bytes its rule's number plus one (0: free), 4 bytes of length, 8 bytes `start`.  The rules that a
    process was started with are numbered from 0, whatever they are about; who adds others numbers them.
    """

    number: int
    start: int
    end: int


class Live(NamedTuple):
    """The live part of a header at one moment."""

    pid: int
    started: bool
    lease: Lease | None
    told: bool
    delivered: int
    holes: tuple[Gap, ...]
    by: By | None
    outcome: Outcome | None
    ended_at_ns: int


class Transcript:
    """One transcript, by its descriptor, which it borrows: the `Handles` of the process own it."""

    __slots__ = ("_trimmed_at", "base", "facts", "fd")

    def __init__(self, fd: int) -> None:
        """Read the header behind `fd`; raises `PeerError` when it is none of ours."""
        if not kernel.is_sealed_memfd(fd):
            raise PeerError("transcript: the descriptor is not a memfd sealed against shrinking")
        prefix = os.pread(fd, _PREFIX.size + 4, 0)
        if len(prefix) < _PREFIX.size:
            raise PeerError("transcript header: too short")
        magic, version, _, base, static_length, _ = _PREFIX.unpack_from(prefix)
        if magic != MAGIC:
            raise PeerError(f"transcript header: magic is {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise PeerError(f"transcript header: version {version}; this code knows {VERSION}")
        if static_length > _STATIC_MAX or base != _base_for(static_length):
            raise PeerError(f"transcript header: base {base} does not fit a static part of {static_length}")
        self.fd = fd
        self.base: int = base
        self.facts = Facts.from_bytes(os.pread(fd, static_length, _STATIC_AT))
        self._trimmed_at = 0

    @classmethod
    def known(cls, fd: int, facts: Facts) -> Transcript:
        """Return the transcript behind `fd`, which we have created with these facts: nothing is read or checked."""
        transcript = cls.__new__(cls)
        transcript.fd = fd
        transcript.facts = facts
        transcript.base = _base_for(len(facts.to_bytes()))
        transcript._trimmed_at = 0
        return transcript

    @staticmethod
    def create(facts: Facts, lease: Lease, *, conduit: int = 0) -> int:
        """Return the descriptor of a new, empty transcript in state `starting`, leased to `lease`.

        `conduit`: the inode number of that pipe, by which whoever finds it tells that it is its.
        """
        static = facts.to_bytes()
        if len(static) > _STATIC_MAX:
            raise ValueError(f"command line and directory take {len(static)} bytes; at most {_STATIC_MAX}")
        base = _base_for(len(static))
        fd = kernel.memfd(f"outlive-{facts.process_id}")
        try:
            os.ftruncate(fd, base)
            os.pwrite(fd, static, _STATIC_AT)
            os.pwrite(fd, _LEASE.pack(lease.start_time, lease.pid, lease.epoch, 1), _LEASE_AT)
            os.pwrite(fd, _PREFIX.pack(MAGIC, VERSION, 0, base, len(static), conduit), 0)
            # The one seek in a transcript's life, before anybody else has a copy.
            os.lseek(fd, base, os.SEEK_SET)
            kernel.seal(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    # What was written.

    @property
    def written(self) -> int:
        """Bytes that the process has printed so far."""
        return max(0, os.fstat(self.fd).st_size - self.base)

    def read(self, start: int, end: int) -> Iterator[tuple[int, bytes] | Gap]:
        """Yield what is kept of `[start, end)` in order: (offset, bytes) pieces, and a `Gap` for each hole.

        `end` is cut to what was written.  Never yields a byte of a hole: the holes are read after the bytes.
        """
        end = min(end, self.written)
        if start >= end:
            return
        # A hole known beforehand need not be read, which keeps the cost of a long stream that of what is kept.
        pieces = [
            (at, os.pread(self.fd, until - at, self.base + at))
            for at, until in _without(start, end, self.live().holes)
        ]
        yield from _with_gaps(start, end, pieces, self.live().holes)

    # The live part.

    def live(self) -> Live:
        """Return the live part as it stands; values out of range are refused with `PeerError`."""
        raw = os.pread(self.fd, _LIVE_SIZE, _PID_AT)
        # A read may fall into the middle of a write, and half of two holes is none: believe what reads alike twice.
        while (again := os.pread(self.fd, _LIVE_SIZE, _PID_AT)) != raw:
            raw = again
        (
            pid,
            started,
            lease_start,
            lease_pid,
            lease_epoch,
            lease_valid,
            told,
            delivered,
            a_from,
            a_to,
            b_from,
            b_to,
            by,
            kind,
            value,
            ended_at,
            ended,
            reason,
        ) = _LIVE.unpack(raw)
        if by > _BYS or (ended and kind >= _KINDS) or a_to < a_from or b_to < b_from:
            raise PeerError("transcript header: its live part is damaged")
        ended_by = BYS[by - 1] if by else None
        outcome = None
        if ended:
            # A wait status knows no other values, so nobody but a damaged or lying holder wrote them.
            if KINDS[kind] != "lost" and not 0 <= value <= 255:
                raise PeerError(f"transcript header: {KINDS[kind]} with {value}")
            outcome = _outcome(kind, value, reason, ended_by)
        return Live(
            pid,
            bool(started),
            Lease(lease_pid, lease_start, lease_epoch) if lease_valid else None,
            bool(told),
            delivered,
            # Most of what runs prints little and has none.
            _gaps((a_from, a_to), (b_from, b_to)) if a_to or b_to else (),
            ended_by,
            outcome,
            ended_at,
        )

    def conduit(self) -> int:
        """Return the inode number of the conduit; 0 when there is none."""
        (inode,) = _U64.unpack(os.pread(self.fd, 8, _CONDUIT_AT))
        return int(inode)

    def marked_at(self) -> int:
        """Return by when the process had started, in nanoseconds since boot; 0 while it has not."""
        (moment,) = _U64.unpack(os.pread(self.fd, 8, _MARKED_AT))
        return int(moment)

    def claim_lease(self, lease: Lease) -> None:
        """Become the pumper if the lease is free, ours, or of a holder proved dead; else raise `HandoffError`."""
        span = _LEASE.size, _LEASE_AT
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, *span)
        except BlockingIOError:
            raise HandoffError(f"process {self.facts.process_id}: somebody is taking the lease") from None
        try:
            holder = self.live().lease
            if holder is not None and holder != lease and not holder.holder_is_dead():
                raise HandoffError(f"process {self.facts.process_id}: {holder} still holds the lease")
            self.take_lease(lease)
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, *span)

    def take_lease(self, lease: Lease) -> None:
        """Become the pumper.  Only after the former holder said that it stopped, or is proved dead."""
        os.pwrite(self.fd, _LEASE.pack(lease.start_time, lease.pid, lease.epoch, 1), _LEASE_AT)

    def release_lease(self) -> None:
        """Say that we have stopped pumping."""
        os.pwrite(self.fd, _U32.pack(0), _LEASE_AT + 16)

    def deliver(self, offset: int) -> None:
        """Record that the agent has had everything before `offset`."""
        os.pwrite(self.fd, _U64.pack(offset), _DELIVERED_AT)

    def record_told(self) -> None:
        """Record that an answer, which may or may not arrive, tells of the end."""
        os.pwrite(self.fd, _U32.pack(1), _TOLD_AT)

    def ask(self, name: bytes, since: int) -> None:
        """Remember the last poll of a process without an inlet: its name, and what had been delivered before."""
        os.pwrite(self.fd, _ASKED.pack(name, since), _ASKED_AT)

    def asked(self) -> tuple[bytes, int]:
        """Return name and `since` of the last poll; zeros when there was none."""
        name, since = _ASKED.unpack(os.pread(self.fd, _ASKED.size, _ASKED_AT))
        return name, since

    def record_by(self, by: By) -> None:
        """Record who is about to end the process; the first to say so counts."""
        if self.live().by is None:
            os.pwrite(self.fd, _U32.pack(BYS.index(by) + 1), _BY_AT)

    def record_outcome(self, outcome: Outcome) -> None:
        """Record how the process ended; once known it is not overwritten."""
        if self.live().outcome is not None:
            return
        value = outcome.code if outcome.kind == "exited" else outcome.signal
        reason = (outcome.reason or "").encode("utf-8", "replace")[:127].decode("utf-8", "ignore").encode()
        if outcome.by:
            self.record_by(outcome.by)
        os.pwrite(self.fd, reason.ljust(128, b"\0"), _REASON_AT)
        fields = KINDS.index(outcome.kind), value or 0, time.time_ns()
        os.pwrite(self.fd, _OUTCOME.pack(*fields, 0), _OUTCOME_AT)
        os.pwrite(self.fd, _OUTCOME.pack(*fields, 1), _OUTCOME_AT)

    # What its output rules are about.

    @property
    def scanned(self) -> int:
        """Bytes of the stream in which its output rules have been looked for."""
        (offset,) = _U64.unpack(os.pread(self.fd, 8, _SCANNED_AT))
        return int(offset)

    def count_scanned(self, offset: int) -> None:
        """Record that everything before `offset` has been looked at, and what was found there recorded."""
        os.pwrite(self.fd, _U64.pack(offset), _SCANNED_AT)

    @property
    def output_at(self) -> int:
        """When it printed last, in nanoseconds since boot; 0 when that was not recorded."""
        (moment,) = _U64.unpack(os.pread(self.fd, 8, _OUTPUT_AT))
        return int(moment)

    def record_output(self) -> None:
        """Record that it has printed something now."""
        os.pwrite(self.fd, _U64.pack(time.clock_gettime_ns(time.CLOCK_BOOTTIME)), _OUTPUT_AT)

    def matches(self) -> list[Found]:
        """Return what was found; raises `PeerError` for what cannot be."""
        raw = os.pread(self.fd, _MATCH.size * MATCHES, _MATCHES_AT)
        found = [Found(number - 1, at, at + length) for number, length, at in _MATCH.iter_unpack(raw) if number]
        if any(match.end > self.written for match in found):
            raise PeerError("transcript header: a match beyond what was written")
        return found

    def record_match(self, slot: int, match: Found) -> None:
        """Record, before it is told to anybody, what was found."""
        fields = match.end - match.start, match.start
        os.pwrite(self.fd, _MATCH.pack(0, *fields), _MATCHES_AT + slot * _MATCH.size)
        os.pwrite(self.fd, _U32.pack(match.number + 1), _MATCHES_AT + slot * _MATCH.size)

    # What is kept.

    def trim(self, written: int, *, exact: bool = False) -> None:
        """Punch out what need not be kept of `written` bytes, in steps of the slack; `exact`: to the byte.

        Records the holes first.  Two of them at most: what lies between head and what was delivered, and
        what lies between the unread window and the tail.
        """
        limits = self.facts.limits
        if not exact and written - self._trimmed_at < limits.slack:
            return
        self._trimmed_at = written
        if written <= limits.head + limits.tail:
            return
        live = self.live()
        for start, end in self._widen(live.holes, wanted_holes(limits, written, live.delivered)):
            first, last = _whole_pages(self.base + start, self.base + end)
            if last > first:
                kernel.punch_hole(self.fd, first, last - first)

    def _widen(self, old: tuple[Gap, ...], wanted: list[Gap]) -> list[tuple[int, int]]:
        """Record the union of old and wanted holes; return the parts that are new."""
        union = _merge([*old, *wanted])
        if len(union) > 2:  # cannot be for holes that this code made; keep rather than lose
            return []
        if tuple(union) == old:
            return []
        flat = [bound for gap in union for bound in (gap.start, gap.end)] + [0] * 4
        os.pwrite(self.fd, _HOLES.pack(*flat[:4]), _HOLES_AT)
        # A page more on either side, inside the hole: the page that an older hole ended in can go only now.
        return [
            (max(gap.start, start - PAGE), min(gap.end, end + PAGE))
            for gap in union
            for start, end in _without(gap.start, gap.end, old)
        ]


def mark_started(fd: int, pid: int) -> None:
    """Record, in the child and before it executes its program, that it runs as `pid`."""
    os.pwrite(fd, _U64.pack(time.clock_gettime_ns(time.CLOCK_BOOTTIME)), _MARKED_AT)
    # One aligned word, which nobody sees by halves.
    os.pwrite(fd, _STARTED.pack(pid, 1), _PID_AT)


def _gaps(*bounds: tuple[int, int]) -> tuple[Gap, ...]:
    return tuple(Gap(start, end) for start, end in bounds if end > start)


def _base_for(static_length: int) -> int:
    return -(-(_STATIC_AT + static_length) // PAGE) * PAGE


def wanted_holes(limits: Limits, written: int, delivered: int) -> list[Gap]:
    """Return what of `written` bytes need not be kept when `delivered` of them have been read."""
    tail_from = written - limits.tail
    holes = [
        Gap(limits.head, min(delivered, tail_from)),
        Gap(max(limits.head, delivered + limits.unread), tail_from),
    ]
    return [gap for gap in holes if gap.end > gap.start]


def _merge(gaps: list[Gap]) -> list[Gap]:
    merged: list[Gap] = []
    for gap in sorted(gaps, key=lambda gap: gap.start):
        if merged and gap.start <= merged[-1].end:
            merged[-1] = Gap(merged[-1].start, max(merged[-1].end, gap.end))
        else:
            merged.append(gap)
    return merged


def _without(start: int, end: int, holes: tuple[Gap, ...]) -> Iterator[tuple[int, int]]:
    """Yield what is left of `[start, end)` outside `holes`, which are sorted and apart."""
    at = start
    for hole in holes:
        if hole.end <= at or hole.start >= end:
            continue
        if hole.start > at:
            yield at, hole.start
        at = hole.end
    if at < end:
        yield at, end


def _with_gaps(
    start: int, end: int, pieces: list[tuple[int, bytes]], holes: tuple[Gap, ...]
) -> Iterator[tuple[int, bytes] | Gap]:
    at = start
    for offset, data in pieces:
        for kept_from, kept_to in _without(offset, offset + len(data), holes):
            if kept_from > at:
                yield Gap(at, kept_from)
            yield kept_from, data[kept_from - offset : kept_to - offset]
            at = kept_to
    if at < end:
        yield Gap(at, end)


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    return -(-start // PAGE) * PAGE, end // PAGE * PAGE


def _outcome(kind: int, value: int, reason: bytes, by: By | None) -> Outcome:
    if KINDS[kind] == "exited":
        return Outcome("exited", code=value, by=by)
    if KINDS[kind] == "signaled":
        return Outcome("signaled", signal=value, by=by)
    return Outcome.lost(reason.rstrip(b"\0").decode("utf-8", "replace"), by)
