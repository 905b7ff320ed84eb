"""The commands that change something: the broker, processes, threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .arguments import Seconds, Signal, Size, ThreadName
from .frame import (
    Commands,
    Process,
    command,
    in_thread,
    key_of,
    process_argument,
    processes_argument,
    show,
    thread_argument,
    thread_of,
    thread_table,
    with_host,
)
from .rendering import message

if TYPE_CHECKING:
    from ..common.client import Host
    from ..common.messages import ThreadRow

# The broker.


@command()
def up(as_json: bool) -> None:
    """Start the broker, if none runs yet.

    Rarely needed: every command that needs the broker starts it.

    \b
    Example: outlive up
    """
    status = with_host(lambda host: host.status())
    show(status, as_json, f"the broker runs: pid {status['broker_pid']}, version {status['version']}")


@command()
@click.option("--force", is_flag=True, help="End all processes first.")
def down(force: bool, as_json: bool) -> None:
    """End the broker.

    It has gone when this returns. Refuses, naming them, while processes live.

    \b
    Example: outlive down --force
    """
    from ..common.errors import Unavailable
    from ..common.paths import Paths

    try:
        answer = with_host(lambda host: host.down(force=force), start=False)
    except Unavailable:
        if Paths.from_environment().channel.exists():  # one that died left it, one that is stuck holds the lock
            raise
        answer = {"ended": []}
    ended = answer["ended"]
    show(answer, as_json, "the broker is down" + (f"; ended {', '.join(ended)}" if ended else ""))


# Acting on processes.


@command()
@in_thread
@processes_argument
@click.option("-s", "--signal", type=Signal(), default="TERM", help="The signal; default: TERM.")
@click.option("--after", type=Seconds(), metavar="S", help="Kill what still lives after S seconds.")
@click.option("--foreground", is_flag=True, help="Signal only what runs in the foreground of its terminal.")
def kill(
    thread: str | None,
    processes: Sequence[Process],
    signal: int,
    after: float | None,
    foreground: bool,
    as_json: bool,
) -> int:
    """Signal processes and what they have started.

    Nothing follows the signal unless --after is given. Of one thread either all are signalled, or none.

    \b
    Examples: outlive kill 4711 --after 5
              outlive kill -s INT --foreground 4711
    """
    from ..common.errors import OutliveError
    from ..common.outcome import signal_name

    by_thread: dict[str, list[str]] = {}
    for thread_id, process_id in dict.fromkeys(key_of(process, thread) for process in processes):
        by_thread.setdefault(thread_id, []).append(process_id)

    failures: list[OutliveError] = []

    async def one(host: Host, thread_id: str, ids: list[str]) -> list[dict[str, Any]]:
        try:
            return await thread_of(host, thread_id).kill(*ids, signal=signal, foreground=foreground, after=after)
        except OutliveError as error:
            failures.append(error)  # what was done in other threads is told first
            return []

    async def work(host: Host) -> list[dict[str, Any]]:
        import asyncio

        answers = await asyncio.gather(*(one(host, thread_id, ids) for thread_id, ids in by_thread.items()))
        if failures and not any(answers):
            raise failures[0]
        return [row for rows in answers for row in rows]

    rows = with_host(work)
    lines = []
    for row in rows:
        count = row["signalled"]
        done = f"{signal_name(row['signal'])} sent to {count} process{'' if count == 1 else 'es'} of its tree"
        lines.append(f"{row['thread']}/{row['process_id']}: {done if count else 'has ended, nothing to signal'}")
    show(rows, as_json, "\n".join(lines))
    for failure in failures:
        message(str(failure))
    return 1 if failures else 0


@command()
@in_thread
@process_argument
@click.argument("size", type=Size(), metavar="COLSxROWS")
def resize(thread: str | None, process: Process, size: tuple[int, int], as_json: bool) -> None:
    """Set the size of a process's terminal.

    \b
    Example: outlive resize 4711 120x40
    """
    thread_id, process_id = key_of(process, thread)
    answer = with_host(lambda host: thread_of(host, thread_id).resize(process_id, *size))
    show(answer, as_json, f"{thread_id}/{process_id}: {answer['columns']}x{answer['rows']}")


# Acting on threads.


def _counted(count: int, ids: Sequence[str]) -> str:
    named = f": {', '.join(ids)}" if ids else ""
    return f"{count} process{'' if count == 1 else 'es'}{named}"


@command()
@thread_argument
@click.option("--keep-worker", is_flag=True, help="Leave the thread's worker up.")
def detach(thread: str, keep_worker: bool, as_json: bool) -> None:
    """Put a thread to sleep.

    Its processes go to the broker and run on, its worker ends. A program that runs is waited for.

    \b
    Example: outlive detach build
    """
    answer = with_host(lambda host: thread_of(host, thread).detach(keep_worker=keep_worker))
    show(answer, as_json, f"detached {_counted(answer.process_count, answer.process_ids)}")


@command()
@thread_argument
def resume(thread: str, as_json: bool) -> None:
    """Wake a thread.

    Its next worker starts, and takes its processes back.

    \b
    Example: outlive resume build
    """
    row = with_host(lambda host: thread_of(host, thread).resume())
    text = (
        f"thread {row.thread} is {row.state}: worker {row.worker_pid}, epoch {row.epoch}, {row.attached} attached"
    )
    show(row, as_json, text)


@command()
@thread_argument
@click.argument("program", nargs=-1, required=True, metavar="MODULE:FUNCTION|FILE.py:FUNCTION|-- COMMAND...")
@click.option(
    "-w", "--workdir", type=click.Path(), metavar="DIR", help="Where the program is found and runs; default: here."
)
@click.option("--even-read", is_flag=True, help="Wake it also for ends that the agent has learned by itself.")
def start(thread: str, program: tuple[str, ...], workdir: str | None, even_read: bool, as_json: bool) -> None:
    """Give a thread a program, and wake it.

    A function, `async def main(session, wake)`, lives in the thread's worker. It is called now, and again when a
    wake rule of a process comes true; when it returns, the thread goes to bed with its processes running.

    A command is run instead, with the wake as JSON on its standard input and, unless that is longer than 100 kB, in
    OUTLIVE_WAKE; exit status 0 means that it has taken the wake. One word with a colon is a function, one with
    spaces a line for the shell.

    \b
    Examples: outlive start build agent.py:main
              outlive start build -- ./on-wake --verbose
    """
    given: str | list[str] = list(program)
    if len(program) == 1:
        place, colon, _ = program[0].rpartition(":")
        one_line = any(character.isspace() for character in program[0]) and not place.endswith(".py")
        if one_line:
            given = ["/bin/sh", "-c", program[0]]
        elif colon:
            given = program[0]
    row = with_host(lambda host: thread_of(host, thread).start(given, workdir=workdir, even_read=even_read))
    show(row, as_json, f"thread {row.thread} runs {row.program}")


@command()
@thread_argument
def stop(thread: str, as_json: bool) -> None:
    """Take a thread's program away.

    One that runs is ended, and what it would have been woken for is dropped. The thread's processes run on.

    \b
    Example: outlive stop build
    """
    row = with_host(lambda host: thread_of(host, thread).stop())
    show(row, as_json, f"thread {row.thread} has no program; {row.attached + row.detached} processes run on")


@command()
@thread_argument
def reattach(thread: str, as_json: bool) -> None:
    """Give detached processes to a worker that is up.

    As after `detach --keep-worker`; without a worker it is an error, see `resume`.

    \b
    Example: outlive reattach build
    """
    answer = with_host(lambda host: thread_of(host, thread).reattach())
    text = f"reattached {_counted(answer.reattached_count, [])}"
    if answer.skipped_count:
        text += f"; skipped {_counted(answer.skipped_count, answer.skipped_process_ids)}"
    show(answer, as_json, text)


@command()
@thread_argument
def clean(thread: str, as_json: bool) -> None:
    """End a thread's detached processes.

    Attached ones are left alone.

    \b
    Example: outlive clean build
    """
    answer = with_host(lambda host: thread_of(host, thread).clean())
    show(answer, as_json, f"ended {_counted(answer.process_count, answer.process_ids)}")


@command()
@click.argument("thread", type=ThreadName(), required=False, metavar="[THREAD]")
@click.option("--all", "everything", is_flag=True, help="End the thread's detached processes too.")
def shutdown(thread: str | None, everything: bool, as_json: bool) -> None:
    """End a thread's worker and processes.

    Its detached processes are left alone, unless --all is given. Without THREAD this ends everything of every
    thread. A program is taken away, as by `outlive stop`: nothing is left to wake it for.

    \b
    Example: outlive shutdown build --all
    """

    async def work(host: Host) -> list[ThreadRow]:
        if thread is None:
            return await host.shutdown()
        return [await thread_of(host, thread).shutdown(all=everything)]

    rows = with_host(work)
    if as_json:
        show(rows if thread is None else rows[0], True, "")
    else:
        thread_table(rows)


# The broker itself: how it is installed, and which code it runs.


@click.group(cls=Commands)
def broker() -> None:
    """Upgrade the broker in place; install it as a systemd unit, or take it out again.

    Under systemd it starts with the machine, and even the death of the broker and of its keeper at once loses
    nothing: systemd holds copies of all descriptors.
    """


@command()
@click.option(
    "--user/--system", "user", default=True, help="Your own manager (default), or the machine's, as root."
)
@click.option("--dry-run", is_flag=True, help="Print the unit, and change nothing.")
def install(user: bool, dry_run: bool, as_json: bool) -> None:
    """Install the broker as a systemd unit and start it.

    From then on it starts with the machine, and commands that need a broker start it through the unit.

    \b
    Examples: outlive broker install
              sudo outlive broker install --system
              outlive broker install --dry-run
    """
    from . import installation
    from .rendering import message

    if dry_run:
        text = installation.preview(system=not user)
        show({"text": text}, as_json, text)
        return
    done = installation.install(system=not user, say=message)
    show(done, as_json, f"{done['unit']} is installed and runs: {done['path']}")


@command()
@click.option("--force", is_flag=True, help="End all processes first.")
def uninstall(force: bool, as_json: bool) -> None:
    """Stop the broker's systemd unit and remove it.

    Refuses, naming them, while processes live.

    \b
    Example: outlive broker uninstall --force
    """
    from . import installation

    def down(force: bool) -> list[str]:
        answer = with_host(lambda host: host.down(force=force), start=False)
        return [str(name) for name in answer["ended"]]

    done = installation.uninstall(force=force, down=down)
    ended = done["ended"]
    text = f"{done['unit']} is removed" + (f"; ended {', '.join(ended)}" if ended else "")
    show(done, as_json, text)


@command()
def upgrade(as_json: bool) -> None:
    """Have the installed program take over from the running broker and its keeper.

    Processes and workers run on; callers see at most a delay. When the new broker does not come up, the old one
    serves on, and this says why.

    \b
    Example: outlive broker upgrade
    """
    status = with_host(lambda host: host.upgrade(), start=False)
    show(status, as_json, f"the broker was replaced: pid {status['broker_pid']}, version {status['version']}")


for _command in (install, uninstall, upgrade):
    broker.add_command(_command)
