"""`python -m outlive.broker [READY]`: what the keeper starts; not for people.

The lock makes it the only one of its runtime folder.  One that finds it taken takes over from the broker that has
it (`succession`), if a keeper started it, or that broker itself for an upgrade; else it ends.  Standard error is
its log.  READY is a descriptor to which it writes one line: `ready`, `taken`, or what went wrong.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import sys
from contextlib import suppress

from ..common import kernel, launch, notify
from ..common.config import Config, load
from ..common.errors import OutliveError, Unavailable
from ..common.paths import Paths
from ..common.pump import CopyingPump, Pump
from .loop import Broker
from .succession import Inheritance, take_over


def _lock(paths: Paths) -> int | None:
    """Return the locked descriptor, or `None` while another broker has it."""
    fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _inherit(paths: Paths, line: int, found: dict[str, list[int]]) -> Inheritance | None:
    """Return what this broker starts with; `None` when another one is there and we are not its successor."""
    while (lock := _lock(paths)) is None:
        if notify.ADDRESS not in os.environ:
            return None
        # One that cannot be loaded must not take the place of one that runs; now nobody has stopped serving yet.
        from . import keeper  # noqa: F401

        if inheritance := take_over(paths):
            break
    else:
        if line < 0 and notify.ADDRESS in os.environ:
            # The keeper starts another one, with everything; we would find nothing, and call it lost.
            os.close(lock)
            raise Unavailable("the broker that was to be upgraded died before it handed over")
        inheritance = Inheritance(lock)
    if line >= 0:
        inheritance.line = socket.socket(fileno=line)
    inheritance.found = found
    return inheritance


async def _run(paths: Paths, config: Config, mode: str, inheritance: Inheritance) -> None:
    """Serve; and if another broker took over and did not come up, serve again."""
    while True:
        broker = Broker(paths, config, mode, inheritance)
        succession = await broker.run(on_ready=lambda: _ready(inheritance, broker))  # noqa: B023
        if succession is None:
            return
        failure = await succession.hand_over(inheritance.lock, paths.log)
        if not failure:
            succession.close()
            return
        print(f"broker: another one was to take over, and did not: {failure}", file=sys.stderr, flush=True)
        inheritance = Inheritance(
            inheritance.lock, succession.line, handed=[*succession.handles.values()], kept=True, failure=failure
        )


def _ready(inheritance: Inheritance, broker: Broker) -> None:
    _say("ready")
    if predecessor := inheritance.predecessor:
        with suppress(OSError):  # it has died, and so has nothing more to end for
            predecessor.send("ready")
        predecessor.close()
        if inheritance.kept and (pid := broker.keeper_pid):
            os.kill(pid, signal.SIGHUP)


def _say(line: str) -> None:
    if len(sys.argv) > 1:
        fd = int(sys.argv.pop())
        with suppress(OSError):  # whoever started us may not wait any more
            os.write(fd, line.encode("utf-8", "backslashreplace"))
        os.close(fd)


def main() -> int:
    """Run the broker; returns the exit status."""
    os.chdir("/")
    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    found = notify.inherited(launch.FIRST_FD)
    (line,) = found.pop("keeper", [-1])
    try:
        paths = Paths.from_environment()
        paths.prepare()
        config = load(paths.config)
        launch.raise_limits()
        spliced = config.pump == "auto" and kernel.can_splice_terminals()
        mode = Pump.mode if spliced else CopyingPump.mode
        inheritance = _inherit(paths, line, found)
        if inheritance is None:
            _say("taken")
            return 0
        asyncio.run(_run(paths, config, mode, inheritance))
    except (OutliveError, OSError) as error:
        print(f"broker: {error}", file=sys.stderr, flush=True)
        _say(str(error))
        if line >= 0 and not found:  # nobody needs the next try, and whoever needs a broker starts one
            notify.Notifier().tell({"STOPPING": "1"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
