"""What a broker that starts makes of the descriptors that it finds.

They come from the keeper, several under one name and in no useful order, from whichever moment the former broker
died in.  What each is, is told by looking at it; whose it is, by the header of the transcript among them.  What to
do about a process is a table; `processes` does it.

Always true
    A descriptor that is not understood is closed, with a line in the log; it is never served.
    Nobody is believed to be dead who is not proved dead: then its process is left to it.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Mapping
from enum import Enum, auto

from ..common import kernel
from ..common.descriptors import Handles
from ..common.errors import PeerError
from ..common.inlet import Inlet, is_inlet
from ..common.transcript import Transcript
from .custody import Event


class Progress(Enum):
    """How far its start had got."""

    UNMARKED = auto()  # the program was not executed yet
    MARKED = auto()  # it was, and nobody had told us more
    COMPLETE = auto()  # terminal and pidfd are here


class Leaseholder(Enum):
    """Who pumps it, or would have: the holder of the lease in its header."""

    NOBODY = auto()  # released, or proved dead, and nothing more can come of its epoch
    UNFINISHED = auto()  # proved dead, while its spawner lives and may be in the middle of a start
    ALIVE = auto()


class Verdict(Enum):
    """What to do."""

    WAIT = auto()  # for what its worker or its spawner says, or for their end
    LOOK = auto()  # the header tells whether it ran, and /proc whether it still does
    MOVE = auto()  # as a deposit that came just now: see `EVENTS`


VERDICTS: Mapping[tuple[Progress, Leaseholder], Verdict] = {
    (Progress.UNMARKED, Leaseholder.NOBODY): Verdict.LOOK,
    (Progress.UNMARKED, Leaseholder.UNFINISHED): Verdict.WAIT,
    (Progress.UNMARKED, Leaseholder.ALIVE): Verdict.WAIT,
    (Progress.MARKED, Leaseholder.NOBODY): Verdict.LOOK,
    (Progress.MARKED, Leaseholder.UNFINISHED): Verdict.WAIT,
    (Progress.MARKED, Leaseholder.ALIVE): Verdict.WAIT,
    # Its own start is over, whatever else the spawner is doing.
    (Progress.COMPLETE, Leaseholder.NOBODY): Verdict.MOVE,
    (Progress.COMPLETE, Leaseholder.UNFINISHED): Verdict.MOVE,
    (Progress.COMPLETE, Leaseholder.ALIVE): Verdict.MOVE,
}

# The event that a complete process comes to, by who holds its lease.
EVENTS: Mapping[Leaseholder, Event] = {
    Leaseholder.NOBODY: Event.STARTED_ALONE,
    Leaseholder.UNFINISHED: Event.STARTED_ALONE,
    Leaseholder.ALIVE: Event.STARTED,
}


def progress(handles: Handles, transcript: Transcript) -> Progress:
    """Tell how far the start of a found process had got."""
    if handles.pidfd >= 0:
        return Progress.COMPLETE
    return Progress.MARKED if transcript.live().started else Progress.UNMARKED


def identify(fds: list[int], log: Callable[[str], None]) -> Handles:
    """Return the handles of the one process that these descriptors are of; all are taken.

    Raises `PeerError` when there is no sound transcript of this boot among them, having closed all.
    """
    handles = Handles()
    try:
        for fd in fds:
            if handles.transcript < 0 and kernel.is_sealed_memfd(fd) and not is_inlet(fd):
                handles.transcript = fd
        if handles.transcript < 0:
            raise PeerError("no transcript is among them")
        transcript = Transcript(handles.transcript)
        transcript.live()
        if transcript.facts.boot_id != kernel.boot_id():
            raise PeerError(f"its transcript is of another boot, {transcript.facts.boot_id:.40}")
    except PeerError:
        handles.transcript = -1
        for fd in fds:
            os.close(fd)
        raise
    for fd in fds:
        if fd == handles.transcript:
            continue
        role = _role(fd, transcript)
        if role and getattr(handles, role) < 0:
            setattr(handles, role, fd)
            continue
        # Stored twice, when it came from two sides.
        if not role or not kernel.is_same_file(fd, getattr(handles, role)):
            log(f"descriptor of {transcript.facts.thread_id}/{transcript.facts.process_id}: {_shown(fd)}; closed")
        os.close(fd)
    return handles


def _role(fd: int, transcript: Transcript) -> str | None:
    """Tell what a descriptor is for its process, by what it is for the kernel."""
    if kernel.is_sealed_memfd(fd):
        return _memory(fd, transcript)
    mode = os.fstat(fd).st_mode
    facts = transcript.facts
    if stat.S_ISFIFO(mode):
        writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if not facts.tty:
            return None if writes else "terminal"
        if os.fstat(fd).st_ino != transcript.conduit():
            return None
        return "conduit_write" if writes else "conduit_read"
    if stat.S_ISCHR(mode):
        return "terminal" if facts.tty and kernel.is_pty_master(fd) else None
    return "pidfd" if _is_its_pidfd(fd, transcript.live().pid) else None


def _memory(fd: int, transcript: Transcript) -> str | None:
    if not is_inlet(fd):
        return "transcript"
    try:
        Inlet(fd, transcript.facts.mark)
    except PeerError:
        return None
    return "inlet"


def _is_its_pidfd(fd: int, pid: int) -> bool:
    # A reaped one tells no pid any more.
    return kernel.is_pidfd(fd) and kernel.pidfd_pid(fd) in (pid, None)


def _shown(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return str(error)
