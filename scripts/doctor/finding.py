"""What one check found, and how bad that is.

ok        as it should be.
note      worth knowing; nothing has to be done.
warning   outlive works, with a promise less, or not for as many processes as one may want.
error     outlive does not work, or what it holds cannot be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `advice` is empty where there is nothing to do; `pids`: the processes it is about."""

    check: str
    severity: Severity
    found: str
    meaning: str
    advice: str = ""
    pids: tuple[int, ...] = ()

    def to_builtins(self) -> dict[str, Any]:
        """Return it as `--json` prints it."""
        return asdict(self) | {"pids": list(self.pids)}


def some(names: Sequence[str], at_most: int = 8) -> str:
    """Return names for a sentence, of many only the first."""
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
