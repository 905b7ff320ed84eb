"""Where runtime, state and configuration live.

    OUTLIVE_HOME=DIR    DIR/run, DIR/state, DIR/config.toml       several brokers on one machine, tests
    otherwise           $XDG_RUNTIME_DIR/outlive (or /run/user/UID/outlive, or under the state folder),
                        $XDG_STATE_HOME/outlive, $XDG_CONFIG_HOME/outlive/config.toml

Every folder of ours is 0700 and ours, checked each time: what is in it decides whom we talk to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import BadRequest

# Bytes of a log that is gone on with when a broker starts.
LOG_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders and files of one broker."""

    run: Path
    state: Path
    config: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Paths:
        """Return the paths that the environment asks for; touches no file."""
        env = os.environ if environment is None else environment
        if home := env.get("OUTLIVE_HOME"):
            folder = Path(home).absolute()
            return cls(folder / "run", folder / "state", folder / "config.toml")
        user_home = Path(env.get("HOME") or os.path.expanduser("~"))
        # A relative one is to be ignored: so says who invented them.
        base = {name: value for name, value in env.items() if name.startswith("XDG_") and os.path.isabs(value)}
        state = Path(base.get("XDG_STATE_HOME") or user_home / ".local/state") / "outlive"
        config = Path(base.get("XDG_CONFIG_HOME") or user_home / ".config") / "outlive/config.toml"
        if runtime := base.get("XDG_RUNTIME_DIR"):
            return cls(Path(runtime) / "outlive", state, config)
        fallback = Path(f"/run/user/{os.getuid()}")
        ours = fallback.is_dir() and fallback.stat().st_uid == os.getuid()
        return cls(fallback / "outlive" if ours else state / "run", state, config)

    @property
    def lock(self) -> Path:
        """Locked by the one broker of this runtime folder."""
        return self.run / "lock"

    @property
    def keeper_lock(self) -> Path:
        """Locked by the one keeper of this runtime folder."""
        return self.run / "keeper.lock"

    @property
    def keeper(self) -> Path:
        """The keeper's socket, for what it is to keep."""
        return self.run / "keeper"

    @property
    def control(self) -> Path:
        """The ZeroMQ socket for requests and replies."""
        return self.run / "control"

    @property
    def events(self) -> Path:
        """The ZeroMQ socket for events."""
        return self.run / "events"

    @property
    def channel(self) -> Path:
        """The socket for descriptors and the handshake."""
        return self.run / "channel"

    @property
    def workers(self) -> Path:
        """One file for each running worker: its pid, start time and epoch, for the next broker."""
        return self.run / "workers"

    @property
    def log(self) -> Path:
        """What broker, workers and spawners had to say."""
        return self.state / "broker.log"

    @property
    def journal(self) -> Path:
        """The database of threads, the ids they used, and what is kept of their ended processes."""
        return self.state / "journal.db"

    def prepare(self) -> None:
        """Make the folders, and refuse those that somebody else could write to.

        A state folder that cannot be made keeps nobody from working: the journal says what that costs.
        """
        for folder in (self.run, self.state):
            if not is_utf8(folder):  # ZeroMQ and SQLite know no other names
                name = os.fsencode(folder)
                raise BadRequest(
                    f"folder {name!r}: its name is not UTF-8, or the locale is not; set OUTLIVE_HOME to another one"
                )
        for folder in (self.run, self.workers):
            private_folder(folder)
        with suppress(OSError):
            _make_private(self.state)

    def open_log(self) -> int:
        """Return the log for appending to it, or /dev/null where it cannot be written.

        A large one is kept as the one before, and a new one is begun.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with suppress(OSError):
            if self.log.stat().st_size > LOG_MAX:
                self.log.replace(f"{self.log}.1")
        try:
            return os.open(self.log, flags, 0o600)
        except OSError:
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def is_utf8(path: Path) -> bool:
    """Tell whether a path is text."""
    return os.fsencode(path) == str(path).encode("utf-8", "replace")


def private_folder(folder: Path) -> None:
    """Make `folder` (0700), or close it to others if it is empty; raises `BadRequest` when it is not ours alone."""
    try:
        _make_private(folder)
    except OSError as error:
        raise BadRequest(f"folder {folder}: {error.strerror}; set OUTLIVE_HOME to one you can write to") from None


def _make_private(folder: Path) -> None:
    for missing in [one for one in (folder, *folder.parents) if not one.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)  # what is above it may be ours, too
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):  # to a folder that has its mode for reasons of its own
        raise BadRequest(f"folder {folder} is a symbolic link; set OUTLIVE_HOME to the folder itself")
    if found.st_uid != os.getuid():
        raise BadRequest(f"folder {folder} belongs to user {found.st_uid}, not to you ({os.getuid()})")
    if stat.S_IMODE(found.st_mode) & 0o077:
        if any(folder.iterdir()):
            raise BadRequest(
                f"folder {folder} is open to others (mode {stat.S_IMODE(found.st_mode):04o}) and not empty; "
                f"`chmod 700` it if it is outlive's, else set OUTLIVE_HOME to another one"
            )
        folder.chmod(0o700)
