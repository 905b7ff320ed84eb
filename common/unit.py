"""The systemd unit of one broker: where it is installed, whom it serves, and how it is asked to start.

    --user     $XDG_CONFIG_HOME/systemd/user/outlive.service      ends with the user's manager, see lingering
    --system   /etc/systemd/system/outlive-UID.service            the machine's manager, running as that user

Each unit names the runtime folder that it serves (`X-Run`, which systemd skips), so that what is installed is seen
in the file itself: there is no second record that could disagree with it, and a broker of another OUTLIVE_HOME has
nothing to do with it.

Always true
    A broker that has a unit is started by systemd and by nobody else.  Between the death of a keeper and systemd's
    next one there is no broker for a moment; one that a client started then would hold the lock against it, and
    what is in systemd's store would be lost.  So there is no falling back: a unit that cannot be started is told.
    A client without the right to start it (a system unit, a user who is not root) only waits: `Restart=always`.

Not here
    What is in a unit, and writing it: `scripts.units`, `scripts.installation`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What names the runtime folder in a unit's file.  systemd skips sections that begin with `X-`.
SERVES = "X-Outlive"
RUN = "Run="

_SYSTEM = Path("/etc/systemd/system")


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit's name and file; the file need not exist."""

    system: bool
    path: Path

    @property
    def name(self) -> str:
        """Return the name that systemd knows it by."""
        return self.path.name

    @property
    def manager(self) -> str:
        """Return the option by which systemd's programs are told whose manager is meant."""
        return "--system" if self.system else "--user"

    def serves(self) -> str | None:
        """Return the runtime folder that the installed unit is for; `None` when it is not there, or not ours."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        except OSError:
            return None
        if f"[{SERVES}]" not in lines:
            return None
        found = (line.removeprefix(RUN) for line in lines[lines.index(f"[{SERVES}]") :] if line.startswith(RUN))
        return next(found, None)

    def systemctl(self, *words: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        """Run `systemctl WORDS` on this unit's manager to its end; asks nobody for a password.

        Raises `FileNotFoundError` where there is no systemd, `subprocess.TimeoutExpired` after `seconds`.
        """
        environment = dict(os.environ)
        environment.setdefault("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")  # absent in cron, in `su`
        return subprocess.run(
            ["systemctl", self.manager, "--no-ask-password", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )

    def start(self, seconds: float) -> str:
        """Have systemd start it, and wait until it has; returns what stood in the way, empty when nothing did.

        Nothing does, too, while systemd goes on trying, or for somebody without the right to start it: then waiting
        is all that can be done.
        """
        try:
            done = self.systemctl("start", self.name, seconds=seconds)
            if done.returncode == 0 or (self.system and os.geteuid() != 0) or self.is_active(seconds):
                return ""
        except FileNotFoundError:
            return "there is no systemctl"
        except subprocess.TimeoutExpired:
            return f"it was not up within {seconds:.0f} s"
        return " ".join(done.stderr.split())

    def is_active(self, seconds: float) -> bool:
        """Tell whether it runs, or is about to; raises as `systemctl` does."""
        state = self.systemctl("is-active", self.name, seconds=seconds).stdout.strip()
        return state in ("active", "activating", "reloading", "deactivating")


def user_unit(environment: Mapping[str, str]) -> Unit:
    """Return the unit of a user's own manager."""
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    folder = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    return Unit(False, folder / "systemd/user/outlive.service")


def system_unit(uid: int) -> Unit:
    """Return the unit of the machine's manager that runs as this user."""
    return Unit(True, _SYSTEM / f"outlive-{uid}.service")


def installed(run: Path, environment: Mapping[str, str] | None = None) -> Unit | None:
    """Return the unit that is installed for the broker of this runtime folder, if there is one."""
    units = system_unit(os.getuid()), user_unit(os.environ if environment is None else environment)
    return next((unit for unit in units if unit.serves() == str(run)), None)
