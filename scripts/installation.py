"""Installing the broker as a systemd unit, and taking it out again.

Always true
    A broker that runs is not harmed: one that runs outside systemd makes `install` refuse, since only its end would
    let systemd's take its place; one that runs under the unit goes on running when that is installed again.
    What is installed has started: a unit that does not come up is taken out again, and told.
    `uninstall` ends no process, unless it is forced to.

A system unit is for whoever calls, with sudo for whoever called that.  Root's rights are used for the unit only:
nothing is written to the user's own folders.

Not here
    What is in the unit: `units`.  Where it is and how it is started: `common.unit`.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import channel
from ..common.errors import BadRequest, OutliveError, PeerError, Unavailable
from ..common.launch import ROLE
from ..common.paths import Paths
from ..common.unit import Unit, system_unit, user_unit
from .units import PRESERVE_SINCE, Service, render

KEEPER = "outlive.broker.keeper"

# Seconds that a unit may take to come up: many times a broker's start on a busy machine.
_PATIENCE = 60.0
# What decides where a broker's folders are, see `common.paths`.
_PLACES = ("OUTLIVE_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME")


@dataclass(frozen=True, slots=True)
class Caller:
    """For whom something is installed: the user, and the environment that places the folders."""

    uid: int
    environment: Mapping[str, str]

    @classmethod
    def of(cls, environment: Mapping[str, str], *, system: bool) -> Caller:
        """Return the caller; under sudo, of a system unit, the user who called that."""
        known = {name: environment[name] for name in ("HOME", *_PLACES) if environment.get(name)}
        if home := known.get("OUTLIVE_HOME"):
            known["OUTLIVE_HOME"] = str(Path(home).absolute())
        sudo = environment.get("SUDO_UID", "")
        if not (system and os.geteuid() == 0 and sudo.isdecimal()):
            return cls(os.getuid(), known)
        runtime = Path(f"/run/user/{sudo}")
        theirs = {"HOME": pwd.getpwuid(int(sudo)).pw_dir}
        if runtime.is_dir():
            theirs["XDG_RUNTIME_DIR"] = str(runtime)
        if home:
            theirs["OUTLIVE_HOME"] = known["OUTLIVE_HOME"]
        return cls(int(sudo), theirs)

    @property
    def paths(self) -> Paths:
        """Return where this user's broker has its folders."""
        return Paths.from_environment(self.environment)

    def unit(self, *, system: bool) -> Unit:
        """Return the unit that is, or would be, installed."""
        return system_unit(self.uid) if system else user_unit(self.environment)

    def text(self, *, system: bool, systemd: int, command: tuple[str, ...] = ()) -> str:
        """Return the unit's text."""
        placed = {name: value for name, value in self.environment.items() if name in _PLACES}
        if "OUTLIVE_HOME" in placed:
            placed = {"OUTLIVE_HOME": placed["OUTLIVE_HOME"]}
        if system:
            placed["HOME"] = self.environment.get("HOME") or pwd.getpwuid(self.uid).pw_dir
        else:
            placed.pop("XDG_RUNTIME_DIR", None)  # its manager says so itself
        placed[ROLE.decode()] = KEEPER.removeprefix("outlive.")
        # -P: as in `launch`.
        words = command or (sys.executable, "-P", "-m", KEEPER)
        return render(Service(words, self.paths.run, placed, self.uid if system else None, systemd))


def version(unit: Unit) -> int:
    """Return the version of the manager that would run the unit; raises `Unavailable` where there is none."""
    remedy = "`outlive up` starts a broker without systemd"
    try:
        done = unit.systemctl("show", "--property=Version", "--value", seconds=_PATIENCE)
    except FileNotFoundError:
        raise Unavailable(f"there is no systemd on this machine (no systemctl); {remedy}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"systemd does not answer within {_PATIENCE:.0f} s; {remedy}") from None
    number = re.match(r"\d+", done.stdout)
    if done.returncode == 0 and number:
        return int(number[0])
    said = " ".join(done.stderr.split()) or "it does not tell its version"
    if unit.system:
        raise Unavailable(f"systemd does not run this machine ({said}); {remedy}")
    raise Unavailable(
        f"no systemd user manager runs for you ({said}); log in properly (not by `su` or `sudo`), or use --system; "
        + remedy
    )


def preview(*, system: bool) -> str:
    """Return the unit's text, here for the newest systemd where none is there to be asked; changes nothing."""
    caller = Caller.of(os.environ, system=system)
    try:
        return caller.text(system=system, systemd=version(caller.unit(system=system)))
    except Unavailable:
        return caller.text(system=system, systemd=PRESERVE_SINCE)


def install(*, system: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the unit, enable and start it; returns what is installed now.  `say` takes warnings.

    Raises `Unavailable` without systemd, `BadRequest` without the right to, or while a broker runs outside it.
    """
    caller = Caller.of(os.environ, system=system)
    unit = caller.unit(system=system)
    _check_rights(unit, "install")
    text = caller.text(system=system, systemd=version(unit))
    run, other = caller.paths.run, caller.unit(system=not system)
    if other.serves() == str(run):
        raise BadRequest(f"{other.path} is installed for this broker already: `outlive broker uninstall` first")
    serves = unit.serves()
    if unit.path.exists() and serves != str(run):
        whose = f"is for the broker of {serves}" if serves else "was not written by us"
        raise BadRequest(f"{unit.path} {whose}; uninstall that first, or leave it and use `outlive up` here")
    active = is_active(unit)
    if not active and runs(caller.paths):
        raise BadRequest(
            f"a broker runs for {run}, outside systemd, which cannot take it over; end it when none of its "
            "processes is needed (`outlive down`), then install again"
        )
    changed = not unit.path.exists() or unit.path.read_text(encoding="utf-8", errors="replace") != text
    unit.path.parent.mkdir(parents=True, exist_ok=True)
    _write(unit.path, text)
    try:
        for words in (["daemon-reload"], ["enable", unit.name], ["start", unit.name]):
            _told(unit, *words)
    except OutliveError as error:
        if active:  # what runs, runs on with what it was started with
            raise
        _remove(unit)
        raise Unavailable(f"the unit did not start and was taken out again: {error}") from None
    if active and changed:
        say(f"the running broker takes the new settings at `systemctl {unit.manager} restart {unit.name}`")
    return {
        "unit": unit.name,
        "path": str(unit.path),
        "manager": "system" if system else "user",
        "run": str(run),
        "lingering": None if system else _linger(say),
    }


def uninstall(*, force: bool, down: Callable[[bool], list[str]]) -> dict[str, Any]:
    """Stop the unit that is installed for this broker, and remove it; returns what that was, and what it ended.

    `down` ends the broker, given `force`, and returns what that ended; it raises `BadRequest` while processes live,
    `Unavailable` when no broker can be asked.
    """
    for system in (True, False):
        caller = Caller.of(os.environ, system=system)
        unit = caller.unit(system=system)
        if unit.serves() == str(caller.paths.run):
            break
    else:
        raise BadRequest(f"no unit is installed for the broker of {caller.paths.run}")
    _check_rights(unit, "uninstall")
    ended: list[str] = []
    try:
        ended = down(force)
    except Unavailable as error:
        if is_active(unit) and not force:
            raise Unavailable(f"its processes are not known ({error}); --force stops it all the same") from None
    _remove(unit)
    return {"unit": unit.name, "path": str(unit.path), "ended": ended}


def runs(paths: Paths) -> bool:
    """Tell whether a broker listens; asks it for nothing."""
    try:
        channel.connect(paths.channel).close()
    except (ConnectionRefusedError, FileNotFoundError, NotADirectoryError):
        return False
    except PeerError:  # we are root, and it is that of the user who called sudo
        return True
    return True


def is_active(unit: Unit) -> bool:
    """Tell whether the unit runs, or is about to; where systemd cannot be asked it does not."""
    try:
        return unit.is_active(_PATIENCE)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def _check_rights(unit: Unit, what: str) -> None:
    if unit.system and os.geteuid() != 0:
        home = os.environ.get("OUTLIVE_HOME")
        words = ["sudo", *([f"OUTLIVE_HOME={home}"] if home else []), sys.argv[0], "broker", what]
        words += ["--system"] if what == "install" else []
        raise BadRequest(f"{unit.path} is root's: `{' '.join(words)}`, or use --user")


def _told(unit: Unit, *words: str) -> None:
    """Run systemctl; raises `Unavailable` with what it said."""
    try:
        done = unit.systemctl(*words, seconds=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"systemctl {' '.join(words)}: {error}") from None
    if done.returncode:
        raise Unavailable(f"systemctl {' '.join(words)}: {' '.join(done.stderr.split())}")


def _write(path: Path, text: str) -> None:
    """Replace the file at once: systemd may look at any time."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(path)


def _remove(unit: Unit) -> None:
    """Stop and remove a unit, also where no manager is there to be told."""
    with suppress(Unavailable):
        _told(unit, "disable", "--now", unit.name)
    unit.path.unlink(missing_ok=True)
    for wants in unit.path.parent.glob(f"*.target.wants/{unit.name}"):
        wants.unlink()
    with suppress(Unavailable):
        _told(unit, "daemon-reload")


def _linger(say: Callable[[str], None]) -> bool:
    """Let the user's manager start with the machine and outlive logins; tells what to do where that fails."""
    try:
        done = subprocess.run(
            ["loginctl", "--no-ask-password", "enable-linger"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
        wrong = " ".join(done.stderr.split()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = str(error)
    if wrong:
        say(
            f"the broker will end with your last session ({wrong}); "
            f"`sudo loginctl enable-linger {os.getuid()}` keeps it, and starts it with the machine"
        )
    return not wrong
