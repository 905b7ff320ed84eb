"""Random deaths under flood: what was lost must be nothing.

    scripts/chaos worker --kills 2000 --children 4
    scripts/chaos all --kills 2000 --children 4
    scripts/chaos upgrade --times 50
    scripts/chaos wakes --times 1000

Whoever the kind of run names is killed with SIGKILL at random and at chosen moments: while it starts, takes
processes back, while commands are started, somebody types, processes change hands, a broker is upgraded; also
two in a row, at once and at any distance.  Meanwhile in each thread children flood numbered lines (`flood`), short
commands come and go, and somebody types into a shell that counts; in a thread that sleeps, processes end while no
broker runs.  With `wakes`, threads sleep until what they wait for comes true, and their programs count.  In the
end every byte, outcome, process id, descriptor and wake is accounted for, and the exit status says whether all was
right.

A check that cannot fail proves nothing.  `--copied` forces the fallback pump, which holds bytes in its hands,
under a killer of real-time priority on a core of its own; it succeeds when it has *seen* a loss.  Without the
rights for that the check is void, and it exits with 77.

What it is made of: `mayhem`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from . import home
from .mayhem.beyond import copied_chaos
from .mayhem.run import Plan, run
from .mayhem.tally import Tally, report


@click.group()
def main() -> None:
    """Kill what can be killed while outlive works, and look for losses."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all kinds of runs have."""
    for option in reversed(
        (
            click.option("--seconds", default=3600.0, show_default=True, help="Stop after so long, at the latest."),
            click.option("--children", default=4, show_default=True, help="Children that flood at any time."),
            click.option("--threads", default=2, show_default=True, help="Threads that share them."),
            click.option("--seed", type=int, help="Make the choices repeatable; not the moments."),
            click.option("--json", "as_json", is_flag=True, help="Print one object."),
        )
    ):
        command = option(command)
    return command


_kills = click.option(
    "--kills", "times", default=100, show_default=True, help="Stop after so many; children are let finish."
)


def _perform(kind: str, as_json: bool, **plan: Any) -> None:
    tally = Tally()
    with home.temporary_home() as folder:
        status = home.run(run(Plan(kind=kind, **plan), folder, tally))
    report(tally, as_json)
    raise SystemExit(status)


@main.command()
@_kills
@_options
@click.option("--copied", is_flag=True, help="See the copying pump lose something; 77: void without real time.")
def worker(copied: bool, as_json: bool, **plan: Any) -> None:
    """Kill workers."""
    if not copied:
        _perform("worker", as_json, **plan)
    tally = Tally()
    with home.temporary_home('pump = "copied"\n'):
        status = home.run(copied_chaos(tally, children=plan["children"], seed=plan["seed"]))
    report(tally, as_json)
    raise SystemExit(status)


@main.command()
@_kills
@_options
def broker(as_json: bool, **plan: Any) -> None:
    """Kill brokers, also those that start."""
    _perform("broker", as_json, **plan)


@main.command()
@_kills
@_options
def keeper(as_json: bool, **plan: Any) -> None:
    """Kill keepers, and workers beside them."""
    _perform("keeper", as_json, **plan)


@main.command(name="all")
@_kills
@_options
def everybody(as_json: bool, **plan: Any) -> None:
    """Kill workers, brokers and keepers, one by one and together, also while the broker is upgraded."""
    _perform("all", as_json, **plan)


@main.command()
@click.option("--times", default=10, show_default=True, help="Stop after so many; children are let finish.")
@_options
def upgrade(as_json: bool, **plan: Any) -> None:
    """Upgrade the broker, over and over."""
    _perform("upgrade", as_json, **plan)


@main.command()
@click.option("--times", default=100, show_default=True, help="Stop after so many wakes.")
@_options
def wakes(as_json: bool, **plan: Any) -> None:
    """Kill workers and brokers around what sleeping threads are woken for."""
    _perform("wakes", as_json, **plan)


if __name__ == "__main__":
    main(prog_name="scripts/chaos")
