"""A home for one run: an OUTLIVE_HOME of its own, which is removed at the end with everything that runs in it.

What outlive starts is meant to survive, so whoever tries it out has to clean up even when interrupted.  Every
process of a home, ours or a child, is found by OUTLIVE_HOME in its environment.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import outlive

# Seconds that processes which were told to end may take to be gone.
_GONE_WITHIN = 5.0
_LOOK = 0.02


@contextmanager
def temporary_home(config: str = "") -> Iterator[Path]:
    """Set OUTLIVE_HOME to a new folder with this `config.toml`; in the end kill what runs there, and remove it."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("OUTLIVE_")]:
        del os.environ[name]  # we may run inside a process that outlive started
    folder = Path(tempfile.mkdtemp(prefix="outlive-"))
    os.environ["OUTLIVE_HOME"] = str(folder)
    try:
        if config:
            (folder / "config.toml").write_text(config, encoding="utf-8")
        yield folder
    finally:
        os.environ.clear()
        os.environ.update(before)
        while left := residents(folder):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_LOOK)
        shutil.rmtree(folder, ignore_errors=True)


def residents(home: Path) -> list[int]:
    """Return the processes of a home, zombies left out."""
    wanted = b"OUTLIVE_HOME=" + os.fsencode(home)
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with suppress(OSError):
                if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


async def deserted(home: Path) -> list[int]:
    """Wait a moment for a home's last processes to go, and return those that do not."""
    deadline = time.monotonic() + _GONE_WITHIN
    while (left := residents(home)) and time.monotonic() < deadline:
        await asyncio.sleep(_LOOK)
    return left


async def emptied() -> None:
    """End everything, for a run that was broken off; `temporary_home` sees to what does not obey."""
    with suppress(outlive.OutliveError, TimeoutError):
        async with asyncio.timeout(_GONE_WITHIN), outlive.connect(start=False) as host:
            await host.down(force=True)


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run `main` and return its exit status; SIGTERM and SIGHUP cancel it as Ctrl-C does."""

    async def cancellable() -> int:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await main

    try:
        return asyncio.run(cancellable())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 128 + signal.SIGINT
