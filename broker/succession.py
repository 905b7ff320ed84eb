"""One broker takes over from another that lives: after an upgrade, or when a new keeper has started a new one.

    successor → predecessor    hello         role=successor, on the channel: I am loaded, hand over
    predecessor → successor    inheritance   a parcel, as often as it takes; the predecessor has stopped serving
                               all           with the lock; upgrade: also with the keeper's line
    successor → predecessor    ready         I take requests: end

Always true
    The predecessor keeps everything until it is told `ready`.  A successor that hangs up, or says nothing for
    `READY_DEADLINE`, is killed by its pidfd, so that it does not pump; then the predecessor serves again.
    The lock is never free in between: both have the same open file.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..common import channel, ending
from ..common.channel import open_parcel, parcel_rows, parcels
from ..common.connection import until_readable
from ..common.descriptors import Handles
from ..common.errors import HandoffError, PeerError
from ..common.paths import Paths
from .peers import Peer

# Seconds that a successor has from the last parcel until it serves.  It has loaded everything by then.
READY_DEADLINE = 60.0
# Bytes of the log in which a dead program's last line is looked for.
_LAST_WORDS_MAX = 4096
# Seconds between two looks at whether the predecessor has come up far enough to be asked, or has gone.
_LOOK = 0.02


@dataclass(slots=True)
class Inheritance:
    """What a broker starts with: the lock, what it found, what it was handed, and by whom."""

    lock: int
    # The keeper's line to us.
    line: socket.socket | None = None
    # Name → descriptors, from the keeper.
    found: dict[str, list[int]] = field(default_factory=dict)
    # From a predecessor, and whether our keeper keeps them already: it was the predecessor's, too.
    handed: list[Handles] = field(default_factory=list)
    kept: bool = False
    predecessor: channel.Channel | None = None
    # Why the last upgrade did not come up.
    failure: str = ""


@dataclass(slots=True)
class Succession:
    """What a broker that stopped serving hands over, and to whom."""

    successor: Peer
    handles: dict[tuple[str, str], Handles]
    line: socket.socket | None
    upgrade: bool

    async def hand_over(self, lock: int, log: Path) -> str:
        """Hand everything over; return why the successor did not come up, empty when it did."""
        link, since = self.successor.channel, end_of(log)
        try:
            held = {key: handles.held() for key, handles in self.handles.items()}
            for parcel in parcels(held):
                rows, fds = parcel_rows(parcel)
                await link.send_async("inheritance", fds, processes=rows)
            last = [lock, self.line.fileno()] if self.upgrade and self.line else [lock]
            await link.send_async("all", last, upgrade=self.upgrade)
            if not await until_readable(link.fileno(), READY_DEADLINE):
                raise HandoffError(f"it did not come up within {READY_DEADLINE:.0f} s")
            packet = link.receive()
            if packet is not None and packet.kind == "ready":
                return ""
            raise HandoffError(f"it died while it came up{last_words(log, since)}")
        except (OSError, HandoffError, PeerError) as error:
            await self._end_successor()
            return str(error)
        finally:
            self.successor.close()

    async def _end_successor(self) -> None:
        """See it dead: it must not pump beside us."""
        pidfd = self.successor.pidfd
        if pidfd is None:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await until_readable(pidfd, READY_DEADLINE)
        ending.reap(pidfd)

    def close(self) -> None:
        """Close our copies: they are the successor's now."""
        for handles in self.handles.values():
            handles.close()
        if self.line:
            self.line.close()


def end_of(log: Path) -> int:
    """Return where the log ends, for `last_words`."""
    with suppress(OSError):
        return log.stat().st_size
    return 0


def last_words(log: Path, since: int) -> str:
    """Return what a program that has died may have died of: the last line in the log, or where to look."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(since, end_of(log) - _LAST_WORDS_MAX))
        if words := file.read().decode("utf-8", "replace").strip():
            return f": {words.splitlines()[-1]} (see {log})"
    return f"; see {log}"


def take_over(paths: Paths) -> Inheritance | None:
    """Return what the living broker hands over; `None` when it is gone, or not to be reached yet: look again.

    Raises `PeerError` when it refuses.
    """
    try:
        link = channel.connect(paths.channel)
    except OSError:
        time.sleep(_LOOK)
        return None
    handed: list[Handles] = []
    try:
        link.send_patiently("hello", role="successor", pid=os.getpid())
        while True:
            packet = link.receive_within(READY_DEADLINE)
            if packet is None:
                raise ConnectionResetError
            if packet.kind == "inheritance":
                handed += open_parcel(packet).values()
            elif packet.kind == "all":
                lock, *line = packet.fds
                packet.fds.clear()
                return Inheritance(
                    lock,
                    socket.socket(fileno=line[0]) if line else None,
                    handed=handed,
                    predecessor=link,
                    kept=packet.message.get("upgrade") is True,
                )
            else:
                raise PeerError(f"the running broker refused: {packet.message.get('message')}")
    except (OSError, HandoffError, PeerError) as error:
        for handles in handed:
            handles.close()
        link.close()
        if isinstance(error, PeerError):
            raise
        if isinstance(error, TimeoutError):
            raise PeerError(f"the running broker does not hand over within {READY_DEADLINE:.0f} s") from None
        return None
