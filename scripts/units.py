"""The text of a systemd unit for the broker, and why each setting is there.  Renders; does nothing.

What systemd has to keep for us is its *file descriptor store*: copies of every descriptor that the keeper passed
up, given to the next keeper.  Most settings below say that the end of the keeper is the end of nothing else, and
that systemd never gives up on it.

Always true
    No text from outside can become a setting: values are quoted, and what no unit can hold is refused.
    No watchdog: it needs a timer in the keeper, which is to sleep, and kills what is slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..broker.keeper import NEEDED
from ..common.errors import BadRequest
from ..common.notify import STORE_MAX
from ..common.unit import RUN, SERVES

# Since when a stopped unit's store can be kept (`systemctl stop`, a package that stops and starts).
PRESERVE_SINCE = 254


@dataclass(frozen=True, slots=True)
class Service:
    """What differs from one installation to the next."""

    command: Sequence[str]
    run: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    # Of a system unit: whom it runs as.  `None`: a user unit.
    uid: int | None = None
    # The manager's version, such as 252.
    systemd: int = PRESERVE_SINCE


def render(service: Service) -> str:
    """Return the unit's text; raises `BadRequest` for a value that cannot be in one."""
    system = service.uid is not None
    unit = [
        ("Description", "outlive: processes that outlive their agents"),
        # Never give up: a unit that failed has lost its store.
        ("StartLimitIntervalSec", "0"),
    ]
    if system and service.run.is_relative_to(f"/run/user/{service.uid}"):
        # That folder is there while somebody is logged in, unless somebody wants it.
        unit += [(key, f"user-runtime-dir@{service.uid}.service") for key in ("Wants", "After")]
    program, *arguments = service.command
    settings = [
        # Started when it answers, and it may store descriptors; only the keeper may speak for the unit.
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("ExecStart", " ".join([_quoted(program), *(_argument(word) for word in arguments)])),
        *(("Environment", _quoted(f"{name}={value}")) for name, value in sorted(service.environment.items())),
        *([("User", str(service.uid))] if system else []),
        # As many as the keeper keeps; systemd's default is none at all.
        ("FileDescriptorStoreMax", str(STORE_MAX)),
        *([("FileDescriptorStorePreserve", "yes")] if service.systemd >= PRESERVE_SINCE else []),
        # However the keeper ended, it was not the end of its processes; unless it says that it holds nothing, which
        # is so after `outlive down`.
        ("Restart", "always"),
        ("RestartPreventExitStatus", "0"),
        ("SuccessExitStatus", str(NEEDED)),
        # Nor is its stop or restart: workers and children in the unit's cgroup run on.
        ("KillMode", "process"),
        # One child that met the memory's end: the default would stop the whole unit for it.
        ("OOMPolicy", "continue"),
        # A broker that is slow to find its way through what it was left is not to be killed for it.
        ("TimeoutStartSec", "infinity"),
        # All agents' processes count as this unit's tasks.
        ("TasksMax", "infinity"),
        # The cgroup below is ours: systemd moves nobody in it, and a later worker may have its own.
        ("Delegate", "yes"),
        # The hard limit as high as the manager can give it: we raise our own soft limit to it (`common.launch`).
        # Children are given back the soft one, which is what programs everywhere expect.
        ("LimitNOFILE", "1024:infinity"),
    ]
    install = [("WantedBy", "multi-user.target" if system else "default.target")]
    sections = {"Unit": unit, "Service": settings, "Install": install, SERVES: [(RUN[:-1], _plain(service.run))]}
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key}={value}\n" for key, value in lines) for name, lines in sections.items()
    )


def _plain(path: Path) -> str:
    """Return a path for a line that only we read; raises `BadRequest` when it does not fit on one."""
    text = str(path)
    if not text.isprintable() or text != text.strip():
        raise BadRequest(f"folder {text!r}: a systemd unit cannot name it; set OUTLIVE_HOME to another one")
    return text


def _quoted(text: str) -> str:
    """Return one word of a setting, quoted; `%` would begin one of systemd's own names."""
    if not text.isprintable():
        raise BadRequest(f"{text!r} cannot be in a systemd unit")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _argument(text: str) -> str:
    """Return one word after the program, in which `$` would begin a variable."""
    return _quoted(text).replace("$", "$$")
