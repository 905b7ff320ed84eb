"""What the kernel can, each feature tried on something of our own; and what is missing without it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...common import kernel
from .finding import Finding, Severity

_SPLICE_SINCE = (5, 11)


@dataclass(frozen=True, slots=True)
class Trial:
    """How trying a feature went: `wrong` is empty where it works."""

    wrong: str = ""


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature, and what is so with and without it."""

    name: str
    try_it: Callable[[], bool | None]
    severity: Severity
    present: str
    missing: str
    advice: str


def check_system(name: str, release: str) -> Finding:
    """Say whether this is Linux, and new enough."""
    found = f"{name} {release}"
    if name != "Linux":
        return Finding("kernel", "error", found, "outlive needs Linux", "run it on Linux 5.11 or newer")
    numbers = tuple(int(part) for part in re.findall(r"\d+", release, re.ASCII)[:2])
    if numbers < _SPLICE_SINCE:
        meaning = "older than 5.11: terminals cannot be spliced, so a crash may lose output or repeat input"
        return Finding("kernel", "warning", found, meaning, "use Linux 5.11 or newer, best 6.15")
    return Finding("kernel", "ok", found, "new enough")


def check_feature(feature: Feature, trial: Trial) -> Finding:
    """Say what a trial means."""
    if trial.wrong:
        return Finding(feature.name, feature.severity, trial.wrong, feature.missing, feature.advice)
    return Finding(feature.name, "ok", "works", feature.present)


def attempt(try_it: Callable[[], bool | None]) -> Trial:
    """Try a feature: it is there unless that raises `OSError`, or is false."""
    try:
        return Trial("the kernel does not have it" if try_it() is False else "")
    except (OSError, AttributeError) as error:
        return Trial(str(error) or type(error).__name__)


def probe() -> Iterator[Finding]:
    """Try everything."""
    system = os.uname()
    yield check_system(system.sysname, system.release)
    for feature in FEATURES:
        yield check_feature(feature, attempt(feature.try_it))


def _proc() -> None:
    kernel.boot_id()
    os.listdir("/proc/self/fd")
    Path("/proc/self/environ").read_bytes()
    if kernel.start_time(os.getpid()) is None:
        raise FileNotFoundError("/proc does not show this process")


def _pidfd() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(fd, 0)
        if kernel.pidfd_pid(fd) != os.getpid():
            raise FileNotFoundError("/proc/self/fdinfo does not tell the pid behind a pidfd")
    finally:
        os.close(fd)


def _exit_info() -> bool:
    pid = os.posix_spawn("/bin/sh", ["/bin/sh", "-c", "exit 7"], {})
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
    finally:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    try:
        return kernel.pidfd_exit_status(pidfd) == 7 << 8
    finally:
        os.close(pidfd)


def _memfd() -> None:
    fd = kernel.memfd("doctor")
    try:
        os.ftruncate(fd, 8192)
        os.pwrite(fd, b"x", 0)
        kernel.punch_hole(fd, 0, 4096)
        kernel.seal(fd)
    finally:
        os.close(fd)


def _terminal() -> None:
    for fd in os.openpty():
        os.close(fd)


_SANDBOX = "a sandbox (a container's seccomp filter, gVisor) may forbid it"

FEATURES: tuple[Feature, ...] = (
    Feature(
        "proc",
        _proc,
        "error",
        "processes can be told apart, and found by their mark",
        "without /proc no process can be told from another that got its number later",
        "mount /proc",
    ),
    Feature(
        "pidfd",
        _pidfd,
        "error",
        "a recycled process id is never mistaken for ours",
        "processes cannot be waited for or signalled safely; nothing can be started",
        f"use Linux 5.4 or newer; {_SANDBOX}",
    ),
    Feature(
        "memfd",
        _memfd,
        "error",
        "transcripts can be made, punched and sealed",
        "transcripts are sealed memory files, and none can be made: nothing can be started",
        f"allow memfd_create, fallocate and seals; {_SANDBOX}",
    ),
    Feature(
        "terminals",
        _terminal,
        "error",
        "processes can be started on terminals",
        "no terminal can be opened: `exec --tty` fails",
        "mount devpts on /dev/pts; raise kernel.pty.max if all are taken",
    ),
    Feature(
        "splice from a terminal",
        kernel.can_splice_terminals,
        "warning",
        "transcripts are spliced: no crash of ours loses a byte of output or repeats one of input",
        "transcripts are copied: a crash may lose output that was in flight, or type up to 4 KiB of input twice",
        f"use Linux 5.11 or newer; {_SANDBOX}",
    ),
    Feature(
        "exit status by pidfd",
        _exit_info,
        "warning",
        "exit codes are known also when whoever started the process has died",
        "PIDFD_GET_INFO does not tell it: when several of our processes die at once, an exit code may be `lost`",
        f"use Linux 6.15 or newer; {_SANDBOX}",
    ),
    Feature(
        "subreaper",
        kernel.has_subreapers,
        "warning",
        "processes whose worker died are adopted, and how they end is learned",
        "processes whose worker died are adopted by init, and how they end may be `lost`",
        f"allow prctl(PR_SET_CHILD_SUBREAPER); {_SANDBOX}",
    ),
    Feature(
        "kcmp",
        kernel.has_kcmp,
        "warning",
        "a new broker can tell which of the descriptors it finds are copies of each other",
        "a new broker has to go by their content to tell which of its descriptors are copies of each other",
        f"allow kcmp (the kernel needs CONFIG_KCMP); {_SANDBOX}",
    ),
    Feature(
        "SO_PEERPIDFD",
        kernel.has_peer_pidfd,
        "note",
        "a peer is known by pidfd from its first packet on",
        "a peer is known by its pid, looked up when it connects; a pid recycled in that moment would be mistaken",
        "use Linux 6.5 or newer",
    ),
    Feature(
        "MFD_NOEXEC_SEAL",
        kernel.has_noexec_seal,
        "note",
        "what a program prints into its transcript can never be executed",
        "transcripts are memory files that could be made executable, by this user",
        "use Linux 6.3 or newer",
    ),
)
