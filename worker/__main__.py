"""`python -m outlive.worker THREAD EPOCH MODE`: what the broker starts; not for people.

EPOCH numbers the workers of a thread.  MODE is that of the pump, `spliced` or `copied`: the broker has tried out
what this machine can.  Descriptor 3 is the locked file of the epoch (`broker.epochs`).  Standard error is the
broker's log.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from ..common import launch
from ..common.config import load
from ..common.errors import OutliveError
from ..common.paths import Paths
from .session import Session


async def _run(thread_id: str, epoch: int, mode: str) -> None:
    paths = Paths.from_environment()
    await Session(paths, thread_id, epoch, mode, load(paths.config), lock=launch.FIRST_FD).run()


def main() -> int:
    """Run one worker until it is told to go to bed; returns the exit status."""
    thread_id, epoch, mode = sys.argv[1:4]
    os.chdir("/")
    launch.raise_limits()
    os.set_inheritable(launch.FIRST_FD, False)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    try:
        asyncio.run(_run(thread_id, int(epoch), mode))
    except OutliveError as error:
        print(f"worker {thread_id}/{epoch}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
