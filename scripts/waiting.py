"""The commands that are about rules: watch, for a thread that sleeps, and wait, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .arguments import Seconds
from .frame import (
    FAILED,
    LOST,
    TIMED_OUT,
    Process,
    command,
    in_thread,
    key_of,
    process_argument,
    processes_argument,
    rules_from,
    show,
    thread_of,
    wake_on_option,
    with_host,
)
from .rendering import ends_with_reader, message, printable

if TYPE_CHECKING:
    from ..common.client import Host
    from ..common.messages import WaitRow
    from ..common.outcome import Outcome


@command()
@in_thread
@process_argument
@wake_on_option
def watch(thread: str | None, process: Process, wake_on: Sequence[str], as_json: bool) -> None:
    """Have the thread of a process woken later.

    That is: when one of the rules comes true, or the process ends before that. It may have ended already, and what
    it has printed already counts. A rule that came true before is set anew.

    \b
    Examples: outlive watch 4711 --wake-on exit
              outlive watch web/4711 --wake-on 'output=error|warning' --wake-on silence=600
    """
    if not wake_on:
        raise click.UsageError("no rule; give at least one --wake-on")
    rules = rules_from(wake_on, "--wake-on")
    thread_id, process_id = key_of(process, thread)
    rows = with_host(lambda host: thread_of(host, thread_id).watch(process_id, *rules))
    lines = []
    for row in rows:
        lines.append(printable(f"{row.thread}/{row.process_id}: {row.rule}") + ("" if row.open else " (at once)"))
    show(rows, as_json, "\n".join(lines))


@command()
@in_thread
@processes_argument
@click.option(
    "--until",
    "until",
    multiple=True,
    metavar="RULE",
    help="Wait for this instead: output=RE, silence=S, port=N, deadline=S, exit; repeatable, the first one counts.",
)
@click.option("--any/--all", "any_", default=False, help="Wait for one of several processes, or (default) for all.")
@click.option("--timeout", type=Seconds(), metavar="S", help="Give up after S seconds, with exit status 124.")
def wait(
    thread: str | None,
    processes: Sequence[Process],
    until: Sequence[str],
    any_: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Wait until processes have ended, or a rule is true of them.

    No thread is woken by it. The exit status is that of the process (128 + N if signal N ended it, 125 if its end
    is not known); 0 for several, and when a rule other than `exit` came true; 1 when the process ended before.

    \b
    Examples: outlive wait 4711 --timeout 60
              outlive wait 4711 --until 'output=listening on port' --until port=8000
              outlive wait 4711 4712 --any
    """
    import asyncio

    keys = list(dict.fromkeys(key_of(process, thread) for process in processes))
    rules = rules_from(until, "--until")

    async def one(host: Host, key: tuple[str, str]) -> WaitRow:
        process = thread_of(host, key[0])
        if not rules:
            outcome = await process.wait(key[1], timeout)
            row = _ended(key, outcome)
            show({**_key(row), "outcome": row.outcome}, as_json, f"{key[0]}/{key[1]}: {outcome.sentence()}")
        else:
            row = await process.wait_until(key[1], *rules, timeout=timeout)
            show(row, as_json, _came(row))
        return row

    async def work(host: Host) -> list[WaitRow]:
        tasks = {asyncio.ensure_future(one(host, key)): key for key in keys}
        when = asyncio.FIRST_COMPLETED if any_ else asyncio.FIRST_EXCEPTION
        rows: list[WaitRow] = []
        left = set(tasks)
        try:
            with ends_with_reader():
                while left and not (any_ and rows):
                    done, left = await asyncio.wait(left, return_when=when)
                    for task in done:
                        try:
                            rows.append(task.result())
                        except TimeoutError:
                            key = tasks[task]
                            what = "has not ended" if not rules else "nothing came true"
                            message(f"process {key[0]}/{key[1]}: {what} after {timeout:g} s")
        finally:
            for task in left:
                task.cancel()
        return rows

    rows = with_host(work)
    if not rows or (len(rows) < len(keys) and not any_):
        return TIMED_OUT
    if len(keys) > 1:
        return 0
    return _status(rows[0])


def _key(row: WaitRow) -> dict[str, str]:
    return {"thread": row.thread, "process_id": row.process_id}


def _ended(key: tuple[str, str], outcome: Outcome) -> WaitRow:
    from ..common.messages import WaitRow

    thread, process_id = key
    return WaitRow(
        thread=thread, process_id=process_id, rule="exit", outcome=outcome.to_wire(), offset=None, text=None
    )


def _came(row: WaitRow) -> str:
    """Return what a wait came to, in a line."""
    from ..common.messages import outcome_from_wire

    outcome = outcome_from_wire(row.outcome)
    if outcome:
        said = outcome.sentence() + ("" if row.rule else ", before any rule came true")
    else:
        text = f": {row.text.decode('utf-8', 'replace')}" if row.text is not None else ""
        said = f"{row.rule} at offset {row.offset}{text}" if text else str(row.rule)
    return printable(f"{row.thread}/{row.process_id}: {said}")


def _status(row: WaitRow) -> int:
    from ..common.messages import outcome_from_wire

    outcome = outcome_from_wire(row.outcome)
    if outcome is None:
        return 0
    if row.rule is None:
        return FAILED
    return LOST if outcome.exit_code is None else outcome.exit_code
