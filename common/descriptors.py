"""The descriptors of one process, owned: each is closed exactly once, by whoever owns it last.

The kernel hands a closed number out again at once, so a stale copy does not fail: it reads and writes
somebody else's file.  Therefore numbers live only here, and leave only into other `Handles` (`adopt`) or as a loan
for the length of one call (`held`).

The roles: `terminal` (the PTY master, or the read end of the output pipe); the two ends of the `conduit`, a pipe
between terminal and transcript, and the `inlet`, the input on its way to the terminal (these only with a PTY); the
`transcript`; the `pidfd`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from operator import attrgetter

ROLES = (
    "transcript",
    "terminal",
    "conduit_read",
    "conduit_write",
    "inlet",
    "pidfd",
)
_numbers = attrgetter(*ROLES)


class Handles:
    """The descriptors of one process by role; -1 stands for one that we do not have (yet)."""

    __slots__ = ROLES

    transcript: int
    terminal: int
    conduit_read: int
    conduit_write: int
    inlet: int
    pidfd: int

    def __init__(self, descriptors: Mapping[str, int] | None = None) -> None:
        self.transcript = self.terminal = self.conduit_read = self.conduit_write = self.inlet = self.pidfd = -1
        if descriptors:
            for role, fd in descriptors.items():
                setattr(self, role, fd)

    def held(self) -> dict[str, int]:
        """Return role → number of those that we have, in the order of `ROLES`: a loan, not a gift."""
        return {role: fd for role, fd in zip(ROLES, _numbers(self), strict=True) if fd >= 0}

    def adopt(self, other: Handles) -> None:
        """Take over what `other` has and we lack; what we both have is closed in `other`."""
        for role, fd in other.held().items():
            if getattr(self, role) < 0:
                setattr(self, role, fd)
                setattr(other, role, -1)
        other.close()

    def close_role(self, role: str) -> None:
        """Close one of them, if we have it."""
        fd = getattr(self, role)
        if fd >= 0:
            setattr(self, role, -1)
            os.close(fd)

    def close(self) -> None:
        """Close all of them; closing again does nothing."""
        for role in self.held():
            self.close_role(role)

    def __del__(self) -> None:
        if held := self.held():
            warnings.warn(f"descriptors never closed: {held}", ResourceWarning, stacklevel=2)
            self.close()

    def __len__(self) -> int:
        return len(self.held())

    def __repr__(self) -> str:
        return f"Handles({self.held()})"
