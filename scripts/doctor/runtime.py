"""The runtime folder's sockets, locks and notes; and the broker, keeper and workers behind them.

    lock, keeper.lock           locked by the broker, and by its keeper, as long as they live
    channel, control, events    the broker listens there; `keeper`: the keeper does
    workers/THREAD.EPOCH        pid and start time of a worker; locked by it and its spawners, as long as they live

Files without anybody behind them are left over from a death: the next broker replaces them.

Who has a lock is whoever has the locked *open file*: a broker that took over got it from the one before, and
/proc/locks still names that one, which is dead.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ...common import kernel
from ...common.names import SocketPath
from ...common.paths import Paths
from .finding import Finding, some
from .processes import Seen

# Seconds that a broker that runs has for its answer; it takes milliseconds, and more under a flood.
PATIENCE = 0.7
_SOCKETS = {
    "channel": (socket.SOCK_SEQPACKET, "broker"),
    "control": (socket.SOCK_STREAM, "broker"),
    "events": (socket.SOCK_STREAM, "broker"),
    "keeper": (socket.SOCK_DGRAM, "keeper"),
}
# What the kernel puts after the name of a file that has been removed.
_DELETED = " (deleted)"
_LOCKS = {"lock": "broker", "keeper.lock": "broker.keeper"}


# Sockets.


@dataclass(frozen=True, slots=True)
class Door:
    """One socket: whether it is there, and who answers.

    state    absent, stale (nobody behind it), listening, full (its queue is, so nobody has taken from it for long),
             no socket, unknown (`trouble` says why).
    pid      of whoever listens, and `user`; 0 and -1 where the kernel does not say.
    """

    name: str
    path: Path
    state: str
    mode: int = 0o600
    pid: int = 0
    user: int = -1
    trouble: str = ""


def check_door(door: Door, us: int, lock_holder: int) -> Finding:
    """Say what stands behind one socket; `lock_holder`: 0 if the lock is free or its holder is not known."""
    check = f"socket {door.name}"
    whose = _SOCKETS[door.name][1]
    shown = str(door.path)
    if door.state == "absent":
        if lock_holder:
            meaning = f"the {whose} runs, but its socket is gone: nobody can reach it"
            return Finding(check, "error", f"no {shown}", meaning, _restart(lock_holder, whose), (lock_holder,))
        return Finding(check, "ok", f"no {shown}", f"no {whose} runs here")
    if door.state == "no socket":
        return Finding(check, "warning", shown, "is not a socket; the next start replaces it", f"rm {shown}")
    if door.state == "stale":
        if lock_holder:
            meaning = f"the {whose} has the lock, but does not listen: it is starting, ending or stuck"
            return Finding(
                check, "warning", shown, meaning, f"look again; then {_restart(lock_holder, whose)}", (lock_holder,)
            )
        meaning = f"nobody listens: its {whose} has died; the next one replaces it"
        return Finding(check, "note", f"stale: {shown}", meaning)
    if door.state == "unknown":
        return Finding(check, "warning", f"{shown}: {door.trouble}", "it cannot be tried out", f"ls -l {shown}")
    if door.user not in (-1, us):
        meaning = f"user {door.user} (process {door.pid}) listens in your place; nothing of yours talks to it"
        return Finding(check, "error", shown, meaning, f"find out why, and remove {shown}", (door.pid,))
    if door.state == "full":
        meaning = f"its queue is full: the {whose} has not taken from it for long, so it is stopped or stuck"
        return Finding(check, "error", shown, meaning, f"see `{whose}` above", (door.pid,) if door.pid else ())
    if door.mode & 0o077:
        meaning = f"others may connect (mode {door.mode:04o}); by the kernel's word they are refused all the same"
        return Finding(check, "warning", shown, meaning, f"chmod 600 {shown}", (door.pid,) if door.pid else ())
    return Finding(check, "ok", shown, f"the {whose} listens", "", (door.pid,) if door.pid else ())


def _restart(pid: int, whose: str) -> str:
    if whose == "keeper":
        return f"kill {pid}: a keeper is replaced without harm"
    return (
        f"`kill -9 {pid}`: its keeper starts another one with all processes (without a keeper they would be lost)"
    )


def knock(name: str, path: Path) -> Door:
    """Find out who listens at a socket, without waiting and without sending anything."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Door(name, path, "absent")
    except OSError as error:
        return Door(name, path, "unknown", trouble=error.strerror or str(error))
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISSOCK(found.st_mode):
        return Door(name, path, "no socket", mode)
    kind, _ = _SOCKETS[name]
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as connection:
        try:
            with SocketPath(path) as address:
                connection.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return Door(name, path, "stale", mode)
        except BlockingIOError:
            return Door(name, path, "full", mode)
        except OSError as error:
            return Door(name, path, "unknown", mode, trouble=error.strerror or str(error))
        if kind == socket.SOCK_DGRAM:  # nobody accepts, so the kernel knows no peer
            return Door(name, path, "listening", mode)
        pid, user = kernel.peer_credentials(connection)
        return Door(name, path, "listening", mode, pid, user)


# Locks.


@dataclass(frozen=True, slots=True)
class Lock:
    """One lock: `holder` is its pid, 0 when it is free, -1 when it cannot be known; `role` what that is."""

    name: str
    path: Path
    exists: bool
    holder: int
    role: str = ""
    command: str = ""


def check_lock(lock: Lock) -> Finding:
    """Say who has a lock."""
    whose = _LOCKS[lock.name]
    word = whose.rpartition(".")[2]
    if not lock.exists:
        return Finding(lock.name, "ok", f"no {lock.path}", f"no {word} has run here")
    if lock.holder == -1:
        meaning = f"it cannot be looked at, or is held by somebody hidden: whether a {word} runs is not known"
        return Finding(lock.name, "note", str(lock.path), meaning)
    if lock.holder == 0:
        return Finding(lock.name, "ok", f"{lock.path} is free", f"no {word} runs here; a {word} may start")
    found = f"{lock.path} is held by process {lock.holder}"
    if lock.role and lock.role not in (whose, "broker", "broker.keeper"):
        meaning = f"that is outlive's {lock.role}: as long as it lives, no {word} can start"
        return Finding(lock.name, "error", found, meaning, f"kill {lock.holder}", (lock.holder,))
    if not lock.role:
        meaning = f"that is no {word} ({lock.command or 'unknown'}): as long as it lives, no {word} can start"
        return Finding(lock.name, "error", found, meaning, f"end it: kill {lock.holder}", (lock.holder,))
    return Finding(lock.name, "ok", found, f"that is the {word}", "", (lock.holder,))


Lockers = Mapping[str, Sequence[int]]


def lockers(processes: Sequence[Seen], paths: Collection[Path]) -> Lockers:
    """Return who has which of these files open and locked, by the file's real name, ` (deleted)` if it is.

    None is locked for that: whoever tries in the meantime, such as a broker that starts, must find it free.
    """
    found: dict[str, list[int]] = {}
    wanted = {f"{os.path.realpath(path)}{end}" for path in paths for end in ("", _DELETED)}
    for process in processes:
        folder = f"/proc/{process.pid}"
        with suppress(OSError):
            for number in os.listdir(f"{folder}/fd"):
                with suppress(OSError, ValueError):
                    name = os.readlink(f"{folder}/fd/{number}")
                    if name in wanted and is_locked(Path(f"{folder}/fdinfo/{number}").read_text(encoding="ascii")):
                        found.setdefault(name, []).append(process.pid)
    return found


def removed(held: Lockers, path: Path) -> Sequence[int]:
    """Return who has locked a file that has been removed since."""
    return held.get(f"{os.path.realpath(path)}{_DELETED}", ())


def is_locked(text: str) -> bool:
    """Tell from /proc/PID/fdinfo/FD whether this open file has a lock of `flock`."""
    return any(line.split()[:1] == ["lock:"] and "FLOCK" in line.split() for line in text.splitlines())


def lists_lock(text: str, device: int, inode: int) -> bool:
    """Tell from /proc/locks whether anybody has locked this file."""
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    return any("FLOCK" in words and wanted in words for words in map(str.split, text.splitlines()))


def look_at_lock(name: str, path: Path, processes: Sequence[Seen], held: Lockers) -> Lock:
    """Look up who has a lock; `held`: from `lockers`."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Lock(name, path, False, 0)
    except OSError:
        return Lock(name, path, True, -1)
    holders = held.get(os.path.realpath(path), ())
    there = [process for process in processes if process.pid in holders]
    # Several may have the same open file: who passed it on, and who got it.
    there.sort(key=lambda process: (process.role != _LOCKS[name], not process.role))
    if there:
        return Lock(name, path, True, there[0].pid, there[0].role, there[0].command)
    with suppress(OSError, UnicodeDecodeError):
        if lists_lock(Path("/proc/locks").read_text(encoding="ascii"), found.st_dev, found.st_ino):
            return Lock(name, path, True, -1)
    return Lock(name, path, True, 0)


# The broker.


@dataclass(frozen=True, slots=True)
class Answer:
    """What the broker said: its `status`, and THREAD/ID of what has ended; or what went wrong.

    pid      of the broker, where it is known; 0: none runs.
    stopped  so that it was not asked.
    silent   it did not answer in time.
    """

    pid: int = 0
    stopped: bool = False
    silent: bool = False
    trouble: str = ""
    status: Mapping[str, Any] | None = None
    ended: frozenset[str] = frozenset()


def check_broker(answer: Answer, version: str, protocol: int, log: Path) -> Iterator[Finding]:
    """Say whether the broker answers, and whether it is what is installed."""
    check = "broker"
    pids = (answer.pid,) if answer.pid else ()
    named = f"pid {answer.pid}" if answer.pid else "its pid is not known"
    if answer.stopped:
        meaning = "it is stopped, and answers nobody; processes whose thread is awake go on"
        yield Finding(check, "error", named, meaning, f"kill -CONT {answer.pid}", pids)
    elif answer.silent:
        found = f"{named}: no answer within {PATIENCE:g} s"
        meaning = "it runs, but does not answer: the machine is very busy, or it is stuck"
        yield Finding(check, "error", found, meaning, f"look again; see {log}", pids)
    elif answer.trouble:
        meaning = f"it runs, but cannot be talked to by version {version}"
        yield Finding(check, "error", f"{named}: {answer.trouble}", meaning, f"see {log}", pids)
    elif answer.status is None:
        yield Finding(check, "ok", "none runs", "the first command that needs it starts it")
    else:
        yield Finding(check, "ok", named, "it runs and answers", "", pids)
        yield check_version(answer.status, version, protocol)
        yield check_mode(answer.status)
        yield from check_keeper(answer.status, version)
        yield check_room(answer.status)
        yield from check_upgrade(answer.status)


def check_version(status: Mapping[str, Any], version: str, protocol: int) -> Finding:
    """Compare the broker's version with the installed one."""
    theirs, spoken = status.get("version"), status.get("protocol")
    found = f"broker {theirs} (protocol {spoken}), installed {version} (protocol {protocol})"
    if spoken != protocol:
        meaning = "they speak different protocols: some commands may be refused"
        return Finding("version", "warning", found, meaning, "outlive broker upgrade")
    if theirs != version:
        meaning = "the broker runs the code that was installed when it started"
        return Finding("version", "warning", found, meaning, "outlive broker upgrade (nothing that runs is lost)")
    return Finding("version", "ok", found, "they are the same")


def check_mode(status: Mapping[str, Any]) -> Finding:
    """Say how transcripts are filled."""
    mode = str(status.get("transcript_mode"))
    if mode == "copied":
        meaning = "output is read and written: a crash may lose what is in flight"
        advice = "see `splice from a terminal`, and `pump` in the configuration; then restart the broker"
        return Finding("transcript mode", "warning", mode, meaning, advice)
    return Finding("transcript mode", "ok", mode, "no crash of ours loses a byte of output")


def check_keeper(status: Mapping[str, Any], version: str) -> Iterator[Finding]:
    """Say whether a keeper stands behind the broker, and which."""
    if "keeper_pid" not in status:  # of a version that knows no keeper
        return
    pid, theirs = status["keeper_pid"], status.get("keeper_version", version)
    if pid is None:
        meaning = "nobody holds copies of the broker's descriptors: if it dies, what it holds is lost"
        yield Finding("keeper", "warning", "none", meaning, "outlive broker upgrade starts one")
    elif theirs != version:
        meaning = f"it runs version {theirs}, and {version} is installed"
        yield Finding("keeper", "warning", f"pid {pid}", meaning, "outlive broker upgrade", (pid,))
    else:
        yield Finding("keeper", "ok", f"pid {pid}", "the broker's death loses nothing", "", (pid,))


def check_upgrade(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Say why the last upgrade did not come up, if one did not."""
    if why := status.get("upgrade_failed"):
        meaning = "the last upgrade did not come up, and the broker of before goes on with all it holds"
        yield Finding(
            "upgrade", "warning", str(why), meaning, "repair the installation; then outlive broker upgrade"
        )


def check_room(status: Mapping[str, Any]) -> Finding:
    """Say how many descriptors the broker has left."""
    left = status.get("descriptors_left")
    check = "descriptors of the broker"
    if not isinstance(left, int):
        return Finding(check, "ok", "not known", "this broker does not tell")
    if left < 7:
        meaning = "nothing more can be started"
        return Finding(check, "error", f"{left} left", meaning, "end what is not needed; see `open files`")
    if left < 7 * 16:
        meaning = f"{left // 7} processes more, and no further ones can be started"
        return Finding(check, "warning", f"{left} left", meaning, "end what is not needed; see `open files`")
    return Finding(check, "ok", f"{left} left", f"enough for {left // 7} processes more")


def ask(paths: Paths, pid: int, channel: Door, processes: Sequence[Seen], *, ended: bool) -> Answer:
    """Ask the broker behind the channel, within `PATIENCE`; `ended`: also for what has ended.

    `pid`: of the broker, if anybody knows it; `channel`: what stands behind its socket.
    """
    if channel.state not in ("listening", "full"):
        return Answer()
    if any(found.pid == pid and found.stopped for found in processes):
        return Answer(pid, stopped=True)
    if channel.state == "full":  # connecting would wait, and not for `PATIENCE` only
        return Answer(pid, silent=True)
    # Late: where no broker runs, none of it is needed.
    from ...common.client import connect

    async def talk() -> tuple[Mapping[str, Any], frozenset[str]]:
        async with asyncio.timeout(PATIENCE), connect(paths, start=False) as host:
            status = await host.status()
            rows = await host.processes(ended=True) if ended else []
            return status, frozenset(f"{row.thread}/{row.process_id}" for row in rows if row.state == "ended")

    try:
        status, gone = asyncio.run(talk())
    except TimeoutError:
        return Answer(pid, silent=True)
    except Exception as error:  # whatever a broker of another version says must not end the examination
        return Answer(pid, trouble=str(error) or type(error).__name__)
    return Answer(pid, status=status, ended=gone)


# Brokers and workers as processes.


def check_brokers(
    processes: Sequence[Seen], run: Path, known: Collection[int], lost: Collection[int]
) -> Iterator[Finding]:
    """Say which brokers run for our runtime folder beside the one that has the lock.

    `known`: who has the lock, or answers; `lost`: who has a lock open that has been deleted.
    """
    for found in processes:
        if found.role == "broker" and found.run == run and found.pid in lost:
            meaning = "its runtime folder was removed while it ran: nobody can reach it nor what it holds"
            advice = (
                f"set `loginctl enable-linger`, if a logout did it; end it and what it holds: kill -9 {found.pid}"
            )
            yield Finding("other broker", "error", f"pid {found.pid}", meaning, advice, (found.pid,))
        elif found.role == "broker" and found.run == run and found.pid not in known:
            meaning = "a second broker for this runtime folder: one that is starting, or an upgrade under way"
            yield Finding("other broker", "note", f"pid {found.pid}", meaning, "look again", (found.pid,))


def check_keepers(processes: Sequence[Seen], run: Path, known: int) -> Iterator[Finding]:
    """Say which keepers of our runtime folder are stopped, or beside the one that has the lock."""
    for found in processes:
        if found.role != "broker.keeper" or found.run != run:
            continue
        if found.stopped:
            meaning = "it is stopped: it takes in nothing more, and starts no broker in place of one that dies"
            advice = f"kill -CONT {found.pid}"
            yield Finding("stopped keeper", "warning", f"pid {found.pid}", meaning, advice, (found.pid,))
        elif found.pid != known:
            meaning = "a second keeper for this runtime folder: one that is starting, or that is about to end"
            yield Finding("other keeper", "note", f"pid {found.pid}", meaning, "look again", (found.pid,))


@dataclass(frozen=True, slots=True)
class Note:
    """One file of run/workers; `pid` 0: none is named; `alive`: the very process it names; `locked`: by anybody."""

    name: str
    pid: int
    alive: bool
    locked: bool = False


def check_workers(
    notes: Sequence[Note], processes: Sequence[Seen], installed: float | None, broker: int
) -> Iterator[Finding]:
    """Say which workers are there; `installed`: clock ticks since boot when the installed code came."""
    check = "workers"
    stale = [note.name for note in notes if not note.alive and not note.locked]
    alive = {note.pid: note.name for note in notes if note.alive}
    if stale:
        meaning = "notes about workers that are dead; the next broker removes them"
        yield Finding(check, "note", f"stale: {some(sorted(stale))}", meaning)
    there = [found for found in processes if found.pid in alive]
    if stopped := [found for found in there if found.stopped]:
        meaning = (
            "stopped workers keep their processes, whose output waits; nobody takes them from a worker that lives"
        )
        pids = tuple(found.pid for found in stopped)
        advice = f"kill -CONT {' '.join(map(str, pids))}"
        yield Finding(
            check,
            "warning",
            some([f"{alive[found.pid]} (pid {found.pid})" for found in stopped]),
            meaning,
            advice,
            pids,
        )
    if installed is not None and (old := [found for found in there if found.started < installed]):
        meaning = "they run code from before the last installation, and go on with it; their processes are safe"
        pids = tuple(found.pid for found in old)
        advice = "`outlive detach THREAD`, and the thread's next worker is a new one"
        yield Finding(
            check, "note", some([f"{alive[found.pid]} (pid {found.pid})" for found in old]), meaning, advice, pids
        )
    if alive and not broker:
        meaning = "they live without a broker, go on pumping, and wait for the next one"
        yield Finding(check, "warning", some(sorted(alive.values())), meaning, "outlive up", tuple(alive))
    elif not stale:
        yield Finding(check, "ok", f"{len(alive)} live", "no note is stale", "", tuple(alive))


def read_notes(folder: Path, held: Lockers) -> list[Note]:
    """Read run/workers; a file that vanishes meanwhile is none; `held`: from `lockers`."""
    found = []
    for path in note_files(folder):
        locked = os.path.realpath(path) in held
        try:
            facts = json.loads(path.read_text(encoding="ascii"))
            pid, start = int(facts["pid"]), facts["start"]
            found.append(Note(path.name, pid, pid > 0 and not kernel.is_dead(pid, start), locked))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            found.append(Note(path.name, 0, False, locked))  # of a worker that is just being started, if locked
    return found


def note_files(folder: Path) -> list[Path]:
    """Return the files of run/workers."""
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def installed_at() -> float | None:
    """Return when the installed code came, in clock ticks since boot, as processes' start times are counted."""
    record = metadata.distribution("outlive").locate_file("")
    newest = 0.0
    with suppress(OSError):
        for path in Path(str(record)).glob("outlive-*.dist-info/RECORD"):
            newest = max(newest, path.stat().st_mtime)
    if not newest:
        return None
    import time

    return (newest - time.time() + kernel.boottime()) * os.sysconf("SC_CLK_TCK")
