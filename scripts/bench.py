"""Speed and memory of outlive, as ratios against baselines measured in the same run.

    drain       flooding children: bytes per second against a bare C loop of read().
    control     `status` and `ps` while a child floods.
    exec        /bin/true from a client against a bare ptyprocess spawn; and from a process that holds 500 MB.
    roundtrip   input typed until its echo is seen.
    handoff     detach and reattach of 1, 64 and 500 processes of one thread.
    crash       kill -9 of a worker until its successor answers.
    broker      kill -9 of the broker until a call is answered; an upgrade, as a caller feels it.
    wake        a process's end until the program of its sleeping thread runs.
    memory      broker and worker, per idle process, its transcript included.
    sleepers    threads that sleep: memory, and wake-ups of broker and keeper.
    wakeups     of an idle broker and worker.
    help        `outlive --help`.
    doors       `outlive mcp`, until it answers.

Always true
    What is compared is measured alternately, so that a machine that is busy for a while is busy for both.
    Each measurement has an OUTLIVE_HOME of its own, and what it started is gone afterwards.
    A number is what was measured: what cannot be measured here is skipped, with the reason.

Not here
    What is measured: `flooded` (drain, control), `latency` (exec to wake, help, doors), `footprint` (memory,
    sleepers, wakeups).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from ..common.errors import OutliveError
from . import flooded, footprint, home, latency
from .baselines import Programs
from .measurement import Bench, Row

# Seconds that one measurement may take before it counts as broken.
DEADLINE = 300.0
CONFIG = "max_processes = 1000\nwarn_at = 1000\n"


MEASUREMENTS: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "drain": flooded.drain,
    "control": flooded.control,
    "exec": latency.exec_true,
    "roundtrip": latency.roundtrip,
    "handoff": latency.handoff,
    "crash": latency.crash,
    "broker": latency.broker_crash,
    "wake": latency.wake,
    "memory": footprint.memory,
    "sleepers": footprint.sleepers,
    "wakeups": footprint.wakeups,
    "help": latency.help_text,
    "doors": latency.doors,
}


def measure(name: str, quick: bool) -> list[Row]:
    """Run one measurement in a home of its own."""
    with home.temporary_home(CONFIG) as folder, tempfile.TemporaryDirectory(prefix="outlive-bench-") as tools:
        bench = Bench(quick, folder, Programs.build(Path(tools)))

        async def run() -> list[Row]:
            try:
                async with asyncio.timeout(DEADLINE):
                    return await MEASUREMENTS[name](bench)
            finally:
                await home.emptied()

        return asyncio.run(run())


def say(text: str) -> None:
    """Tell how far we are; standard output is for the result."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    """Print the result for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="outlive, against baselines of the same run", title_justify="left")
    for heading in ("measurement", "median", "spread", "baseline", "ratio", "target", "holds", "note"):
        table.add_column(
            heading, justify="right" if heading in ("median", "spread", "baseline", "ratio") else "left"
        )
    for one in rows:
        spread = "" if one.low is None or one.high is None else f"{_short(one.low)}–{_short(one.high)}"
        table.add_row(
            one.name,
            "–" if one.value is None else f"{_short(one.value)} {one.unit}",
            spread,
            "" if one.baseline is None else _short(one.baseline),
            "" if one.ratio is None else f"{one.ratio:.2f}",
            one.target,
            {True: "yes", False: "[bold red]NO[/]", None: ""}[one.holds],
            one.note,
        )
    console = Console()
    # A table that is cut at 80 columns says nothing; a file takes any width.
    Console(width=None if console.is_terminal else 200).print(table)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def main() -> int:
    """Measure, print; the exit status tells only whether everything could be measured."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Speed and memory of outlive, as ratios against baselines measured in the same run.",
        epilog="\n".join(f"{name:<10}  {(what.__doc__ or '').strip()}" for name, what in MEASUREMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one list of objects instead of a table")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions: about two minutes, and rougher numbers"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MEASUREMENTS, help="measure only these")
    options = parser.parse_args()
    rows: list[Row] = []
    broken = 0
    for name in options.only or MEASUREMENTS:
        say(f"{name} …")
        start = time.monotonic()
        try:
            rows += measure(name, options.quick)
        except (OutliveError, OSError, RuntimeError, TimeoutError) as error:
            broken += 1
            rows.append(Row(name=name, note=f"could not be measured: {error!r}"))
        say(f"{name}: {time.monotonic() - start:.1f} s")
    if options.json:
        print(json.dumps([asdict(one) for one in rows], indent=2))
    else:
        print_table(rows)
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
