"""The typist of one held process: whose input is taken next, when its call is answered, what is taken back.

A call's input is accepted into the inlet when nothing else is left there, typed by the pump as the terminal takes
it, and taken back at the call's deadline as far as the terminal has not.  What survives a kill at any of these
moments, and why, is in `inlet`.

Always true
    Calls are accepted in the order in which they came, each at most once: its record is looked for when its turn
    has come, so that a repetition behind its own first try types nothing.
    A call whose turn does not come before its deadline has typed nothing, and says so again when it is repeated.
    After `close` nothing here touches the inlet: what is left there is the next holder's, who types on.
"""

from __future__ import annotations

import asyncio
import select
import termios
import time
from collections import deque
from collections.abc import Callable

from . import kernel
from .errors import LimitReached
from .inlet import Call
from .pump import Pump

# Bytes of one line that a terminal in canonical mode takes; the kernel cuts the rest without an error.
CANONICAL_MAX = 4095


class Typist:
    """The input of a process that we hold.  Borrows descriptors and inlet of its pump."""

    __slots__ = ("_closed_at", "_handles", "_inlet", "_loop", "_over", "_queue", "_type", "_waiters")

    def __init__(self, pump: Pump, type_now: Callable[[], None]) -> None:
        """`type_now`: has the pump type what it can, at once; it goes on by itself."""
        assert pump.inlet is not None
        self._inlet = pump.inlet
        self._handles = pump.handles
        self._type = type_now
        self._loop = asyncio.get_running_loop()
        self._queue: deque[object] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._over = False
        self._closed_at: int | None = None

    async def type(self, name: bytes, chars: bytes, deadline: float, since: int) -> int:
        """Have `chars` typed, once under this name; return how many bytes were, by `deadline` (monotonic).

        `since`: up to where the agent has had the output.  Raises `LimitReached` when there is no room for them.
        """
        call = self._inlet.find(name)
        if call is None and len(chars) == 1:
            call = self._interrupt(name, chars, since)
        if call is None:
            call = await self._accepted(name, chars, deadline, since)
        while self._closed_at is None:
            call = self._inlet.find(name) or call
            if not call.left(self._inlet.position):
                break
            if self._over or time.monotonic() >= deadline:
                self._inlet.take_back(name)
                self.wake()
                call = self._inlet.find(name) or call
                break
            await self._changed(deadline)
        return call.typed(self._inlet.position if self._closed_at is None else self._closed_at)

    async def _accepted(self, name: bytes, chars: bytes, deadline: float, since: int) -> Call:
        """Wait for the call's turn, and accept it."""
        inlet, place = self._inlet, object()
        self._queue.append(place)
        try:
            while self._closed_at is None:
                if call := inlet.find(name):
                    return call
                if self._queue[0] is place and not inlet.left:
                    call = inlet.accept(name, chars, since)
                    self._type()
                    return call
                if self._over or time.monotonic() >= deadline:
                    return inlet.note(name, since)
                await self._changed(deadline)
            return Call(0, 0, since, 0, 0, name)
        except OSError as error:
            raise LimitReached(
                f"{len(chars)} bytes of input cannot be kept until they are typed: {error.strerror}; nothing was "
                "typed; free memory, or raise the limit on file sizes, and repeat it"
            ) from None
        finally:
            self._queue.remove(place)
            self.wake()

    def _interrupt(self, name: bytes, chars: bytes, since: int) -> Call | None:
        """Deliver Ctrl-C and its like past input that the program does not read; `None`: there is none, type it."""
        terminal = self._handles.terminal
        try:
            if not self._inlet.left and _has_room(terminal):
                return None
            mode = termios.tcgetattr(terminal)
            signals = {mode[6][termios.VINTR]: 2, mode[6][termios.VQUIT]: 3, mode[6][termios.VSUSP]: 20}
            if not mode[3] & termios.ISIG or chars not in signals:
                return None
            kernel.signal_foreground(terminal, signals[chars])
        except (OSError, termios.error):
            return None
        return self._inlet.note(name, since, passed=1)

    def cuts(self, chars: bytes) -> bool:
        """Tell whether a line of `chars` is longer than the terminal's canonical mode takes."""
        if all(len(line) <= CANONICAL_MAX for line in chars.replace(b"\r", b"\n").split(b"\n")):
            return False
        try:
            return bool(termios.tcgetattr(self._handles.terminal)[3] & termios.ICANON)
        except (OSError, termios.error):
            return False

    # What its holder tells it.

    def moved(self) -> None:
        """The terminal has taken some."""
        if self._waiters and not self._inlet.left:
            self.wake()

    def stop(self) -> None:
        """Nobody will read any more, or everybody is to answer now: take back what is left."""
        self._over = True
        self.wake()

    def close(self) -> None:
        """Leave everything as it is to the next holder."""
        if self._closed_at is None:
            self._closed_at = self._inlet.position
            self.wake()

    def wake(self) -> None:
        """Let everybody who waits look again."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            _settle(waiter)

    async def _changed(self, deadline: float) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        timer = self._loop.call_at(deadline, _settle, waiter)  # the loop's clock is the monotonic one
        try:
            await waiter
        finally:
            timer.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _has_room(terminal: int) -> bool:
    """Tell whether a terminal takes input: as far as its master can tell, the program reads what it gets."""
    poll = select.poll()
    poll.register(terminal, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in poll.poll(0))
