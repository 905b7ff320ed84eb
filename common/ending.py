"""Who can know how a process ended, asked in order; the first that knows is believed.

    the header          somebody already recorded it
    the parent          `waitid` with WNOWAIT, record, then reap: by pidfd, since a pid may be recycled
    a zombie            the last field of /proc/PID/stat, while the pidfd proves that it is still ours
    the pidfd           PIDFD_GET_INFO, after the reap (Linux 6.15 and newer)

The parent is the spawner; after its death the broker, the subreaper that adopts.  Both record before they reap, so
that there is no moment in which nobody can tell.
"""

from __future__ import annotations

import os
from contextlib import suppress

from . import kernel
from .outcome import Outcome
from .transcript import Transcript


def learn(pidfd: int, transcript: Transcript) -> Outcome | None:
    """Return how the process behind a readable `pidfd` ended, and record it; `None`: nobody knows (yet).

    Reaps the process when it is our child.
    """
    known = transcript.live()
    if known.outcome is not None:
        reap(pidfd)
        return known.outcome
    status = _status(pidfd)
    if status is None:
        # Between the two looks the parent may have recorded and reaped.
        return transcript.live().outcome
    transcript.record_outcome(Outcome.from_status(status, known.by))
    reap(pidfd)
    return transcript.live().outcome


def reap(pidfd: int) -> None:
    """Take an ended child of ours off the process table; somebody else's stays."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def lost(pidfd: int, transcript: Transcript) -> Outcome:
    """Record that nobody can know how the process ended, once `learn` has failed for good; return that."""
    reason = "it was reaped by a process that kept no record" if pidfd >= 0 else "its pidfd was never received"
    transcript.record_outcome(Outcome.lost(reason))
    recorded = transcript.live().outcome
    assert recorded is not None
    return recorded


def _status(pidfd: int) -> int | None:
    status = kernel.child_status(pidfd)
    if status is not None:
        return status
    pid = kernel.pidfd_pid(pidfd)
    if pid is not None:
        status = kernel.zombie_status(pid)
        # Only if it is not reaped even now was the zombie we looked at ours.
        if status is not None and not kernel.is_reaped(pidfd):
            return status
    return kernel.pidfd_exit_status(pidfd)
