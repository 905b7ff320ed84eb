"""The whole examination, in the order in which a person reads it: the machine, the folders, what runs there."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ... import __version__
from ...common import config, messages
from ...common.config import Config
from ...common.errors import OutliveError
from ...common.paths import Paths
from . import features, folders, limits, processes, runtime, session
from .finding import Finding


def examine(paths: Paths) -> Iterator[Finding]:
    """Do all checks."""
    there = processes.seen()
    doors = [runtime.knock(name, paths.run / name) for name in ("channel", "control", "events", "keeper")]
    lockable = [paths.run / "lock", paths.run / "keeper.lock"]
    held_locks = runtime.lockers(there, [*lockable, *runtime.note_files(paths.workers)])
    locks = [runtime.look_at_lock(path.name, path, there, held_locks) for path in lockable]
    holders = {
        "broker": locks[0].holder if locks[0].role.startswith("broker") else 0,
        "keeper": locks[1].holder if locks[1].role.startswith("broker") else 0,
    }
    # Who listens may be known to the kernel as whoever made the socket; who has the lock is the broker.
    listens = doors[0].pid if doors[0].user == os.getuid() else 0
    broker = holders["broker"] or listens
    marked, held = processes.orphans(there)
    lost_here = any(found.run == paths.run for found in marked)

    yield from features.probe()
    tasks = sum(found.tasks for found in there)
    yield from limits.examine(limits.probe(broker or None, tasks, _config(paths)))
    yield from folders.probe(paths)
    yield from session.examine(session.probe(paths, broker or None))

    answer = runtime.ask(paths, broker, doors[0], there, ended=lost_here)
    yield from runtime.check_broker(answer, __version__, messages.VERSION, paths.log)
    for lock in locks:
        yield runtime.check_lock(lock)
    for door in doors:
        yield runtime.check_door(door, os.getuid(), holders["keeper" if door.name == "keeper" else "broker"])
    yield from runtime.check_brokers(there, paths.run, {broker, listens}, runtime.removed(held_locks, paths.lock))
    yield from runtime.check_keepers(there, paths.run, holders["keeper"])
    notes = runtime.read_notes(paths.workers, held_locks)
    yield from runtime.check_workers(notes, there, runtime.installed_at(), broker)
    yield from processes.check_orphans(marked, held, answer.ended, paths.run)


def _config(paths: Paths) -> Config:
    try:
        return config.load(paths.config)
    except OutliveError:  # `folders` says so
        return Config()
