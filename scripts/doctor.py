"""Whether this machine and this user's folders are fit for outlive, and what to do where they are not.

Each check looks at one thing, itself and now, and says what was found, what that means, and what to do.  `broken`:
outlive does not work, or not for long; `warning`: it works, with a promise less; nothing is changed, and no broker
is started.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..common import config, kernel
from ..common.descriptors import ROLES
from ..common.errors import OutliveError, Unavailable
from ..common.paths import Paths

State = Literal["ok", "warning", "broken"]

# Open files: with fewer a thread full of processes does not fit beside the broker's own.
_FILES_LOW = 1024
_FILES_BROKEN = 128
# Pages of pipes that a user may have before new pipes get one page only; a process on a terminal has two pipes of
# 16 pages.
_PIPE_PAGES = 16
_SPLICE_SINCE = (5, 11)
_PIDFD_EXIT_SINCE = (6, 15)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `advice` is empty where there is nothing to do."""

    check: str
    state: State
    found: str
    meaning: str
    advice: str = ""

    def to_builtins(self) -> dict[str, str]:
        """Return it as `--json` prints it."""
        return asdict(self)


def findings(paths: Paths) -> Iterator[Finding]:
    """Do all checks, quickest first; the last asks the broker, if one runs."""
    yield _kernel()
    yield _splice()
    yield _pidfd()
    yield _exit_info()
    yield _memfd()
    yield _open_files()
    yield _pipe_pages()
    yield _huge_pages()
    yield _folder("runtime folder", paths.run)
    yield _folder("state folder", paths.state)
    yield _configuration(paths)
    yield _broker(paths)


def _setting(path: str) -> str | None:
    """Return a setting of the kernel, `None` where it has no such setting."""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _tried(test: Callable[[], None]) -> str:
    """Return what went wrong, empty if nothing did."""
    try:
        test()
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


def _kernel() -> Finding:
    system = os.uname()
    numbers = tuple(int(part) for part in system.release.replace("-", ".").split(".")[:2] if part.isdecimal())
    found = f"{system.sysname} {system.release}"
    if system.sysname != "Linux":
        return Finding("kernel", "broken", found, "outlive needs Linux", "run it on Linux 5.11 or newer")
    if numbers < _SPLICE_SINCE:
        meaning = "older than 5.11: terminals cannot be spliced, so output in flight may be lost in a crash"
        return Finding("kernel", "warning", found, meaning, "use Linux 5.11 or newer, best 6.15")
    return Finding("kernel", "ok", found, "new enough")


def _splice() -> Finding:
    if kernel.can_splice_terminals():
        meaning = "transcripts are spliced: no crash of ours loses a byte of output"
        return Finding("splice from a terminal", "ok", "works", meaning)
    return Finding(
        "splice from a terminal",
        "warning",
        "refused",
        "transcripts are copied: a crash may lose the output that was in flight",
        "use Linux 5.11 or newer; if it is, a sandbox (gVisor, seccomp) forbids it",
    )


def _pidfd() -> Finding:
    def test() -> None:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)

    if wrong := _tried(test):
        meaning = "processes cannot be waited for or signalled safely; nothing can be started"
        return Finding(
            "pidfd", "broken", wrong, meaning, "use Linux 5.4 or newer, outside a sandbox that forbids it"
        )
    return Finding("pidfd", "ok", "works", "a recycled process id is never mistaken for ours")


def _exit_info() -> Finding:
    check = "exit status by pidfd"
    status: int | None = None
    with suppress(OSError, AttributeError):
        pid = os.posix_spawn("/bin/sh", ["/bin/sh", "-c", "exit 7"], {})
        pidfd = os.pidfd_open(pid)
        try:
            os.waitpid(pid, 0)
            status = kernel.pidfd_exit_status(pidfd)
        finally:
            os.close(pidfd)
    if status is not None and os.waitstatus_to_exitcode(status) == 7:
        meaning = "exit codes are known also when whoever started the process has died"
        return Finding(check, "ok", "PIDFD_GET_INFO tells it", meaning)
    needed = ".".join(str(number) for number in _PIDFD_EXIT_SINCE)
    return Finding(
        check,
        "warning",
        "the kernel does not tell it",
        "when several of our processes die at once, some exit codes may be reported as lost",
        f"use Linux {needed} or newer",
    )


def _memfd() -> Finding:
    def test() -> None:
        fd = kernel.memfd("outlive-doctor")
        try:
            os.ftruncate(fd, 4096)
            os.pwrite(fd, b"x", 0)
            kernel.punch_hole(fd, 0, 4096)
            kernel.seal(fd)
        finally:
            os.close(fd)

    noexec = _setting("/proc/sys/vm/memfd_noexec")
    found = "vm.memfd_noexec " + ("is unknown to this kernel" if noexec is None else f"= {noexec}")
    if wrong := _tried(test):
        meaning = "transcripts are sealed memfds, and none could be made: nothing can be started"
        return Finding("memfd", "broken", f"{wrong}; {found}", meaning, "allow memfd_create, fallocate and seals")
    return Finding("memfd", "ok", f"works; {found}", "transcripts can be made, and can never be executed")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = "no limit" if hard == resource.RLIM_INFINITY else f"about {max(0, hard - 64) // len(ROLES)} processes"
    found = f"soft {_limit(soft)}, hard {_limit(hard)}"
    meaning = (
        f"the broker raises its own limit to the hard one; each process takes {len(ROLES)} descriptors: {room}"
    )
    advice = "raise the hard limit (`ulimit -Hn`, LimitNOFILE=, limits.conf), then restart the broker"
    if hard != resource.RLIM_INFINITY and hard < _FILES_BROKEN:
        return Finding("open files", "broken", found, meaning, advice)
    if hard != resource.RLIM_INFINITY and hard <= _FILES_LOW:
        return Finding("open files", "warning", found, meaning, advice)
    return Finding("open files", "ok", found, meaning)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _pipe_pages() -> Finding:
    check = "pipe-user-pages-soft"
    text = _setting("/proc/sys/fs/pipe-user-pages-soft")
    if text is None or not text.isdecimal():
        return Finding(check, "ok", "not set", "pipes are not limited")
    pages = int(text)
    if pages == 0:
        return Finding(check, "ok", "0", "pipes are not limited")
    full = pages // (2 * _PIPE_PAGES)
    meaning = f"about {full} processes on terminals get pipes of full size, further ones small, slower pipes"
    if full < 64:
        advice = "raise it: sysctl fs.pipe-user-pages-soft=16384"
        return Finding(check, "warning", text, meaning, advice)
    return Finding(check, "ok", text, meaning + "; nothing is lost by that")


def _huge_pages() -> Finding:
    check = "shmem_enabled"
    text = _setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = text.partition("[")[2].partition("]")[0] if text else ""
    if chosen in ("always", "force"):
        return Finding(
            check,
            "warning",
            chosen,
            "every transcript takes 2 MiB of memory, however short",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (as root)",
        )
    return Finding(check, "ok", chosen or "not set", "transcripts take the memory that their output needs")


def _folder(check: str, folder: Path) -> Finding:
    advice = "make it writable, or set OUTLIVE_HOME to a folder that is"
    try:
        found = folder.stat()
    except FileNotFoundError:
        parent = next((p for p in folder.parents if p.exists()), Path("/"))
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding(check, "ok", str(folder), "does not exist yet; it is made when it is needed")
        return Finding(check, "broken", str(folder), f"cannot be made: {parent} is not writable", advice)
    except OSError as error:
        return Finding(check, "broken", str(folder), f"cannot be looked at: {error.strerror}", advice)
    mode = stat.S_IMODE(found.st_mode)
    shown = f"{folder} (mode {mode:04o})"
    if not stat.S_ISDIR(found.st_mode):
        return Finding(check, "broken", shown, "is not a folder", "remove it, or set OUTLIVE_HOME")
    if found.st_uid != os.getuid():
        return Finding(
            check, "broken", shown, f"belongs to user {found.st_uid}, not to you ({os.getuid()})", advice
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Finding(check, "broken", shown, "is not writable for you", advice)
    if mode & 0o077:
        meaning = "others may look into it; the next broker closes it to them"
        return Finding(check, "warning", shown, meaning, f"chmod 700 {folder}")
    return Finding(check, "ok", shown, "yours, and closed to others")


def _configuration(paths: Paths) -> Finding:
    try:
        config.load(paths.config)
    except OutliveError as error:
        return Finding(
            "configuration", "broken", str(error), "no broker starts with it", "correct or remove the file"
        )
    found = str(paths.config) if paths.config.exists() else f"no {paths.config}"
    return Finding("configuration", "ok", found, "the defaults hold where it says nothing")


def _broker(paths: Paths) -> Finding:
    import asyncio
    from importlib import metadata

    from ..common.client import connect

    async def ask() -> dict[str, Any]:
        async with asyncio.timeout(5), connect(paths, start=False) as host:
            return await host.status()

    try:
        status = asyncio.run(ask())
    except Unavailable as error:
        if not paths.channel.exists():
            return Finding("broker", "ok", "none runs", "the first command that needs it starts it")
        meaning = "a socket is there, but nobody answers; if a broker has died, the next command starts another"
        return Finding("broker", "warning", str(error), meaning, f"run `outlive up`; see {paths.log}")
    except (TimeoutError, OutliveError, OSError) as error:
        found = str(error) or "no answer within 5 s"
        advice = f"see {paths.log}; it may be stopped (kill -CONT) or stuck"
        return Finding("broker", "broken", found, "it runs, but does not answer", advice)
    ours = metadata.version("outlive")
    mode = status["transcript_mode"]
    found = f"pid {status['broker_pid']}, version {status['version']}, transcripts {mode}"
    if status["version"] != ours:
        advice = "end it when no process needs it (`outlive down`); the next command starts the new one"
        return Finding("broker", "warning", found, f"it is not of this version, {ours}", advice)
    if mode != "spliced":
        meaning = "it copies output: a crash may lose what is in flight"
        return Finding(
            "broker", "warning", found, meaning, "see `splice from a terminal`, and `pump` in the configuration"
        )
    return Finding("broker", "ok", found, "it runs and answers")
