"""outlive: processes that outlive their agents.

An agent thread's shells, servers and test runs live on when its worker crashes, is upgraded or goes to bed: with
the same ids, every byte of output, and their real exit codes.  Start with `connect`.

    common/    what both sides agree on, and the Python API
    broker/    holds what must not die with a worker
    worker/    runs one thread session, and may die at any moment
    scripts/   everything a person runs: the command line, demo, test, check, bench, chaos

The names are handed on lazily, so that `import outlive` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Here and nowhere else; to look it up among what is installed takes 12 ms of the 140 that a broker needs to start.
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .common.client import Host, Thread, connect
    from .common.errors import (
        BadRequest,
        DeadlineExceeded,
        ExpiredProcess,
        Interrupted,
        LimitReached,
        OutliveError,
        SpawnError,
        StdinClosed,
        Unavailable,
        UnknownProcess,
        UnknownThread,
    )
    from .common.outcome import Outcome
    from .common.program import ProcessSummary, Wake
    from .common.response import Response
    from .scripts.doors.sandbox import OutliveSandboxClient as OutliveSandboxClient
    from .scripts.doors.sandbox import OutliveSandboxClientOptions as OutliveSandboxClientOptions
    from .scripts.doors.sandbox import OutliveSandboxSession as OutliveSandboxSession
    from .scripts.doors.sandbox import OutliveSandboxSessionState as OutliveSandboxSessionState
    from .worker.agent import Session

_HOMES = {
    "common.client": ("Host", "Thread", "connect"),
    "common.errors": (
        "BadRequest",
        "DeadlineExceeded",
        "ExpiredProcess",
        "Interrupted",
        "LimitReached",
        "OutliveError",
        "SpawnError",
        "StdinClosed",
        "Unavailable",
        "UnknownProcess",
        "UnknownThread",
    ),
    "common.outcome": ("Outcome",),
    "common.program": ("ProcessSummary", "Wake"),
    "common.response": ("Response",),
    # Of an extra, so not in `__all__`: `from outlive import *` would load the Agents SDK.
    "scripts.doors.sandbox": (
        "OutliveSandboxClient",
        "OutliveSandboxClientOptions",
        "OutliveSandboxSession",
        "OutliveSandboxSessionState",
    ),
    "worker.agent": ("Session",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BadRequest",
    "DeadlineExceeded",
    "ExpiredProcess",
    "Host",
    "Interrupted",
    "LimitReached",
    "Outcome",
    "OutliveError",
    "ProcessSummary",
    "Response",
    "Session",
    "SpawnError",
    "StdinClosed",
    "Thread",
    "Unavailable",
    "UnknownProcess",
    "UnknownThread",
    "Wake",
    "connect",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
