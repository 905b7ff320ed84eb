"""An inlet: a memfd that holds what is still to be typed into one process, and which calls asked for it.

`sendfile` moves bytes from here to the terminal, and the file position with them, in one system call.  So the
position, which all copies of the descriptor share, says at every instant what the terminal has taken: whoever holds
the process next goes on there.  How the calls before it were answered is known from the calls' records.

    offset     size  field      written by
         0        8  magic      creator       b"OUTINLET"
         8        2  version    creator       1
        16       32  mark       creator       the first bytes of its process's mark, zero-padded
        64  100 × 40  calls     lease holder  a ring: call number n is in slot n mod 100; number 0: none yet
      4096        …  input      lease holder  byte n of all that was ever accepted is at 4096 + n

    of a call:   0  8  number   from 1 on; the highest is the last
                 8  8  end      of what was accepted by then, from this call or those before it
                16  8  since    up to where the agent had had the output when the call began
                24  4  size     bytes accepted from this call: those before `end`
                28  4  passed   bytes of it that became a signal, past what the program does not read
                32  8  name     of its write id: `name_of`

All numbers are little-endian.  What is accepted and not typed yet lies between position and the last call's end.

Why no kill between two steps types a byte twice, or drops one
    Accepting: the bytes are written behind the end, where nobody reads; then one write of the record, within one
    page, moves the end.  Killed before that, nothing was accepted, and who repeats the call has it done.  Killed
    after it, the next holder types, and who repeats the call finds its record and only waits.
    Typing: bytes and position move together.  (Copied rather than sent, on an older kernel, they do not: a kill in
    between types up to 4 KiB twice.  `status` and `doctor` say so.)
    Taking back: one record of the same name, whose end is the position.  Killed before it, the rest is typed after
    all, and the call's record says so.
    A signal (Ctrl-C past unread input) is sent first and recorded then: a kill in between sends it twice, which a
    person does too; never is it lost.

Always true
    A call is accepted only when all before it was typed or taken back: what is pending is of one call, the last
    that was accepted, and at most as long as one frame.
    Only the holder of the lease writes here, and moves the position; nothing else may lseek, read or write.
    Values are checked, never trusted: any holder could have written them.
    A write id is known for 100 calls, polls among them; after that it is as good as new.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from . import kernel
from .errors import PeerError
from .transcript import PAGE

MAGIC = b"OUTINLET"
VERSION = 1
BASE = PAGE
SLOTS = 100
# Bytes of typed input that are given back at once.
_SLACK = 64 << 10
_RING_AT = 64
# No number or offset comes near it.
_SOUND = 1 << 62

_PREFIX = struct.Struct("<8sH6x32s")
_CALL = struct.Struct("<QQQII8s")


def name_of(write_id: str) -> bytes:
    """Return by what a call is known: 8 bytes of a hash.  Random for a call that cannot come again."""
    if not write_id:
        return os.urandom(8)
    # Not for the spawner, whose forks cost what it has loaded.
    from hashlib import blake2b

    return blake2b(write_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()


class Call(NamedTuple):
    """One record of the ring."""

    number: int
    end: int
    since: int
    size: int
    passed: int
    name: bytes

    def typed(self, position: int) -> int:
        """Return how many bytes of the call the terminal has taken when the inlet is at `position`."""
        return self.size - self.left(position) + self.passed

    def left(self, position: int) -> int:
        """Return how many are still to be typed."""
        return min(self.size, max(0, self.end - position))


class Inlet:
    """One inlet, by its descriptor, which it borrows: the `Handles` of the process own it."""

    __slots__ = ("_calls", "_punched", "fd")

    def __init__(self, fd: int, mark: str) -> None:
        """Read the header behind `fd`; raises `PeerError` when it is none of ours, or another process's."""
        if not kernel.is_sealed_memfd(fd):
            raise PeerError("inlet: the descriptor is not a memfd sealed against shrinking")
        raw = os.pread(fd, _PREFIX.size, 0)
        if len(raw) < _PREFIX.size:
            raise PeerError("inlet header: too short")
        magic, version, whose = _PREFIX.unpack(raw)
        if magic != MAGIC:
            raise PeerError(f"inlet header: magic is {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise PeerError(f"inlet header: version {version}; this code knows {VERSION}")
        if whose != _mark_field(mark):
            raise PeerError("inlet header: it is of another process")
        self.fd = fd
        self._calls: dict[int, Call] = {}
        self._punched = BASE

    @staticmethod
    def create(mark: str) -> int:
        """Return the descriptor of a new, empty inlet for the process with this mark."""
        fd = kernel.memfd("outlive-inlet")
        try:
            os.ftruncate(fd, BASE)
            os.pwrite(fd, _PREFIX.pack(MAGIC, VERSION, _mark_field(mark)), 0)
            # The one seek to an absolute place, before anybody else has a copy.
            os.lseek(fd, BASE, os.SEEK_SET)
            kernel.seal(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def load(self) -> None:
        """Read the calls, as they are when the lease is taken; raises `PeerError` for what cannot be."""
        raw = os.pread(self.fd, SLOTS * _CALL.size, _RING_AT)
        self._calls = {}
        if raw.count(0) == len(raw):  # new: most processes are never typed into
            calls: list[Call] = []
        else:
            calls = sorted((Call(*fields) for fields in _CALL.iter_unpack(raw)), key=lambda call: call.number)
        last = calls[-1].number if calls else 0
        for slot in (call for call in calls if call.number):
            if slot.number <= last - SLOTS or slot.size > slot.end or max(last, slot.since) > _SOUND:
                raise PeerError(f"inlet: call {slot.number} of {last} is damaged")
            self._calls[slot.number] = slot
        if not 0 <= self.position <= self.end <= os.fstat(self.fd).st_size - BASE:
            raise PeerError(f"inlet: position {self.position} and end {self.end} cannot be")

    # What is to be typed.

    @property
    def position(self) -> int:
        """How many bytes the terminal has taken, of all that was ever accepted."""
        return os.lseek(self.fd, 0, os.SEEK_CUR) - BASE

    @property
    def end(self) -> int:
        """How many bytes were accepted, without those that were taken back."""
        return self._calls[next(reversed(self._calls))].end if self._calls else 0

    @property
    def left(self) -> int:
        """How many of them are still to be typed."""
        return self.end - self.position

    def trim(self) -> None:
        """Give back the memory of what was typed: in steps, and all of it when nothing is left."""
        at = BASE + self.position
        whole = at // PAGE * PAGE
        if whole - self._punched >= (_SLACK if at < BASE + self.end else PAGE):
            kernel.punch_hole(self.fd, self._punched, whole - self._punched)
            self._punched = whole

    # The calls.

    def find(self, name: bytes) -> Call | None:
        """Return the newest record of a call; `None` if it is not known, or not any more."""
        return next((call for call in reversed(self._calls.values()) if call.name == name), None)

    def last(self, count: int) -> list[Call]:
        """Return the newest records of the last calls, at most `count`, oldest first."""
        return list({call.name: call for call in self._calls.values()}.values())[-count:]

    def accept(self, name: bytes, chars: bytes, since: int) -> Call:
        """Take `chars` to be typed; raises `OSError`, having taken nothing, when there is no room for them."""
        end = self.end
        view, at = memoryview(chars), BASE + end
        while view:
            written = os.pwrite(self.fd, view, at)
            view, at = view[written:], at + written
        return self._commit(end + len(chars), since, len(chars), 0, name)

    def note(self, name: bytes, since: int, *, passed: int = 0) -> Call:
        """Remember a call of which nothing is typed: a poll, a signal (`passed`), or one whose turn never came."""
        return self._commit(self.end, since, 0, passed, name)

    def take_back(self, name: bytes) -> None:
        """Take back what is left of a call, if anything is; nobody may be typing at this moment."""
        call, position = self.find(name), self.position
        # What is pending is of the last call that was accepted; of another one nothing can be left.
        if call is None or not (left := call.left(position)) or call.end != self.end:
            return
        self._commit(position, call.since, call.size - left, 0, name)
        first, size = -(-(BASE + position) // PAGE) * PAGE, os.fstat(self.fd).st_size
        if size > first:
            kernel.punch_hole(self.fd, first, size - first)

    def _commit(self, end: int, since: int, size: int, passed: int, name: bytes) -> Call:
        number = next(reversed(self._calls), 0) + 1
        call = Call(number, end, since, size, passed, name)
        raw = _CALL.pack(number, end, since, size, passed, name)
        os.pwrite(self.fd, raw, _RING_AT + number % SLOTS * _CALL.size)
        self._calls.pop(number - SLOTS, None)
        self._calls[number] = call
        return call


def is_inlet(fd: int) -> bool:
    """Tell whether a memfd says that it is an inlet, be it a sound one or not."""
    return os.pread(fd, len(MAGIC), 0) == MAGIC


def _mark_field(mark: str) -> bytes:
    return mark.encode("utf-8", "surrogateescape")[:32].ljust(32, b"\0")
