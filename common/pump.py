"""The pump: output from a terminal to a transcript, input from an inlet to the terminal, holding no byte.

    output   splice(terminal → conduit), splice(conduit → transcript)      a pipe needs no conduit
    input    sendfile(inlet → terminal), which moves the inlet's position with the bytes

At every instant the bytes are in the kernel, in objects that the broker holds copies of; whoever pumps next
first empties the conduit, then touches the terminal, and types on at the inlet's position.  So a pump may be killed
anywhere and nothing is lost or repeated.  Where a kernel does not splice terminals, `CopyingPump` reads and writes
instead: a kill between the two loses output that was in its hands, and types up to 4 KiB of input twice: `status`
and `doctor` say so.

Always true
    One pump at a time per process: nothing here locks a file position.  The lease is the caller's duty.
    An error of the transcript (no space, a limit) leaves the bytes where they are: `FULL`, try again.
    No terminal is waited for here; `Pumps` tells when to try again, from one edge-triggered epoll for all.
        Level-triggered, a hung-up terminal would wake us for ever.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from .descriptors import Handles
from .inlet import BASE, Inlet
from .transcript import Transcript

if TYPE_CHECKING:
    import asyncio

# Bytes a splice may move.  A terminal yields 4 KiB at a time, and a splice from one allocates all the pages
# asked for before it knows.
TERMINAL_CHUNK = 4 << 10
PIPE_CHUNK = 64 << 10
# Splices into the conduit before it is emptied: one system call for four chunks rather than for each.
CONDUIT_CHUNKS = 4
# Bytes one pump may move before the others get their turn, and the clock is looked at: half a millisecond's work.
TURN = 64 << 10
# Seconds that pumping may go on before everything else that the process does gets its turn.  A control call
# under flood waits for a few of these: the request is read in one trip through the loop and served in the next.
SLICE = 0.001
# Seconds to wait for more from terminals that flood, before going back to the loop: a trip through asyncio costs
# more than the 4 KiB that a terminal yields at a time.  Nothing shorter: epoll counts in milliseconds.
LINGER = 0.001
# Bytes in one round of turns that count as a flood.  Whoever waits for an echo, a prompt or an end must not wait
# for `LINGER` too.
FLOOD = 2 << 10
# Seconds until a transcript that refused bytes is tried again.
FULL_RETRY = 0.25


class Step(Enum):
    """What a pump says after it has moved what it could."""

    DRY = auto()  # nothing more for now
    MORE = auto()  # its turn was over first
    CLOSED = auto()  # end of file: nobody has the terminal open
    FULL = auto()  # where it is to go takes no more; the bytes wait


class Pump:
    """The splicing pump of one process.  Borrows the descriptors of `handles`."""

    mode = "spliced"

    def __init__(self, handles: Handles, transcript: Transcript) -> None:
        self.handles = handles
        self.transcript = transcript
        self.inlet = Inlet(handles.inlet, transcript.facts.mark) if handles.inlet >= 0 else None
        self.written = transcript.written
        self.refusal: OSError | None = None

    def drain(self, turn: int = TURN) -> Step:
        """Move output until there is no more, or about `turn` bytes were moved."""
        return self._drain_terminal(turn) if self.handles.conduit_read >= 0 else self._drain_pipe(turn)

    def _drain_terminal(self, turn: int) -> Step:
        splice, handles, transcript = os.splice, self.handles, self.transcript.fd
        terminal, conduit_write, conduit_read = handles.terminal, handles.conduit_write, handles.conduit_read
        until = self.written + turn
        waiting = PIPE_CHUNK  # of the former pumper, perhaps
        while True:
            try:
                while waiting > 0:
                    moved = splice(conduit_read, transcript, waiting)
                    self.written += moved
                    waiting -= moved
            except BlockingIOError:
                pass
            except OSError as error:
                return self._full(error)
            if self.written >= until:
                return Step.MORE
            waiting = 0
            try:
                for _ in range(CONDUIT_CHUNKS):
                    moved = splice(terminal, conduit_write, TERMINAL_CHUNK)
                    waiting += moved
                    if not moved:
                        break
            except BlockingIOError:
                # With something in it, it may be the conduit that is full: look again when it is empty.
                if not waiting:
                    return Step.DRY
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                if not waiting:
                    return Step.CLOSED
                continue
            if not waiting:
                return Step.CLOSED

    def _drain_pipe(self, turn: int) -> Step:
        splice, terminal, transcript = os.splice, self.handles.terminal, self.transcript.fd
        until = self.written + turn
        while self.written < until:
            try:
                moved = splice(terminal, transcript, PIPE_CHUNK)
            except BlockingIOError:
                return Step.DRY
            except OSError as error:
                return self._full(error)
            if not moved:
                return Step.CLOSED
            self.written += moved
        return Step.MORE

    def type(self, turn: int = TURN) -> Step:
        """Type what is left in the inlet, until the terminal takes no more, or about `turn` bytes were typed."""
        inlet = self.inlet
        if inlet is None or not (left := inlet.left):
            return Step.DRY
        until = left - turn
        try:
            while left > max(0, until):
                left -= self._type(inlet, min(left, PIPE_CHUNK))
        except OSError as error:
            # EIO: nobody has the terminal open; it may be opened again.
            if error.errno not in (errno.EAGAIN, errno.EIO):
                raise
            return Step.FULL
        finally:
            inlet.trim()
        return Step.MORE if left else Step.DRY

    def _type(self, inlet: Inlet, size: int) -> int:
        return os.sendfile(self.handles.terminal, inlet.fd, None, size)

    def _full(self, error: OSError) -> Step:
        self.refusal = error
        return Step.FULL


class CopyingPump(Pump):
    """The fallback: what it has read and not yet written dies with it."""

    mode = "copied"

    def __init__(self, handles: Handles, transcript: Transcript) -> None:
        super().__init__(handles, transcript)
        self._in_hand = memoryview(b"")

    def drain(self, turn: int = TURN) -> Step:
        """Move output until there is no more, or about `turn` bytes were moved."""
        until = self.written + turn
        while True:
            try:
                while self._in_hand:
                    moved = os.write(self.transcript.fd, self._in_hand)
                    self.written += moved
                    self._in_hand = self._in_hand[moved:]
            except OSError as error:
                return self._full(error)
            if self.written >= until:
                return Step.MORE
            try:
                data = os.read(self.handles.terminal, PIPE_CHUNK)
            except BlockingIOError:
                return Step.DRY
            except OSError as error:
                if error.errno == errno.EIO:
                    return Step.CLOSED
                raise
            if not data:
                return Step.CLOSED
            self._in_hand = memoryview(data)

    def _type(self, inlet: Inlet, size: int) -> int:
        data = os.pread(inlet.fd, min(size, TERMINAL_CHUNK), BASE + inlet.position)
        typed = os.write(self.handles.terminal, data)
        os.lseek(inlet.fd, typed, os.SEEK_CUR)
        return typed


PUMPS: dict[str, type[Pump]] = {Pump.mode: Pump, CopyingPump.mode: CopyingPump}


class Owner(Protocol):
    """Whoever holds a process while it is pumped; called from the loop."""

    pump: Pump

    def output_moved(self) -> None:
        """The transcript has grown, and is about to be trimmed."""

    def input_moved(self) -> None:
        """The terminal was offered what is left in the inlet."""

    def terminal_closed(self) -> None:
        """End of file on the terminal, for now: a child that lives may open it again."""

    def terminal_dry(self) -> None:
        """Everything printed so far is in the transcript."""

    def process_exited(self) -> None:
        """The pidfd says that the process has ended."""


_READ = select.EPOLLIN | select.EPOLLET
_WRITE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET


class Pumps:
    """All pumps of this process, driven by one edge-triggered epoll that the loop watches.

    An idle set costs no wake-up at all.  Not thread-safe: the loop's thread only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._busy: dict[Owner, None] = {}
        self._typing: set[Owner] = set()
        self._full: set[Owner] = set()
        self._scheduled = False
        loop.add_reader(self._epoll.fileno(), self._readable)

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, owner: Owner) -> None:
        """Start to pump for `owner`, which holds the lease."""
        handles = owner.pump.handles
        if handles.terminal >= 0:
            self._watch(handles.terminal, lambda: self._terminal_ready(owner))
        if handles.pidfd >= 0:
            self._watch(handles.pidfd, owner.process_exited)
        if owner.pump.inlet and owner.pump.inlet.left:  # by a former holder
            self.type(owner)

    def remove(self, owner: Owner) -> None:
        """Stop pumping for `owner`; must come before its descriptors are closed.

        A closed number whose file lives on in another process would stay registered, for somebody else.
        """
        handles = owner.pump.handles
        for fd in (handles.terminal, handles.pidfd):
            self._unwatch(fd)
        self._forget(owner)

    def kick(self, owner: Owner) -> None:
        """Try `owner`'s terminal again soon, whatever epoll says."""
        self._busy[owner] = None
        self._schedule()

    def type(self, owner: Owner) -> None:
        """Type what is in `owner`'s inlet: what the terminal takes now, and the rest as it takes it."""
        terminal = owner.pump.handles.terminal
        if terminal not in self._watched:
            return
        step = owner.pump.type()
        # Room is worth a wake-up only while something waits for it.  To ask again is to be told also of room that
        # there is by now.
        if step is Step.DRY:
            if owner in self._typing:
                self._typing.discard(owner)
                self._epoll.modify(terminal, _READ)
        elif step is Step.MORE or owner not in self._typing:
            self._typing.add(owner)
            self._epoll.modify(terminal, _WRITE)
        owner.input_moved()

    def unwatch_terminal(self, owner: Owner) -> None:
        """Forget a terminal that will never yield anything again."""
        self._unwatch(owner.pump.handles.terminal)
        self._forget(owner)

    def close(self) -> None:
        """Stop all pumping."""
        self._loop.remove_reader(self._epoll.fileno())
        self._watched.clear()
        self._busy.clear()
        self._typing.clear()
        self._full.clear()
        self._epoll.close()

    def _watch(self, fd: int, ready: Callable[[], None]) -> None:
        self._epoll.register(fd, _READ)
        self._watched[fd] = ready

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        self._ready()

    def _readable(self) -> None:
        # A turn that is scheduled looks at the epoll too.  Another one here would schedule another one there: each
        # trip through the loop would have one more than the last, and no room left for anything but pumping.
        if not self._scheduled:
            self._ready()

    def _ready(self) -> None:
        if self._epoll.closed:
            return
        watched, poll, clock = self._watched, self._epoll.poll, time.monotonic
        until = clock() + SLICE
        events = poll(0, 256)
        while True:
            for fd, _ in events:
                if ready := watched.get(fd):  # an earlier one may have removed it
                    ready()
            moved = self._turns(until)
            if clock() >= until:
                break
            events = poll(LINGER if moved >= FLOOD and not self._busy else 0, 256)
            if not events and not self._busy:
                break
        if self._busy:
            self._schedule()

    def _turns(self, until: float) -> int:
        """Give each busy pump one turn, but stop at `until` (monotonic); return how many bytes were moved."""
        moved = 0
        for owner in list(self._busy):
            if owner not in self._busy:  # an earlier one has removed it
                continue
            pump = owner.pump
            before = pump.written
            try:
                step = pump.drain()
            except OSError as error:
                # Nothing that we know of; the bytes are where they were, and trying for ever at once would spin.
                pump.refusal, step = error, Step.FULL
            self._busy.pop(owner, None)
            if step is Step.MORE:
                self._busy[owner] = None  # behind those that had no turn yet
            if pump.written != before:
                moved += pump.written - before
                if step is not Step.FULL:
                    pump.refusal = None
                owner.output_moved()
                pump.transcript.trim(pump.written)
            if step is Step.FULL:
                if owner not in self._full:
                    self._full.add(owner)
                    self._loop.call_later(FULL_RETRY, self._retry, owner)
            elif step is Step.CLOSED:
                owner.terminal_closed()
            elif step is Step.DRY:
                owner.terminal_dry()
            if time.monotonic() >= until:
                break
        return moved

    def _retry(self, owner: Owner) -> None:
        if owner in self._full:  # else it was removed; whoever holds the process now has retries of its own
            self._full.discard(owner)
            self.kick(owner)

    def _terminal_ready(self, owner: Owner) -> None:
        self._busy[owner] = None
        if owner in self._typing:
            self.type(owner)

    def _forget(self, owner: Owner) -> None:
        self._busy.pop(owner, None)
        self._typing.discard(owner)
        self._full.discard(owner)
