"""Starting a process of our own: broker, worker or spawner.

Such a process inherits no descriptor it was not given and none of our marks, leads a session of its own, and is
started without a fork of its parent (`posix_spawn`), so that it costs the same from a large process.

Limits: we raise our soft limits to the hard ones, since libzmq aborts a process that meets EMFILE in `accept`, and
a transcript may outgrow RLIMIT_FSIZE.  What they were before travels along, for the children.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from types import MappingProxyType

# Names a child gets, and that nothing of ours may carry: a tree that must be killed is found by them.
THREAD = b"OUTLIVE_THREAD"
PROCESS = b"OUTLIVE_PROCESS"
MARK = b"OUTLIVE_MARK"
# Names that only our own processes carry.
ROLE = b"OUTLIVE_ROLE"
LIMITS = b"OUTLIVE_LIMITS"
# What a supervisor tells whom it starts; not meant for somebody that is nobody's child.
_SUPERVISION = (b"NOTIFY_SOCKET", b"OUTLIVE_UNIT", b"LISTEN_PID", b"LISTEN_FDS", b"LISTEN_FDNAMES")
# Where the first given descriptor appears in the new process; the others follow.
FIRST_FD = 3

_RAISED = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)


def launch(
    module: str,
    arguments: Sequence[str] = (),
    *,
    fds: Sequence[int] = (),
    log: int = -1,
    extra: Mapping[str, str] = MappingProxyType({}),
    forsaken: bool = False,
) -> int:
    """Start `python -m MODULE ARGUMENTS...` and return the pid that the caller has to reap.

    `fds` appear there as 3, 4, …; standard input and output are /dev/null, standard error is `log`; its environment
    is ours and `extra`.
    `forsaken`: it is to be nobody's child, and the returned pid is that of a shell which ends at once.
    """
    foreign = (THREAD, PROCESS, MARK, ROLE, *(_SUPERVISION if forsaken else ()))
    environment = {name: value for name, value in os.environb.items() if name not in foreign}
    environment[ROLE] = module.rpartition("outlive.")[2].encode()
    environment |= {os.fsencode(name): os.fsencode(value) for name, value in extra.items()}
    # Two steps, since a number we want to fill may be one that we still have to copy from; for those by way of
    # numbers that are neither.
    taken = {*fds, log}
    end = FIRST_FD + len(fds)
    numbers = (at for at in count(end) if at not in taken)
    steps = [(fd, to, next(numbers) if fd < end else fd) for to, fd in enumerate(fds, FIRST_FD)]
    moved = [between for fd, _, between in steps if between != fd]
    # What others left open in us for whatever we start, such as a shell's `9>lock`, must not live as long.
    strangers = set(_inheritable()) - set(range(FIRST_FD + len(fds)))
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, log if log >= 0 else 0, 2),
        *((os.POSIX_SPAWN_DUP2, fd, between) for fd, _, between in steps if between != fd),
        *((os.POSIX_SPAWN_DUP2, between, to) for _, to, between in steps),
        *((os.POSIX_SPAWN_CLOSE, fd) for fd in sorted(strangers.union(moved))),
    ]
    # -P: a `json.py` in the caller's directory must not shadow ours.
    argv = [sys.executable, "-P", "-m", module, *arguments]
    if forsaken:
        argv = ["/bin/sh", "-c", '"$@" &', "sh", *argv]
    return os.posix_spawn(
        argv[0],
        argv,
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGTERM),
    )


def become(module: str, fds: Iterable[int], signals: Iterable[signal.Signals]) -> None:
    """Execute `python -m MODULE` in our place: same pid, same children, and these descriptors under their numbers.

    `signals` are held back until it unblocks them.  Returns only with an `OSError`, and then nothing has changed.
    """
    numbers = list(fds)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        for fd in numbers:
            os.set_inheritable(fd, True)
        os.execv(sys.executable, [sys.executable, "-P", "-m", module])
    finally:
        for fd in numbers:
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _inheritable() -> Iterator[int]:
    """Yield our descriptors that a program we execute would inherit."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                yield int(name)
        except OSError:  # the folder's own
            continue


def raise_limits() -> None:
    """Raise our soft limits to the hard ones, and remember what they were, for `original_limits`."""
    before = original_limits()
    for limit, (_, hard) in before.items():
        resource.setrlimit(limit, (hard, hard))
    os.environb[LIMITS] = ",".join(str(soft) for soft, _ in before.values()).encode()


def original_limits() -> dict[int, tuple[int, int]]:
    """Return the soft limits as they were before any process of ours raised them, and the hard ones."""
    limits = {limit: resource.getrlimit(limit) for limit in _RAISED}
    text = os.environb.get(LIMITS, b"").split(b",")
    if len(text) != len(limits):
        return limits
    return {limit: (int(soft), limits[limit][1]) for limit, soft in zip(limits, text, strict=True)}


def raised_limits() -> dict[int, tuple[int, int]]:
    """Return those of `original_limits` that this process does not have any more."""
    return {limit: pair for limit, pair in original_limits().items() if pair != resource.getrlimit(limit)}


def restore_limits(limits: Mapping[int, tuple[int, int]]) -> None:
    """Give the calling process (a child about to run its program) these limits."""
    for limit, pair in limits.items():
        resource.setrlimit(limit, pair)


def descriptor_limit() -> int:
    """Return how many descriptors this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
