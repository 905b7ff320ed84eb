"""`python -m outlive.broker [READY]`: what the first command starts; not for people.

The lock makes it the only one of its runtime folder: a second one ends at once, successfully, since what was
wanted is there.  Standard error is its log.  READY is a descriptor to which it writes one line: `ready`, `taken`
(another has the lock), or what went wrong.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from contextlib import suppress

from ..common import kernel, launch
from ..common.config import Config, load
from ..common.errors import OutliveError
from ..common.paths import Paths
from ..common.pump import CopyingPump, Pump
from .loop import Broker


def _lock(paths: Paths) -> int | None:
    """Return the locked descriptor, or `None` while another broker has it."""
    fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


async def _run(paths: Paths, config: Config, mode: str) -> None:
    await Broker(paths, config, mode).run(on_ready=lambda: _say("ready"))


def _say(line: str) -> None:
    if len(sys.argv) > 1:
        fd = int(sys.argv.pop())
        with suppress(OSError):  # whoever started us may not wait any more
            os.write(fd, line.encode())
        os.close(fd)


def main() -> int:
    """Run the broker; returns the exit status."""
    os.chdir("/")
    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        paths = Paths.from_environment()
        paths.prepare()
        lock = _lock(paths)
        if lock is None:
            _say("taken")
            return 0
        config = load(paths.config)
        launch.raise_limits()
        spliced = config.pump == "auto" and kernel.can_splice_terminals()
        asyncio.run(_run(paths, config, Pump.mode if spliced else CopyingPump.mode))
    except (OutliveError, OSError) as error:
        print(f"broker: {error}", file=sys.stderr)
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
