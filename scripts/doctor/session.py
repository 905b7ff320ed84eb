"""Whether a logout takes the broker, and all it holds, along.

Who is in the cgroup of a login is killed with it, if logind is told so (`KillUserProcesses=`).  Who is under the
user's own systemd (`user@UID.service`) is killed when that ends: with the last logout, unless the user lingers.
Then /run/user/UID goes too, with our sockets, wherever the broker is.  A service, or a container, takes along
what it has started when it ends.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...common.paths import Paths
from .finding import Finding
from .limits import cgroups

Place = Literal["login", "user manager", "service", "container", "machine"]

# Seconds that logind may take to answer.
_PATIENCE = 0.3
# Where logind looks for its configuration; the first that has the file of a name counts.
_FOLDERS = ("/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd")
# What container managers leave for those inside to see.
_CONTAINED = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")
_YES = ("1", "yes", "y", "true", "t", "on")


@dataclass(frozen=True, slots=True)
class Logind:
    """What logind's configuration says about a user's processes."""

    kill: bool = False
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ("root",)

    def kills(self, user: str) -> bool:
        """Tell whether the end of a login ends this user's processes in it."""
        return self.kill and user not in self.exclude and (not self.only or user in self.only)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known.

    cgroup   the path, in systemd's hierarchy, of the broker, or of ourselves.
    whose    whose cgroup it is, for a sentence.
    booted   whether systemd runs this machine.
    linger   `None`: not known.
    runtime  whether our runtime folder is under /run/user.
    contained  whether this is a container, whose cgroups may look like those of a machine.
    """

    user: str
    cgroup: str
    whose: str
    booted: bool
    linger: bool | None
    runtime: bool
    logind: Logind
    contained: bool = False


def place_of(cgroup: str) -> Place:
    """Return what a cgroup's end depends on."""
    parts = [part for part in cgroup.split("/") if part]
    if any(
        re.match(r"(docker|libpod|crio|cri-containerd|kubepods|lxc|machine|garden|buildkit)", part)
        for part in parts
    ):
        return "container"
    if any(re.fullmatch(r"user@\d+\.service", part) for part in parts):
        return "user manager"
    if any(re.fullmatch(r"session-.+\.scope", part) for part in parts):
        return "login"
    return "service" if any(part.endswith(".service") for part in parts) else "machine"


def examine(facts: Facts) -> Iterator[Finding]:
    """Do all checks of this module."""
    yield check_cgroup(facts)
    yield check_killing(facts)
    yield check_linger(facts)


def check_cgroup(facts: Facts) -> Finding:
    """Say what takes the broker's cgroup along."""
    check, found = "cgroup", f"{facts.cgroup}, of {facts.whose}"
    if not facts.cgroup:
        return Finding(check, "note", "not known", "what takes the broker along cannot be told")
    advice = "`outlive broker install` makes it a service of its own; and `loginctl enable-linger`"
    unit = facts.cgroup.rstrip("/").rpartition("/")[2]
    place = place_of(facts.cgroup)
    match "container" if facts.contained and place == "machine" else place:
        case "login":
            if facts.logind.kills(facts.user):
                meaning = "a login's: the logout kills the broker and everything it holds"
                return Finding(check, "warning", found, meaning, advice)
            return Finding(check, "ok", found, "a login's, which ends without killing what runs in it")
        case "user manager":
            if facts.linger:
                return Finding(check, "ok", found, "the user manager's, which stays after the logout")
            if unit.endswith(".scope"):
                meaning = "of a program of a login: it is killed when the user manager ends, with the last logout"
            else:
                meaning = "the user manager's: it is killed when that ends, with the last logout"
            return Finding(check, "warning", found, meaning, "loginctl enable-linger")
        case "service" if not unit.startswith("outlive"):
            meaning = "of another service, which kills the broker too when it stops, unless it has KillMode=process"
            return Finding(check, "warning", found, meaning, "start it elsewhere, or `outlive broker install`")
        case "container":
            return Finding(check, "note", found, "a container's: nothing outlives that")
        case _:
            return Finding(check, "ok", found, "no login takes it along")


def check_killing(facts: Facts) -> Finding:
    """Say what logind does at a logout."""
    check = "KillUserProcesses"
    if not facts.booted:
        return Finding(check, "ok", "no systemd", "this machine is not run by systemd; no logind ends anything")
    found = (
        ("yes" if facts.logind.kill else "no")
        + f", for {facts.user}: "
        + ("killed" if facts.logind.kills(facts.user) else "left alone")
    )
    if facts.logind.kills(facts.user):
        meaning = "a broker that is started from a login dies with it"
        advice = "`outlive broker install`; or KillExcludeUsers= in logind.conf"
        # The warning is that of the cgroup: here the broker may be elsewhere.
        return Finding(check, "note", found, meaning, advice)
    return Finding(check, "ok", found, "what runs in a login goes on after it")


def check_linger(facts: Facts) -> Finding:
    """Say whether the user's systemd and runtime folder stay."""
    if not facts.booted:
        return Finding("lingering", "ok", "no systemd", "nothing ends with the last logout")
    if facts.linger is None:
        return Finding("lingering", "note", "not known", "logind does not say", "loginctl show-user")
    if facts.linger:
        return Finding("lingering", "ok", "yes", "the user's systemd and runtime folder stay after the last logout")
    if facts.runtime:
        meaning = (
            "the last logout removes /run/user/UID and our sockets in it: what is held cannot be reached any more"
        )
        return Finding("lingering", "warning", "no", meaning, "loginctl enable-linger")
    return Finding("lingering", "ok", "no", "our runtime folder is elsewhere, and stays")


# Gathering the facts.


def parse_logind(main: str, drop_ins: Iterable[str]) -> Logind:
    """Understand logind's main file and its drop-ins, in their order; later ones win.

    What the main file has as a comment is the default that this logind was built with.
    """
    found: dict[str, str] = {}
    for name, value in re.findall(r"^#\s*(KillUserProcesses)=(.*)$", main, re.MULTILINE):
        found[name] = value
    for text in (main, *drop_ins):
        section = ""
        for line in text.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("["):
                section = line
            elif section == "[Login]" and line[:1] not in ("#", ";"):
                name, is_one, value = line.partition("=")
                if is_one:
                    found[name.strip()] = value.strip()
    return Logind(
        found.get("KillUserProcesses", "no").strip().lower() in _YES,
        tuple(found.get("KillOnlyUsers", "").split()),
        tuple(found.get("KillExcludeUsers", "root").split()),
    )


def read_logind(folders: Iterable[str] = _FOLDERS) -> Logind:
    """Read logind's configuration as it does: one main file, and drop-ins by name wherever they are."""
    main, drop_ins = "", dict[str, str]()
    for folder in reversed(list(folders)):
        with suppress(OSError):
            main = Path(folder, "logind.conf").read_text(encoding="utf-8", errors="replace")
        with suppress(OSError):
            for path in Path(folder, "logind.conf.d").iterdir():
                if path.name.endswith(".conf"):
                    with suppress(OSError):  # a link to /dev/null, which hides one, is empty
                        drop_ins[path.name] = path.read_text(encoding="utf-8", errors="replace")
    return parse_logind(main, [drop_ins[name] for name in sorted(drop_ins)])


def parse_properties(text: str) -> Mapping[str, str]:
    """Understand what `loginctl show-user` prints."""
    return {name: value for name, is_one, value in (line.partition("=") for line in text.splitlines()) if is_one}


def _lingers(user: str, booted: bool) -> bool | None:
    if not booted:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["loginctl", "show-user", "--property=Linger", "--", user]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
        if (said := parse_properties(done.stdout).get("Linger")) is not None:
            return said == "yes"
    # Of a user who is not logged in logind says nothing; this file is its own note.
    with suppress(OSError):
        return Path("/var/lib/systemd/linger", user) in Path("/var/lib/systemd/linger").iterdir()
    return False


def probe(paths: Paths, broker: int | None) -> Facts:
    """Gather the facts about process `broker`, or about ourselves."""
    text = ""
    for pid in (broker, "self"):
        if pid and not text:
            with suppress(OSError):
                text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
                whose = f"the broker (pid {pid})" if pid != "self" else "this shell, which a new broker would share"
    groups = cgroups(text)
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    booted = Path("/run/systemd/system").is_dir()
    return Facts(
        user=user,
        cgroup=groups.get("systemd") or groups.get("", ""),
        whose=whose if text else "nobody we can see",
        booted=booted,
        linger=_lingers(user, booted),
        runtime=str(paths.run).startswith("/run/user/"),
        logind=read_logind(),
        contained=any(Path(name).exists() for name in _CONTAINED),
    )
