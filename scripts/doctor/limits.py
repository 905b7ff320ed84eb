"""How many processes fit: descriptors, pipes, memory files, tasks, and the settings that change what they cost.

Where a broker runs, its own limits count, and those of its cgroup; else those that one would inherit from here.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ...common import launch
from ...common.config import Config
from ...common.descriptors import ROLES
from ...common.notify import STORE_MAX
from ...common.transcript import Limits as Kept
from .finding import Finding, Severity

# Descriptors that the broker keeps free (`broker.loop.RESERVE`).
RESERVE = 64
# Processes that should fit: one thread full of them (`max_processes`), and a few more threads.
_WANTED = 256
_FEW = 64
# A process on a terminal has a conduit of 4 pages of 4 KiB (`worker.spawner.CONDUIT_SIZE`).
_PIPE_PAGES = 4
_CONDUIT_SIZE = 16 << 10
# Bytes of memory that a full transcript takes.
_TRANSCRIPT_MAX = Kept().head + Kept().tail + Kept().unread + Kept().slack
# Messages that should fit into the keeper's queue, so that a burst of deposits does not have to wait.
_QUEUE = 32
_UNLIMITED = resource.RLIM_INFINITY

_SETTINGS = {
    "pipe-user-pages-soft": "/proc/sys/fs/pipe-user-pages-soft",
    "pipe-user-pages-hard": "/proc/sys/fs/pipe-user-pages-hard",
    "pipe-max-size": "/proc/sys/fs/pipe-max-size",
    "file-nr": "/proc/sys/fs/file-nr",
    "pty-max": "/proc/sys/kernel/pty/max",
    "pty-nr": "/proc/sys/kernel/pty/nr",
    "memfd_noexec": "/proc/sys/vm/memfd_noexec",
    "shmem_enabled": "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "max_dgram_qlen": "/proc/sys/net/unix/max_dgram_qlen",
    "meminfo": "/proc/meminfo",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known; limits are (soft, hard), and a setting that the kernel does not have is missing.

    whose       whose limits these are, for a sentence.
    privileged  the user is root, whom limits on pipes and processes do not bind.
    tasks       threads that this user has by now.
    pids        of the tightest cgroup: (tasks there, its limit).
    memory      of the tightest cgroup: bytes.
    """

    whose: str
    privileged: bool
    files: tuple[int, int]
    file_size: tuple[int, int]
    processes: tuple[int, int]
    tasks: int
    pids: tuple[int, int] | None = None
    memory: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    max_processes: int = Config().max_processes

    def number(self, name: str) -> int | None:
        """Return a setting that is one number, `None` when it is missing or something else."""
        text = self.settings.get(name, "")
        return int(text) if text.isascii() and text.isdecimal() else None


def examine(facts: Facts) -> Iterator[Finding]:
    """Do all checks of this module."""
    yield check_files(facts)
    yield check_all_files(facts)
    yield check_file_size(facts)
    yield check_tasks(facts)
    yield check_pids(facts)
    yield check_pipe_pages(facts)
    yield check_pipe_size(facts)
    yield check_terminals(facts)
    yield check_noexec(facts)
    yield check_huge_pages(facts)
    yield check_memory(facts)
    yield check_queue(facts)


def fitting(hard: int) -> int:
    """Return how many processes fit with this limit on open files, and into the keeper's store.

    To start a broker with all that it holds, the keeper needs two numbers for each descriptor.
    """
    left = STORE_MAX if hard == _UNLIMITED else min(hard // 2 - RESERVE, STORE_MAX)
    return max(0, left) // len(ROLES)


def _room(count: int, wanted: int = _WANTED) -> Severity:
    """Return how bad it is that no more than `count` processes fit."""
    return "error" if count < 1 else "warning" if count < wanted else "ok"


def check_files(facts: Facts) -> Finding:
    """Open files: the broker raises its soft limit to the hard one."""
    soft, hard = facts.files
    count = fitting(hard)
    bound = "the keeper's store" if hard == _UNLIMITED or hard // 2 - RESERVE >= STORE_MAX else "the hard limit"
    meaning = f"{bound} has room for {count} processes ({len(ROLES)} descriptors each, twice while a broker starts)"
    severity = _room(count, min(_WANTED, 2 * facts.max_processes))
    advice = "raise the hard limit (LimitNOFILE= of the unit, /etc/security/limits.conf), then restart the broker"
    found = f"soft {_shown(soft)}, hard {_shown(hard)} of {facts.whose}"
    return Finding("open files", severity, found, meaning, "" if severity == "ok" else advice)


def check_all_files(facts: Facts) -> Finding:
    """Open files of the whole machine."""
    check = "open files of the machine"
    words = facts.settings.get("file-nr", "").split()
    if len(words) != 3 or not all(word.isascii() and word.isdecimal() for word in words):
        return Finding(check, "ok", "not known", "the kernel does not say")
    used, limit = int(words[0]), int(words[2])
    found = f"{used} of {limit}"
    if limit and used > limit - limit // 10:
        meaning = "nearly all are taken: soon nobody on this machine can open anything"
        return Finding(check, "warning", found, meaning, "raise fs.file-max, or find out who takes them")
    return Finding(check, "ok", found, "enough are left")


def check_file_size(facts: Facts) -> Finding:
    """RLIMIT_FSIZE applies to transcripts, whose offsets only grow."""
    _, hard = facts.file_size
    found = f"hard limit {_shown(hard)} bytes of {facts.whose}" if hard != _UNLIMITED else "unlimited"
    if hard == _UNLIMITED:
        return Finding("file size", "ok", found, "a process may print without end")
    meaning = "a process that has printed as much is stopped there: its further output waits for ever"
    severity: Severity = "error" if hard < 1 << 20 else "warning"
    return Finding("file size", severity, found, meaning, "raise the hard limit (`ulimit -Hf`, LimitFSIZE=)")


def check_tasks(facts: Facts) -> Finding:
    """RLIMIT_NPROC: our soft limit stays as it was."""
    soft, _ = facts.processes
    found = f"{facts.tasks} of {_shown(soft)} that this user may have"
    if facts.privileged or soft == _UNLIMITED:
        return Finding("tasks of the user", "ok", found, "no limit applies")
    advice = "end what is not needed, or raise the limit (`ulimit -u`, LimitNPROC=, limits.conf)"
    return _tasks("tasks of the user", found, soft - facts.tasks, advice)


def check_pids(facts: Facts) -> Finding:
    """The same limit of a cgroup."""
    check = "tasks of the cgroup"
    if facts.pids is None:
        return Finding(check, "ok", "no limit", f"the cgroup of {facts.whose} does not limit how many run")
    used, limit = facts.pids
    found = f"{used} of {limit} in the cgroup of {facts.whose}"
    return _tasks(
        check, found, limit - used, "raise it (TasksMax= of the unit or slice, `--pids-limit` of a container)"
    )


def _tasks(check: str, found: str, left: int, advice: str) -> Finding:
    if left <= 8:  # a worker and its spawner take five
        return Finding(check, "error", found, "nothing more can be started", advice)
    if left < _FEW:
        return Finding(check, "warning", found, f"{left} more can be started, threads counted", advice)
    return Finding(check, "ok", found, "enough can be started")


def check_pipe_pages(facts: Facts) -> Finding:
    """Pages of pipes that one user may have."""
    check = "pages of pipes"
    soft, hard = facts.number("pipe-user-pages-soft"), facts.number("pipe-user-pages-hard")
    found = f"pipe-user-pages-soft {_shown(soft)}, pipe-user-pages-hard {_shown(hard)}"
    if facts.privileged:
        return Finding(check, "ok", found, "they do not bind root")
    if hard and (count := hard // _PIPE_PAGES) < _WANTED:
        meaning = (
            f"no more than {count} processes on terminals can have their pipes; further ones cannot be started"
        )
        return Finding(check, _room(count), found, meaning, "raise it: sysctl fs.pipe-user-pages-hard=0 (no limit)")
    if not soft:
        return Finding(check, "ok", found, "pipes are not limited")
    count = soft // _PIPE_PAGES
    meaning = f"about {count} processes on terminals get pipes of full size, further ones small and slower pipes"
    if count < _FEW:
        return Finding(check, "warning", found, meaning, "raise it: sysctl fs.pipe-user-pages-soft=16384")
    return Finding(check, "ok", found, f"{meaning}; nothing is lost by that")


def check_pipe_size(facts: Facts) -> Finding:
    """The size that a conduit may have."""
    size = facts.number("pipe-max-size")
    if size is not None and size < _CONDUIT_SIZE and not facts.privileged:
        meaning = f"smaller than a conduit's {_CONDUIT_SIZE} bytes: it works, slower"
        return Finding("pipe-max-size", "note", str(size), meaning, "sysctl fs.pipe-max-size=1048576")
    return Finding("pipe-max-size", "ok", _shown(size), "a conduit can have its size")


def check_terminals(facts: Facts) -> Finding:
    """Terminals of the whole machine."""
    used, limit = facts.number("pty-nr"), facts.number("pty-max")
    if used is None or limit is None:
        return Finding("pseudo-terminals", "ok", "not known", "the kernel does not say")
    severity = _room(limit - used, _FEW)
    meaning = "enough are left" if severity == "ok" else f"{max(0, limit - used)} are left, for everybody"
    advice = "" if severity == "ok" else "raise it: sysctl kernel.pty.max=4096"
    return Finding("pseudo-terminals", severity, f"{used} of {limit} of the machine", meaning, advice)


def check_noexec(facts: Facts) -> Finding:
    """`vm.memfd_noexec`."""
    value = facts.number("memfd_noexec")
    meanings = {
        None: "this kernel has no such setting, and makes no difference",
        0: "transcripts are made unexecutable because we ask for it",
        1: "all memory files are unexecutable unless asked otherwise; ours are anyway",
        2: "memory files that could be executed are refused; ours cannot, and are made",
    }
    return Finding("vm.memfd_noexec", "ok", _shown(value), meanings.get(value, "unknown to this version"))


def check_huge_pages(facts: Facts) -> Finding:
    """Huge pages for memory files."""
    chosen = facts.settings.get("shmem_enabled", "").partition("[")[2].partition("]")[0]
    if chosen in ("always", "force"):
        meaning = "every transcript takes 2 MiB of memory or more, however short"
        advice = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (as root)"
        return Finding("shmem_enabled", "warning", chosen, meaning, advice)
    return Finding(
        "shmem_enabled", "ok", chosen or "not set", "transcripts take the memory that their output needs"
    )


def check_memory(facts: Facts) -> Finding:
    """Transcripts are charged to the cgroup of whoever pumps, and reclaimed only into swap."""
    swap = _meminfo(facts.settings.get("meminfo", ""), "SwapTotal")
    swapped = (
        "there is no swap to put idle transcripts into" if swap == 0 else "idle transcripts can be swapped out"
    )
    if facts.memory is None:
        return Finding("memory", "ok", f"no limit on the cgroup of {facts.whose}", swapped)
    count = facts.memory // 2 // _TRANSCRIPT_MAX
    found = f"{facts.memory >> 20} MiB for the cgroup of {facts.whose}"
    meaning = f"half of it holds the full transcripts of {count} processes; {swapped}"
    if count < facts.max_processes:
        advice = "raise it (MemoryMax=, `--memory`), or the kernel ends processes there when it is used up"
        return Finding("memory", "warning", found, meaning, advice)
    return Finding("memory", "ok", found, meaning)


def _meminfo(text: str, name: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if key == name and words and words[0].isdecimal():
            return int(words[0])
    return None


def check_queue(facts: Facts) -> Finding:
    """The queue of the keeper's datagram socket."""
    length = facts.number("max_dgram_qlen")
    if length is not None and length < _QUEUE:
        meaning = "the keeper takes few messages at once: a broker that starts many processes waits for it"
        return Finding("max_dgram_qlen", "note", str(length), meaning, "sysctl net.unix.max_dgram_qlen=512")
    return Finding("max_dgram_qlen", "ok", _shown(length), "the keeper's queue is long enough")


def _shown(value: int | None) -> str:
    return "unknown" if value is None else "unlimited" if value == _UNLIMITED else str(value)


# Gathering the facts.


def probe(broker: int | None, tasks: int, config: Config) -> Facts:
    """Gather the facts about process `broker`, or about ourselves."""
    pid = broker or os.getpid()
    try:
        limits = [resource.prlimit(pid, which) for which in _LIMITS]
    except (OSError, ValueError):  # gone by now, or not ours to ask
        broker, pid = None, os.getpid()
        limits = [resource.getrlimit(which) for which in _LIMITS]
    if broker is None:  # ours may have been raised already, if it is one of ours that has started us
        original = launch.original_limits()
        limits = [original.get(which, pair) for which, pair in zip(_LIMITS, limits, strict=True)]
    groups = cgroups(_read(f"/proc/{pid}/cgroup"))
    return Facts(
        whose=f"the broker (pid {broker})" if broker else "this shell",
        privileged=os.geteuid() == 0,
        files=limits[0],
        file_size=limits[1],
        processes=limits[2],
        tasks=tasks,
        pids=_tightest(groups, "pids", "pids.max", "pids.current"),
        memory=_memory(groups),
        settings={name: text for name, path in _SETTINGS.items() if (text := _read(path))},
        max_processes=config.max_processes,
    )


_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)
_CGROUPS = Path("/sys/fs/cgroup")


def cgroups(text: str) -> dict[str, str]:
    """Return controller → path from /proc/PID/cgroup; the unified hierarchy has the empty name."""
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and number.isdecimal():
            for name in controllers.split(","):
                found[name.removeprefix("name=")] = path.removesuffix(" (deleted)")
    return found


def _folders(groups: Mapping[str, str], controller: str) -> Iterator[Path]:
    """Yield a process's cgroup and those above it, in either version's hierarchy."""
    for name, roots in ((controller, [_CGROUPS / controller]), ("", [_CGROUPS, _CGROUPS / "unified"])):
        if name in groups:
            # Outside our cgroup namespace a path starts with `/..`: what it names cannot be seen.
            parts = [part for part in groups[name].split("/") if part and part != ".."]
            for root in roots:
                for length in range(len(parts), -1, -1):
                    yield root.joinpath(*parts[:length])


def _tightest(groups: Mapping[str, str], controller: str, limit: str, usage: str) -> tuple[int, int] | None:
    """Return (used, limit) of the cgroup with the least room."""
    found = []
    for folder in _folders(groups, controller):
        most, used = _read(str(folder / limit)), _read(str(folder / usage))
        if most.isdecimal() and used.isdecimal():
            found.append((int(used), int(most)))
    return min(found, key=lambda pair: pair[1] - pair[0], default=None)


def _memory(groups: Mapping[str, str]) -> int | None:
    """Return the least memory limit; version 1 says `no limit` by a number larger than any memory."""
    found = []
    for folder in _folders(groups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(str(folder / name))
            if text.isdecimal() and int(text) < 1 << 60:
                found.append(int(text))
    return min(found, default=None)


def _read(path: str) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text(encoding="ascii").strip()
    return ""
