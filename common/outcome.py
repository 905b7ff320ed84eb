"""How a process ended: its exit code, its signal, or an honest "lost".

Always true
    A code or a signal comes from the kernel.  What nobody can know is `lost`, with the reason.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Literal, NamedTuple

Kind = Literal["exited", "signaled", "lost"]
# Who ended it, where it was us: the caller's `kill`, the limit on processes, `clean`, `shutdown`, a denied
# network attempt.
By = Literal["caller", "pruned", "cleaned", "shutdown", "network"]

KINDS: tuple[Kind, ...] = ("exited", "signaled", "lost")
BYS: tuple[By, ...] = ("caller", "pruned", "cleaned", "shutdown", "network")


class Outcome(NamedTuple):
    """How one process ended.

    `code` only with `exited` (0–255), `signal` (a number) only with `signaled`, `reason` always with `lost`.
    """

    kind: Kind
    code: int | None = None
    signal: int | None = None
    reason: str | None = None
    by: By | None = None

    @classmethod
    def from_status(cls, status: int, by: By | None = None) -> Outcome:
        """Return the outcome that a wait status (as from `waitpid`) tells."""
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            return cls("signaled", signal=-code, by=by)
        return cls("exited", code=code, by=by)

    @classmethod
    def lost(cls, reason: str, by: By | None = None) -> Outcome:
        """Return the outcome of a process about which nobody can know more than `reason`."""
        return cls("lost", reason=reason, by=by)

    @property
    def exit_code(self) -> int | None:
        """The code as a shell would show it: 128 + N for signal N, `None` for `lost`."""
        if self.kind == "exited":
            return self.code
        if self.kind == "signaled" and self.signal is not None:
            return 128 + self.signal
        return None

    def sentence(self) -> str:
        """Return the one line that a tool result shows for this outcome."""
        ended_by = f" ({self.by})" if self.by else ""
        if self.kind == "exited":
            return f"Process exited with code {self.code}{ended_by}"
        if self.kind == "signaled" and self.signal is not None:
            return f"Process ended by signal {self.signal} ({signal_name(self.signal)}){ended_by}"
        return f"Process lost: {self.reason}"

    def to_wire(self) -> dict[str, Any]:
        """Return the object that `--json` and messages carry; absent fields are left out."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL; real-time ones by their number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def signal_number(text: str) -> int:
    """Return the number of a signal written as `TERM`, `SIGTERM`, `sigterm` or `15`.

    Raises `ValueError` for anything else.
    """
    name = text.strip().upper()
    if name.isdecimal():
        number = int(name)
        if number not in signal.valid_signals():
            raise ValueError(f"signal {text!r}: this system has no signal of that number")
        return number
    try:
        return int(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    except KeyError:
        raise ValueError(f"signal {text!r}: use a name such as TERM, INT or HUP, or a number") from None
