"""What all commands share: `--json` and `--no-start`, the usual arguments, the way to the broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .arguments import DEFAULT_THREAD, ProcessName, ThreadName
from .rendering import table, write_json, write_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..common.client import Host, Thread
    from ..common.messages import ThreadRow
    from ..common.rules import Rule

FAILED, USAGE, TIMED_OUT, LOST, INTERRUPTED, READER_GONE = 1, 2, 124, 125, 130, 141

T = TypeVar("T")
Process = tuple[str | None, str]


def _forbid_start(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["no-start"] = True


def _no_start(*, hidden: bool) -> click.Option:
    return click.Option(
        ["--no-start"],
        is_flag=True,
        expose_value=False,
        callback=_forbid_start,
        hidden=hidden,
        help="Never start a broker.",
    )


NO_START = _no_start(hidden=False)


class Command(click.Command):
    """Every command has `--json`, and takes the global `--no-start` also after its name."""

    def __init__(self, name: str | None, *, params: list[click.Parameter] | None = None, **settings: Any) -> None:
        as_json = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON.")
        settings["params"] = [*(params or []), as_json, _no_start(hidden=True)]
        super().__init__(name, **settings)


class Commands(click.Group):
    """Commands in the order in which they were added: that in which a person meets them."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


command = partial(click.command, cls=Command)


def with_host(work: Callable[[Host], Awaitable[T]], *, start: bool = True) -> T:
    """Do `work` with a connection to the broker, started if need be and allowed."""
    import asyncio

    from ..common.client import connect

    start = start and not click.get_current_context().find_root().meta.get("no-start")

    async def run() -> T:
        async with connect(start=start) as host:
            return await work(host)

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        raise click.Abort from None  # click answers the other one with an empty line


def show(value: Any, as_json: bool, text: str) -> None:
    """Print a result as JSON, or as text for a person."""
    from ..common.client import to_builtins

    if as_json:
        write_json(to_builtins(value))
    else:
        write_line(text)


in_thread = click.option(
    "-t",
    "--thread",
    type=ThreadName(),
    metavar="THREAD",
    help=f"The thread; default: {DEFAULT_THREAD}. Not needed with THREAD/ID.",
)
process_argument = click.argument("process", type=ProcessName(), metavar="PROCESS")
processes_argument = click.argument("processes", type=ProcessName(), nargs=-1, required=True, metavar="PROCESS...")
thread_argument = click.argument("thread", type=ThreadName(), metavar="THREAD")
yield_option = click.option(
    "--yield-ms", type=click.IntRange(0, 86_400_000), metavar="N", help="Milliseconds to wait for output."
)
tokens_option = click.option(
    "--max-output-tokens",
    type=click.IntRange(0, 1_000_000),
    default=10_000,
    metavar="N",
    help="Shorten the shown output to about N tokens of 4 bytes; default: 10000.",
)

wake_on_option = click.option(
    "--wake-on",
    multiple=True,
    metavar="RULE",
    help="Wake the thread on: exit, output=RE, silence=S, port=N, deadline=S; repeatable.",
)


def rules_from(texts: Sequence[str], option: str) -> list[Rule]:
    """Return the rules of an option; a wrong one is a usage error."""
    if not texts:
        return []
    from ..common.errors import BadRequest
    from ..common.rules import parse_all

    try:
        return parse_all(texts)
    except BadRequest as error:
        raise click.UsageError(f"{option}: {error}") from None


def key_of(process: Process, thread: str | None) -> tuple[str, str]:
    """Return thread and id of a PROCESS, given the option `-t`."""
    named, process_id = process
    if named and thread and named != thread:
        raise click.UsageError(f"process {named}/{process_id} is not of thread {thread}")
    return named or thread or DEFAULT_THREAD, process_id


def thread_of(host: Host, thread_id: str) -> Thread:
    """Return a thread without making it known: only `exec` does that."""
    from ..common.client import Thread

    return Thread(host, thread_id)


_THREAD_COLUMNS = ("THREAD", "STATE", "WORKER", "EPOCH", "ATTACHED", "DETACHED", "ENDED", "WAKES", "PROGRAM")


def thread_table(rows: Sequence[ThreadRow]) -> None:
    table(
        _THREAD_COLUMNS,
        [
            (
                row.thread,
                "running" if row.running else row.state,
                row.worker_pid,
                row.epoch,
                row.attached,
                row.detached,
                row.ended,
                row.wakes,
                row.program,
            )
            for row in rows
        ],
        numbers=_THREAD_COLUMNS[2:-1],
        spare=("EPOCH", "WORKER"),
    )
