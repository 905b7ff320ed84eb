"""The user's processes as /proc shows them; and orphans, which carry our mark and are held by nobody.

Whose a marked process is, its environment tells: from it follows the runtime folder of the broker that its caller
talked to.  Who *holds* it, only descriptors tell: a broker, keeper, worker or spawner, of whatever home, that has
the transcript open whose header has the same mark (the user's systemd too, which stores descriptors for a keeper).
So it does not matter which brokers we can talk to, or whether they answer.

Always true
    Marked processes are listed first and holders after: a deposit comes before the fork, and a handoff makes a
    copy before the first one is closed, so that a held process is seen to be held.  Whatever seems to be an orphan
    is looked at a second time.
    A holder whose descriptors we may not see makes an orphan a maybe.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ...common import kernel
from ...common.errors import PeerError
from ...common.launch import MARK, PROCESS, ROLE, THREAD
from ...common.paths import Paths
from ...common.transcript import Transcript
from .finding import Finding, some

# Bytes of a command line that are shown.
_COMMAND_MAX = 60
_NOWHERE = Path()
_MODULES = {b"outlive.broker": "broker", b"outlive.broker.keeper": "broker.keeper", b"outlive.worker": "worker"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One process of ours.

    role      of outlive's own processes, such as `broker`, `broker.keeper`, `worker.spawner`; else empty.
    run       of outlive's own and of marked ones: the runtime folder that the environment asks for.
    mark      with `process`, THREAD/ID, what a child of ours carries; else empty.
    tasks     its threads.
    state     the letter that ps shows.
    """

    pid: int
    started: int
    state: str
    role: str
    run: Path
    mark: str
    process: str
    command: str
    tasks: int = 1

    @property
    def stopped(self) -> bool:
        """Whether it was stopped, by a signal or a debugger."""
        return self.state in ("T", "t")


def role_of(environment: Mapping[bytes, bytes], command: Sequence[bytes]) -> str:
    """Return which of outlive's own processes this is; empty for any other.

    What a service manager starts has no role in its environment, but our module in its command line.
    """
    if ROLE in environment:
        return environment[ROLE].decode(errors="replace")
    for option, module in pairwise(command):
        if option == b"-m" and MARK not in environment:
            return _MODULES.get(module, "")
    return ""


def parse_environment(raw: bytes) -> dict[bytes, bytes]:
    """Return an environment as /proc shows it; of a name given twice the first counts, as for `getenv`."""
    found: dict[bytes, bytes] = {}
    for variable in raw.split(b"\0"):
        name, is_one, value = variable.partition(b"=")
        if is_one:
            found.setdefault(name, value)
    return found


def parse_stat(raw: bytes) -> tuple[str, int, int]:
    """Return (state, threads, start time) from /proc/PID/stat; raises `ValueError` when it is none."""
    # The command name may hold spaces and brackets; what follows the last bracket starts at field 3.
    fields = raw[raw.rindex(b")") + 2 :].split()
    if len(fields) < 20:
        raise ValueError(f"{len(fields)} fields")
    return fields[0].decode(), int(fields[17]), int(fields[19])


def seen() -> list[Seen]:
    """Return all living processes of this user that /proc shows to us."""
    return list(_seen())


def _seen() -> Iterator[Seen]:
    user = os.getuid()
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return
    for pid in pids:
        # One that has gone, or that we may not look into: one by one, for /proc is no snapshot.
        with suppress(OSError, ValueError):
            if os.stat(f"/proc/{pid}").st_uid != user:
                continue
            state, tasks, started = parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
            if state in ("Z", "X"):
                continue
            words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            environment: dict[bytes, bytes] = {}
            with suppress(OSError):
                environment = parse_environment(Path(f"/proc/{pid}/environ").read_bytes())
            role = role_of(environment, words)
            process = environment.get(THREAD, b"?") + b"/" + environment.get(PROCESS, b"?")
            yield Seen(
                pid=pid,
                started=started,
                state=state,
                role=role,
                run=_run_of(environment) if role or MARK in environment else _NOWHERE,
                mark=environment.get(MARK, b"").decode(errors="replace"),
                process=process.decode(errors="replace"),
                command=b" ".join(words).decode(errors="replace")[:_COMMAND_MAX],
                tasks=tasks,
            )


def _run_of(environment: Mapping[bytes, bytes]) -> Path:
    return Paths.from_environment({os.fsdecode(n): os.fsdecode(v) for n, v in environment.items()}).run


# Orphans.


@dataclass(frozen=True, slots=True)
class Held:
    """The marks that somebody holds; `unseen`: who may hold more, since we may not see their descriptors."""

    marks: frozenset[str] = frozenset()
    unseen: tuple[int, ...] = ()


def held_by(holders: Collection[int], ids: Collection[str]) -> Held:
    """Return the marks of the transcripts that these processes have open; `ids`: which process ids matter."""
    marks: set[str] = set()
    unseen = []
    # The name of a transcript's memfd, as the kernel shows it.
    wanted = {f"/memfd:outlive-{process_id} (deleted)" for process_id in ids}
    for pid in holders:
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            unseen.append(pid)
            continue
        for name in names:
            with suppress(FileNotFoundError):
                if os.readlink(f"{folder}/{name}") in wanted:
                    marks |= _mark_in(f"{folder}/{name}")
    return Held(frozenset(marks), tuple(unseen))


def _mark_in(path: str) -> set[str]:
    """Return the mark in the header of the transcript behind `path`, opened anew: its position stays as it is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        return {Transcript(fd).facts.mark}
    except (PeerError, OSError):
        return set()
    finally:
        os.close(fd)


def orphans(processes: Sequence[Seen]) -> tuple[list[Seen], Held]:
    """Return the marked processes that nobody holds, and what is held."""
    holders = [found.pid for found in processes if found.role or _stores_descriptors(found)]
    marked = [found for found in processes if found.mark and not found.role and found.pid != os.getpid()]
    held = Held()
    for _ in range(2):
        marked = [found for found in marked if not kernel.is_dead(found.pid, found.started)]
        if not marked:
            break
        held = held_by(holders, {found.process.rpartition("/")[2] for found in marked})
        marked = [found for found in marked if found.mark not in held.marks]
        # A broker may have been replaced while we looked.
        holders = [found.pid for found in seen() if found.role or _stores_descriptors(found)] if marked else []
    return marked, held


def _stores_descriptors(found: Seen) -> bool:
    return os.path.basename(found.command.partition(" ")[0]) == "systemd"


def check_orphans(marked: Sequence[Seen], held: Held, ended: Collection[str], ours: Path) -> Iterator[Finding]:
    """Say what carries a mark and is held by nobody.

    `ended`: THREAD/ID of the processes that our broker knows to have ended; `ours`: our runtime folder.
    """
    check = "orphans"
    groups: dict[str, list[Seen]] = defaultdict(list)
    for found in marked:
        kind = "of another" if found.run != ours else "left over" if found.process in ended else "lost"
        groups[kind].append(found)
    look = "look at them (`ps -fp PID`) and end what is not wanted (`kill PID`)"
    if lost := groups["lost"]:
        meaning = (
            "no broker, keeper or worker holds them: they run, but nobody reads their output or learns how they end"
        )
        if held.unseen:
            yield Finding(
                check,
                "note",
                _named(lost),
                f"nobody seems to hold them, but process {some([str(pid) for pid in held.unseen])} may, and does "
                "not let us see",
                "look again as the user who runs it",
                _pids(lost),
            )
        else:
            yield Finding(check, "warning", _named(lost), meaning, look, _pids(lost))
    if left := groups["left over"]:
        meaning = "started by processes that have ended since, and run on in the background, as they would anywhere"
        yield Finding(check, "note", _named(left), meaning, f"if that was not intended, {look}", _pids(left))
    if others := groups["of another"]:
        homes = some(sorted({str(found.run) for found in others}), 3)
        meaning = f"nobody holds them; they come from brokers with other runtime folders ({homes})"
        yield Finding(check, "note", _named(others), meaning, look, _pids(others))
    if not marked:
        yield Finding(check, "ok", "none", "whatever was started here and still runs is held by somebody")


def _named(found: Sequence[Seen]) -> str:
    return some([f"{one.process} pid {one.pid} ({one.command})" for one in found])


def _pids(found: Sequence[Seen]) -> tuple[int, ...]:
    return tuple(one.pid for one in found)
