"""One process in the hands of whoever pumps it: a worker while attached, the broker while detached.

Holding means: the lease is ours, the pump runs, the pidfd is watched, input goes through the inlet, and the
end is noticed once: when the outcome is known and the output drained, to end of file or for a short grace.
A handoff is `release` here and a new `Held` there; nothing of this object needs to travel.

Always true
    Pumping starts only if the transcript's lease is free: released, ours, or of a holder proved dead.
    `on_ended` is called once per `Held`, never before every byte that we wait for is in the transcript.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from . import ending
from .descriptors import Handles
from .errors import StdinClosed
from .inlet import name_of
from .messages import AddedRule, Output
from .outcome import Outcome
from .pump import Pump, Pumps
from .response import Response, chunk_id, clip, output, tokens, typed_less, whole_characters
from .scanner import Scanner
from .transcript import Facts, Gap, Lease, Transcript
from .typist import CANONICAL_MAX, Typist

# Seconds to wait for more output after the end while somebody else keeps the terminal open.  What the process
# itself printed is there at once; this is for what its children still print as they go down.
GRACE = 0.1
# Seconds to wait for the parent's record where the kernel cannot tell by itself (before Linux 6.15); the
# parent records within milliseconds of the end unless it is stopped.
RECORD_GRACE = 2.0
_RECORD_LOOK = 0.02
# Seconds after which an ended process is let go whose end was in an answer that perhaps nobody heard: a caller that
# lost its broker asks again as soon as there is the next one.
REPEATED_WITHIN = 10.0


class Held:
    """One held process.  Owns its handles from construction to `close`."""

    __slots__ = (
        "_closing",
        "_ended_told",
        "_grace",
        "_growth",
        "_hurry",
        "_loop",
        "_pumps",
        "_record_until",
        "_scanner",
        "_waiters",
        "drained",
        "exited",
        "handles",
        "last_used",
        "on_ended",
        "on_found",
        "on_output",
        "outcome",
        "pump",
        "terminal_open",
        "transcript",
        "typist",
    )

    def __init__(
        self,
        handles: Handles,
        pumps: Pumps,
        pump: type[Pump],
        *,
        facts: Facts | None = None,
        on_ended: Callable[[Held], None],
        on_output: Callable[[Held], None] | None = None,
        on_found: Callable[[Held], None] | None = None,
    ) -> None:
        """Take over `handles`; raises `PeerError` when the transcript is none of ours (handles stay yours).

        `facts`: of one that we have started ourselves; its header is not read again.
        `on_found`: something that a rule is about was found in the output, and is in the header.
        """
        fd = handles.transcript
        self.transcript = Transcript.known(fd, facts) if facts else Transcript(fd)
        self.handles = handles
        self.pump = pump(handles, self.transcript)
        self.typist = Typist(self.pump, lambda: pumps.type(self)) if self.pump.inlet else None
        self.outcome: Outcome | None = None
        self.exited = False
        self.drained = False
        self.terminal_open = handles.terminal >= 0
        self.last_used = time.monotonic()
        self.on_ended = on_ended
        self.on_output = on_output
        self.on_found = on_found
        self._pumps = pumps
        self._loop = asyncio.get_running_loop()
        self._waiters: list[asyncio.Future[None]] = []
        self._growth: list[asyncio.Future[None]] = []
        self._grace: asyncio.TimerHandle | None = None
        self._record_until = 0.0
        self._ended_told = False
        self._hurry = False
        self._closing = False
        # Most processes have no rule about their output, and need none.
        self._scanner = Scanner(self.transcript) if self.transcript.facts.wake_on else None

    @property
    def key(self) -> tuple[str, str]:
        """(thread id, process id)."""
        facts = self.transcript.facts
        return facts.thread_id, facts.process_id

    @property
    def process_id(self) -> str:
        """The process id."""
        return self.transcript.facts.process_id

    @property
    def ended(self) -> bool:
        """Whether it has ended, with all output that we wait for in the transcript."""
        return self.outcome is not None and self.drained

    # Holding and letting go.

    def begin(self, lease: Lease, added: Sequence[AddedRule] = ()) -> None:
        """Take the lease and pump; raises `HandoffError` while somebody else may be pumping.

        `added`: what to look for in the output beside what its header says.
        """
        self.transcript.claim_lease(lease)
        self.pump.written = self.transcript.written
        if added:
            self.look_for(added)
        else:
            self._scan()  # the former holder may have died before it did
        if self.pump.inlet:
            self.pump.inlet.load()
        self._pumps.add(self)
        self._pumps.kick(self)
        if self.handles.pidfd < 0:
            self.process_exited()
        elif self.handles.terminal < 0:
            self.drained = True

    def release(self) -> Handles:
        """Stop pumping, give up the lease, and return the handles, now the caller's."""
        self._stop()
        self.transcript.release_lease()
        handles, self.handles = self.handles, Handles()
        return handles

    def close(self) -> None:
        """Stop and close everything."""
        self._stop()
        self.handles.close()

    def _stop(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._pumps.remove(self)
        if self.typist:
            self.typist.close()
        if self._grace:
            self._grace.cancel()
        self.hurry()

    # What the pump tells us.

    def output_moved(self) -> None:
        """The transcript has grown."""
        if self._scanner:
            self._scanner.printed()
            self._scan()
        if self._growth:
            _wake(self._growth)
        if self.on_output:
            self.on_output(self)

    def input_moved(self) -> None:
        """The terminal was offered what is left in the inlet."""
        if self.typist:
            self.typist.moved()

    def terminal_closed(self) -> None:
        """End of file.  For good, unless a child that lives may open its terminal again."""
        final = self.exited or not self.transcript.facts.tty
        if final and self.terminal_open:
            self.terminal_open = False
            self._pumps.unwatch_terminal(self)
        if self.exited:
            self._drained()

    def terminal_dry(self) -> None:
        """Everything printed so far is here; after the end, what may still come gets a short grace."""
        if self.exited and not self.drained and self._grace is None:
            self._grace = self._loop.call_later(GRACE, self._drained)

    def process_exited(self) -> None:
        """The pidfd says so, or we have none and shall never know."""
        if self._closing:
            return
        first, self.exited = not self.exited, True
        if self.outcome is None:
            self._learn()
        if first:
            if self.typist:
                self.typist.stop()
            if self.terminal_open:
                self._pumps.kick(self)
            else:
                self._drained()

    def _learn(self) -> None:
        if self._closing:
            return
        pidfd = self.handles.pidfd
        outcome = ending.learn(pidfd, self.transcript) if pidfd >= 0 else self.transcript.live().outcome
        now = time.monotonic()
        if outcome is None:
            self._record_until = self._record_until or now + RECORD_GRACE
            if pidfd >= 0 and now < self._record_until:
                self._loop.call_later(_RECORD_LOOK, self._learn)
                return
            outcome = ending.lost(pidfd, self.transcript)
        self.outcome = outcome
        self._tell()

    def _drained(self) -> None:
        self.drained = True
        self._tell()

    def _tell(self) -> None:
        if self._ended_told or not self.ended or self._closing:
            return
        self._ended_told = True
        self._scan(final=True)
        self.transcript.trim(self.pump.written, exact=True)
        _wake(self._waiters)
        _wake(self._growth)
        self.on_ended(self)

    # Rules.

    def look_for(self, added: Sequence[AddedRule]) -> None:
        """Look in the output, also in what is kept of it, for what these rules are about beside the first ones."""
        if self._scanner is None:
            self._scanner = Scanner(self.transcript)
        self._scanner.use(added)
        self._scan(final=self._ended_told)

    def _scan(self, *, final: bool = False) -> None:
        if self._scanner is None:
            return
        found = self._scanner.scan(self.pump.written, final=final)
        if self._scanner.idle:
            self._scanner = None
        if found and self.on_found:
            self.on_found(self)

    # Input.

    async def type(self, chars: bytes, deadline: float, name: bytes = b"") -> int:
        """Have `chars` typed, once under `name` (`inlet.name_of`); return how many bytes were by `deadline`.

        `deadline`: monotonic.  Raises `StdinClosed` for a process without a terminal.
        """
        if self.typist is None:
            raise StdinClosed(
                f"stdin is closed for this session (process {self.process_id}); rerun the command with tty=true"
            )
        return await self.typist.type(name or name_of(""), chars, deadline, self.transcript.live().delivered)

    def _asked_before(self, name: bytes) -> int | None:
        """Return up to where the agent had had the output when this call came first; `None`: this is the first."""
        if self.pump.inlet:
            call = self.pump.inlet.find(name)
            return call.since if call else None
        asked, since = self.transcript.asked()
        return since if asked == name else None

    def _note(self, name: bytes) -> None:
        """Remember a call that types nothing."""
        delivered = self.transcript.live().delivered
        if self.pump.inlet:
            self.pump.inlet.note(name, delivered)
        else:
            self.transcript.ask(name, delivered)

    # Output.

    async def until_ended(self, deadline: float | None = None) -> bool:
        """Wait for the end, a hurry, or `deadline` (monotonic); tell whether it has ended."""
        if not self.ended and not self._hurry:
            await self._wait_in(self._waiters, deadline)
        return self.ended

    async def until_output(self, offset: int, deadline: float) -> None:
        """Wait until there is something after `offset`, or the end, a hurry, or `deadline` (monotonic)."""
        while self.pump.written <= offset and not self.ended and not self._hurry and time.monotonic() < deadline:
            await self._wait_in(self._growth, deadline)

    def hurry(self) -> None:
        """Make whoever waits for this process answer now with what there is."""
        self._hurry = True
        if self.typist:
            self.typist.stop()
        _wake(self._waiters)
        _wake(self._growth)

    async def _wait_in(self, waiters: list[asyncio.Future[None]], deadline: float | None) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        waiters.append(waiter)
        timer = None
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            timer = self._loop.call_later(left, _settle, waiter)
        try:
            await waiter
        finally:
            if timer:
                timer.cancel()
            _drop(waiters, waiter)

    def answer(
        self,
        started: float,
        max_tokens: int,
        *,
        since: int | None = None,
        typed: int = 0,
        warnings: list[str] | None = None,
    ) -> Response:
        """Return the output not yet delivered (or from `since` on), and count it as delivered.

        `started`: monotonic time at which the call began.
        """
        transcript = self.transcript
        delivered = transcript.live().delivered
        start = delivered if since is None else since
        end = self.pump.written
        parts = list(transcript.read(start, end))
        ended = self.ended
        if not ended and parts and not isinstance(parts[-1], Gap):
            offset, data = parts[-1]
            whole = whole_characters(data)
            parts[-1] = offset, data[:whole]
            end -= len(data) - whole
        self.last_used = time.monotonic()
        warnings = list(warnings or ())
        if self.pump.refusal is not None:
            warnings.append(f"output cannot be written down, so the program waits: {self.pump.refusal.strerror}")
        if end > delivered:
            transcript.deliver(end)
        if ended:
            transcript.record_told()
        return Response(
            thread=transcript.facts.thread_id,
            process_id=self.process_id,
            chunk_id=chunk_id(),
            wall_time_seconds=round(time.monotonic() - started, 4),
            exit_code=self.outcome.exit_code if ended and self.outcome else None,
            session_id=None if ended else int(self.process_id),
            original_token_count=tokens(max(0, end - start)),
            output=clip(parts, start, max(start, end), max_tokens),
            outcome=self.outcome.to_wire() if ended and self.outcome else None,
            sentence=self.outcome.sentence() if ended and self.outcome else "",
            output_end=end,
            typed=typed,
            warnings=warnings,
        )

    def piece(self, offset: int, limit: int) -> Output:
        """Return a piece of the transcript without delivering it, see `piece_of`."""
        return piece_of(self.transcript, offset, limit, ended=self.ended)

    async def converse(self, chars: bytes, yield_s: float, max_tokens: int, write_id: str = "") -> Response:
        """Type, wait for the end or `yield_s` seconds, and answer: the whole of `write_stdin`.

        A call that comes again, be it first to us or to a former holder, types nothing more, and is answered with
        the output since it came first.
        """
        started = time.monotonic()
        deadline = started + yield_s
        self.last_used = started
        name = name_of(write_id)
        since = self._asked_before(name)
        typed = 0
        warnings = []
        if since is None and (not chars or self.ended):
            self._note(name)
        elif chars and (self.typist or not self.ended):
            if self.typist and self.typist.cuts(chars):
                warnings.append(
                    f"a line is longer than {CANONICAL_MAX} bytes, and this terminal cuts longer lines; "
                    "write it to a file, or in pieces to a program that reads raw"
                )
            typed = await self.type(chars, deadline, name)
        await self.until_ended(deadline)
        if typed < len(chars):
            warnings.append(typed_less(typed, len(chars), ended=self.ended))
        return self.answer(started, max_tokens, since=since, typed=typed, warnings=warnings)


def piece_of(transcript: Transcript, offset: int, limit: int, *, ended: bool) -> Output:
    """Return what of `[offset, …)` is kept, up to `limit` bytes of it, and where to go on."""
    written = transcript.written
    outcome = transcript.live().outcome
    return output(transcript.read(offset, written), offset, limit, written, outcome, ended=ended)


def exec_yield(milliseconds: int) -> float:
    """Return how long `exec_command` waits, in seconds, within the limits of the tool."""
    return min(max(milliseconds, 250), 30_000) / 1000


def write_yield(milliseconds: int, chars: bytes) -> float:
    """Return how long `write_stdin` waits, in seconds: an empty poll is meant to wait."""
    return exec_yield(milliseconds) if chars else min(max(milliseconds, 5_000), 300_000) / 1000


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        _settle(waiter)
    waiters.clear()


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _drop(waiters: list[asyncio.Future[None]], waiter: asyncio.Future[None]) -> None:
    if waiter in waiters:
        waiters.remove(waiter)
