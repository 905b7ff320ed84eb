"""Our folders and the configuration: whose they are, who may look into them, whether they can be written to.

What is in the runtime folder decides whom we talk to, so each folder has to be this user's alone.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...common import config
from ...common.errors import OutliveError
from ...common.paths import Paths, is_utf8
from .finding import Finding

# Bytes and files that should be free for journal, log and sockets.
_FREE_LOW = 16 << 20
_FREE_NONE = 1 << 20
_FILES_LOW = 100
# File systems that the kernel makes up: whatever their modes say, no folder is made there.
_MADE_UP = ("proc", "sysfs", "cgroup", "cgroup2", "devpts", "securityfs", "debugfs", "tracefs", "bpf")
# File systems of other machines, on which neither locks nor SQLite's WAL can be trusted.
_REMOTE = ("nfs", "cifs", "smb", "afs", "ceph", "9p", "glusterfs", "lustre", "fuse.sshfs")
# Bytes that a socket's path may have.
_SOCKET_PATH_MAX = 107
_ADVICE = "make it yours and writable, or set OUTLIVE_HOME to a folder that is"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one folder or file.

    parent     of one that does not exist: the nearest folder that does, and whether we may write there.
    trouble    why it cannot be looked at.
    links      symbolic links on the way to it whose owner is neither us nor root.
    writable   by us, by its mode and its file system.
    read_only  its file system is mounted so.
    kind       of the file system, as the kernel calls it.
    free       bytes, and files, for users without privileges; `None` where the file system does not count.
    """

    path: Path
    exists: bool = True
    parent: tuple[Path, bool] | None = None
    trouble: str = ""
    is_folder: bool = True
    owner: int = 0
    user: int = 0
    mode: int = 0o700
    links: tuple[Path, ...] = ()
    writable: bool = True
    read_only: bool = False
    kind: str = ""
    free: int | None = None
    free_files: int | None = None


def check_folder(check: str, facts: Facts) -> Finding:
    """Say whether a folder will do; the worst that is wrong with it is what is told."""
    path, shown = facts.path, f"{facts.path} (mode {facts.mode:04o})"
    if not is_utf8(path):
        return Finding(
            check,
            "error",
            repr(os.fsencode(path)),
            "its name is not UTF-8, or the locale is not",
            "set OUTLIVE_HOME",
        )
    if facts.trouble:
        return Finding(check, "error", str(path), f"cannot be looked at: {facts.trouble}", _ADVICE)
    if facts.links:
        link = facts.links[0]
        meaning = f"it is reached through {link}, a link that belongs to somebody else, who can point it elsewhere"
        return Finding(check, "error", str(path), meaning, f"remove {link}, or set OUTLIVE_HOME")
    if not facts.exists:
        return _check_missing(check, facts)
    if not facts.is_folder:
        return Finding(check, "error", shown, "is not a folder", "remove it, or set OUTLIVE_HOME")
    if facts.owner != facts.user:
        meaning = f"belongs to user {facts.owner}, not to you ({facts.user})"
        return Finding(check, "error", shown, meaning, _ADVICE)
    if facts.read_only:
        return Finding(check, "error", shown, "its file system is mounted read-only", _ADVICE)
    if not facts.writable:
        return Finding(check, "error", shown, "is not writable for you", f"chmod 700 {path}")
    if (full := _check_room(check, shown, facts)) is not None:
        return full
    if facts.kind.startswith(_REMOTE):
        meaning = f"is on {facts.kind}: locks and the journal are not safe there, and it may hang with its server"
        return Finding(check, "warning", shown, meaning, "set OUTLIVE_HOME or XDG_STATE_HOME to a local folder")
    if facts.mode & 0o077:
        meaning = "others may look into it; the next broker closes it to them"
        return Finding(check, "warning", shown, meaning, f"chmod 700 {path}")
    return Finding(check, "ok", shown, "yours, closed to others, and there is room")


def _check_missing(check: str, facts: Facts) -> Finding:
    parent, writable = facts.parent or (Path("/"), False)
    if writable:
        return Finding(check, "ok", str(facts.path), "does not exist yet; it is made when it is needed")
    meaning = f"cannot be made: {parent} is not a folder that you can write to"
    return Finding(check, "error", str(facts.path), meaning, _ADVICE)


def _check_room(check: str, shown: str, facts: Facts) -> Finding | None:
    advice = "free some, or set OUTLIVE_HOME to a folder with room"
    if facts.free is not None and facts.free < _FREE_LOW:
        found = f"{shown}, {facts.free >> 10} KiB free"
        if facts.free < _FREE_NONE:
            return Finding(check, "error", found, "its file system is full: what ends cannot be recorded", advice)
        return Finding(check, "warning", found, "its file system is nearly full", advice)
    if facts.free_files is not None and facts.free_files < _FILES_LOW:
        meaning = "its file system has hardly any inodes left, so that files cannot be made"
        return Finding(check, "warning", f"{shown}, {facts.free_files} files free", meaning, advice)
    return None


def check_configuration(path: Path, trouble: str, facts: Facts) -> Finding:
    """Say whether the configuration can be read, and whether it is only ours to write."""
    check = "configuration"
    if trouble:
        return Finding(check, "error", trouble, "no broker or worker starts with it", "correct or remove the file")
    if not facts.exists:
        return Finding(check, "ok", f"no {path}", "the defaults hold")
    shown = f"{path} (mode {facts.mode:04o})"
    if facts.owner not in (facts.user, 0):
        meaning = f"belongs to user {facts.owner}, who can change it"
        return Finding(check, "warning", shown, meaning, "replace it by a file of your own")
    if facts.mode & 0o022:
        return Finding(check, "warning", shown, "others can write to it", f"chmod go-w {path}")
    return Finding(check, "ok", shown, "the defaults hold where it says nothing")


def check_configuration_folder(facts: Facts) -> Finding:
    """Say whether others can put a configuration, or with OUTLIVE_HOME folders, in place of ours."""
    check, shown = "configuration folder", f"{facts.path} (mode {facts.mode:04o})"
    if not facts.exists:
        return Finding(check, "ok", str(facts.path), "does not exist, nor has to")
    if facts.owner not in (facts.user, 0):
        meaning = f"belongs to user {facts.owner}, who can replace what is in it"
        return Finding(check, "warning", shown, meaning, "set OUTLIVE_HOME or XDG_CONFIG_HOME to a folder of yours")
    if facts.mode & 0o022 and not facts.mode & stat.S_ISVTX:
        return Finding(check, "warning", shown, "others can replace what is in it", f"chmod go-w {facts.path}")
    return Finding(check, "ok", shown, "nobody else can replace what is in it")


def check_path(socket: Path) -> Finding:
    """Say whether the sockets' paths fit into the kernel's limit."""
    length = len(os.fsencode(socket))
    found = f"{length} bytes"
    if length > _SOCKET_PATH_MAX:
        meaning = f"more than the kernel's {_SOCKET_PATH_MAX}: the sockets are reached by way of /proc, which works"
        return Finding("socket paths", "note", found, meaning, "a shorter OUTLIVE_HOME makes it simpler")
    return Finding("socket paths", "ok", found, "short enough for the kernel")


# Gathering the facts.


def probe(paths: Paths) -> Iterator[Finding]:
    """Look at all of ours."""
    mounts = _mounts()
    yield check_folder("runtime folder", look(paths.run, mounts))
    yield check_folder("state folder", look(paths.state, mounts))
    trouble = ""
    try:
        config.load(paths.config)
    except OutliveError as error:
        trouble = str(error)
    yield check_configuration_folder(look(paths.config.parent, mounts))
    yield check_configuration(paths.config, trouble, look(paths.config, mounts))
    yield check_path(max((paths.control, paths.channel, paths.events), key=lambda path: len(os.fsencode(path))))


def look(path: Path, mounts: dict[str, str]) -> Facts:
    """Gather the facts about one folder or file; changes nothing."""
    user = os.getuid()
    links = tuple(link for link in _links(path) if link.lstat().st_uid not in (user, 0))
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        parent = next((above for above in path.parents if above.exists()), Path("/"))
        makeable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) and not path.is_symlink()
        makeable = makeable and kind_of(parent, mounts) not in _MADE_UP
        return Facts(path, exists=False, parent=(parent, makeable), user=user, links=links)
    except OSError as error:
        return Facts(path, trouble=error.strerror or str(error), user=user)
    free = free_files = None
    read_only = False
    try:
        system = os.statvfs(path)
        read_only = bool(system.f_flag & os.ST_RDONLY)
        free = system.f_bavail * system.f_frsize if system.f_blocks else None
        free_files = system.f_favail if system.f_files else None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EACCES):
            return Facts(path, trouble=error.strerror or str(error), user=user)
    return Facts(
        path,
        is_folder=stat.S_ISDIR(found.st_mode),
        owner=found.st_uid,
        user=user,
        mode=stat.S_IMODE(found.st_mode),
        links=links,
        # By the mode too: for root every folder is writable, and still has a mode that says something else.
        writable=os.access(path, os.R_OK | os.W_OK | os.X_OK) and found.st_mode & 0o700 == 0o700,
        read_only=read_only,
        kind=kind_of(path, mounts),
        free=free,
        free_files=free_files,
    )


def _links(path: Path) -> Iterator[Path]:
    for step in (path, *path.parents):
        with suppress(OSError):
            if step.is_symlink():
                yield step


def kind_of(path: Path, mounts: dict[str, str]) -> str:
    """Return the kind of the file system at `path`, by its real name; empty when it is not known."""
    real = Path(os.path.realpath(path))
    return next((mounts[str(step)] for step in (real, *real.parents) if str(step) in mounts), "")


def parse_mounts(text: str) -> dict[str, str]:
    """Return mount point → kind from /proc/self/mountinfo; of several at one place the last is seen."""
    found = {}
    for line in text.splitlines():
        head, dash, tail = line.partition(" - ")
        words, kind = head.split(" "), tail.partition(" ")[0]
        if dash and len(words) >= 5:
            # The kernel writes blanks and backslashes of names in octal.
            name = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
            found[name] = kind
    return found


def _mounts() -> dict[str, str]:
    try:
        return parse_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return {}
