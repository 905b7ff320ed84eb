"""The two edges of `watches`: a clock that goes on while the machine is suspended, and who listens on which port.

Always true
    An alarm that is not set costs nothing, not even a descriptor.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from ..common import kernel

_LISTEN = "0A"


class Alarm:
    """Calls `ring` at an instant of `CLOCK_BOOTTIME`; asyncio's own timers stand still with a suspended machine."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._fd = -1

    def set(self, instant: int | None) -> None:
        """Ring at `instant` (nanoseconds since boot) in place of whenever was said before; `None`: never."""
        if instant is None:
            self.close()
            return
        if self._fd < 0:
            self._fd = kernel.timer()
            asyncio.get_running_loop().add_reader(self._fd, self._rang)
        kernel.set_timer(self._fd, instant)

    def _rang(self) -> None:
        with suppress(BlockingIOError):  # set anew meanwhile
            os.read(self._fd, 8)
            self._ring()

    def close(self) -> None:
        """Never ring."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


def listening(tables: Iterable[str] = ("/proc/net/tcp", "/proc/net/tcp6")) -> set[int]:
    """Return the TCP ports of this host on which something listens."""
    ports = set()
    for table in tables:
        with suppress(OSError), open(table) as file:
            next(file, None)
            for line in file:
                fields = line.split(maxsplit=4)
                if len(fields) == 5 and fields[3] == _LISTEN:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
