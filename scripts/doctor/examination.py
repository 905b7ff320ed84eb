"""The whole examination, in the order in which a person reads it: the machine, the folders, what runs there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

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
    locks = [runtime.look_at_lock(name, paths.run / name, there) for name in ("lock", "keeper.lock")]
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
    yield from runtime.check_broker(answer, metadata.version("outlive"), messages.VERSION, paths.log)
    for lock in locks:
        yield runtime.check_lock(lock)
    for door in doors:
        yield runtime.check_door(door, os.getuid(), holders["keeper" if door.name == "keeper" else "broker"])
    lost = runtime.with_deleted_locks(there, paths.lock)
    yield from runtime.check_brokers(there, paths.run, {broker, listens}, lost)
    notes = runtime.read_notes(paths.workers)
    yield from runtime.check_workers(notes, there, runtime.installed_at(), broker)
    yield from processes.check_orphans(marked, held, answer.ended, paths.run)


def _config(paths: Paths) -> Config:
    try:
        return config.load(paths.config)
    except OutliveError:  # `folders` says so
        return Config()
