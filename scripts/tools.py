"""`outlive exec` and `outlive write`: the two tools of an agent, for a person."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .arguments import DEFAULT_THREAD, Assignment, Key, Size, ThreadName
from .frame import (
    Process,
    command,
    in_thread,
    key_of,
    process_argument,
    rules_from,
    show,
    thread_of,
    tokens_option,
    wake_on_option,
    with_host,
    yield_option,
)
from .rendering import message

if TYPE_CHECKING:
    from ..common.client import Host, Thread
    from ..common.response import Response

# Seconds that input from a pipe may pause before what has come is typed.
_INPUT_PAUSE = 0.05


@command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-t", "--thread", type=ThreadName(), metavar="THREAD", help="The thread; made if it is new.")
@click.option(
    "--tty/--pipes", default=False, help="Run on a terminal that can be typed into, or (default) on pipes."
)
@click.option("--size", type=Size(), default="80x24", help="Size of the terminal; default: 80x24.")
@yield_option
@tokens_option
@click.option("-w", "--workdir", type=click.Path(), metavar="DIR", help="Directory to run in; default: this one.")
@click.option("-e", "--env", type=Assignment(), multiple=True, help="Set a variable; may be repeated.")
@wake_on_option
@click.option("--call-id", metavar="ID", help="The same ID again returns the same process and starts nothing.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def exec_(
    thread: str | None,
    tty: bool,
    size: tuple[int, int],
    yield_ms: int | None,
    max_output_tokens: int,
    workdir: str | None,
    env: Sequence[tuple[str, str]],
    wake_on: Sequence[str],
    call_id: str | None,
    cmd: Sequence[str],
    as_json: bool,
) -> None:
    """Start a command, and show what it prints.

    That is: until it ends, or for 10 seconds (--yield-ms). It runs on after that, and whatever happens to you,
    under the id that is shown. It gets this directory and this environment. Several words are a program and its
    arguments; one word with spaces is a line for the shell. The exit status is 0 whatever becomes of the command:
    `outlive wait` passes that on. Rules (--wake-on) wake the thread later, when one of them comes true.

    \b
    Examples: outlive exec -- make -j8
              outlive exec -t web --yield-ms 500 -- python3 -m http.server
              outlive exec --tty -- 'cd src && exec bash -i'
    """
    if call_id is not None and not 1 <= len(call_id) <= 256:
        raise click.UsageError(f"--call-id: {len(call_id)} characters; use 1 to 256")
    if cmd == ("",):
        raise click.UsageError("the command is empty")
    try:
        os.getcwd()
    except FileNotFoundError:
        if not (workdir and os.path.isabs(workdir)):
            raise click.ClickException("this directory does not exist any more; go to another one") from None
        os.chdir("/")
    rules = rules_from(wake_on, "--wake-on")
    one_line = len(cmd) == 1 and any(character.isspace() for character in cmd[0])

    async def work(host: Host) -> Response:
        return await thread_of(host, thread or DEFAULT_THREAD).exec_command(
            cmd[0] if one_line else cmd,
            workdir=workdir,
            tty=tty,
            size=size,
            yield_time_ms=10_000 if yield_ms is None else yield_ms,
            max_output_tokens=max_output_tokens,
            env=dict(env),
            call_id=call_id,
            wake_on=rules,
        )

    result = with_host(work)
    show(result, as_json, result.text())


@command("write")
@in_thread
@process_argument
@click.argument("text", default="", metavar="[TEXT]")
@click.option("--enter", is_flag=True, help="Press Enter at the end.")
@click.option(
    "--key", "keys", type=Key(), multiple=True, help="Press a key after TEXT: ctrl-c, up, tab …; repeatable."
)
@click.option(
    "--stdin", "from_stdin", is_flag=True, help="Type what standard input has, byte for byte, after that."
)
@yield_option
@tokens_option
@click.option("--write-id", metavar="ID", help="The same ID again types nothing more and is answered the same.")
@click.option("--no-resume", is_flag=True, help="Leave a sleeping thread asleep: the broker types.")
def write_(
    thread: str | None,
    process: Process,
    text: str,
    enter: bool,
    keys: Sequence[str],
    from_stdin: bool,
    yield_ms: int | None,
    max_output_tokens: int,
    write_id: str | None,
    no_resume: bool,
    as_json: bool,
) -> None:
    """Type into a process, and show what it prints.

    That is: since the last call, until it ends or for a quarter of a second (--yield-ms). Typed are TEXT, the
    keys, standard input (--stdin), and Enter, in this order; with none of them this only waits for output. Enter
    is what a keyboard sends for it, a carriage return: the terminal makes a line feed of it for programs that read
    lines, and others (editors, shells with line editing) expect it so. With --stdin this goes on until all is
    typed or the process has ended, as long as that takes.

    \b
    Examples: outlive write 4711 'print(6 * 7)' --enter
              outlive write 4711 --key ctrl-c
              outlive write 4711 --stdin < input.txt
    """
    if write_id is not None:
        if not 1 <= len(write_id) <= 256:
            raise click.UsageError(f"--write-id: {len(write_id)} characters; use 1 to 256")
        if from_stdin:
            raise click.UsageError("--write-id names one call, and --stdin may take several; leave one out")
    key = key_of(process, thread)
    typed = os.fsencode(text) + "".join(keys).encode()
    ending = b"\r" if enter else b""
    options: dict[str, Any] = {"max_output_tokens": max_output_tokens, "resume": not no_resume}
    last_yield = 250 if yield_ms is None else yield_ms

    async def work(host: Host) -> Response:
        target = thread_of(host, key[0])
        if not from_stdin:
            return await target.write_stdin(
                key[1], typed + ending, yield_time_ms=last_yield, write_id=write_id, **options
            )
        return await _type_input(target, key[1], typed, ending, last_yield, options)

    result = with_host(work)
    show(result, as_json, result.text())


async def _type_input(
    thread: Thread, process_id: str, first: bytes, ending: bytes, last_yield: int, options: dict[str, Any]
) -> Response:
    """Type `first`, standard input and `ending`, in as many calls as it takes; return their results as one."""
    from ..common.errors import OutliveError
    from ..common.messages import CHARS_MAX

    results: list[Response] = []
    done, left, more = 0, first, True
    while True:
        if more and len(left) < CHARS_MAX:
            data = await _read_input(CHARS_MAX - len(left))
            more = bool(data)
            left += data or ending
        if not (left or more) and results:
            break
        piece = left[:CHARS_MAX]
        final = not more and len(left) == len(piece)
        try:
            result = await thread.write_stdin(
                process_id, piece, yield_time_ms=last_yield if final else 250, **options
            )
        except OutliveError:
            if done:
                message(f"{done} bytes of the input were typed before this:")
            raise
        results.append(result)
        done += result.typed
        left = left[result.typed :]
        if result.outcome is not None:
            if left or more:
                message(f"process {process_id} has ended after {done} bytes of the input")
            break
    return _joined(results, options["max_output_tokens"])


async def _read_input(limit: int) -> bytes:
    """Return what standard input has before it pauses, at most `limit` bytes; empty at its end."""
    import asyncio
    from contextlib import suppress

    if sys.stdin is None:
        return b""
    loop, data, ready = asyncio.get_running_loop(), bytearray(), asyncio.Event()
    try:
        loop.add_reader(0, ready.set)
    except PermissionError:  # a file: always ready
        return os.read(0, limit)
    with suppress(TimeoutError):
        try:
            while len(data) < limit:
                ready.clear()
                async with asyncio.timeout(_INPUT_PAUSE if data else None):
                    await ready.wait()
                piece = os.read(0, limit - len(data))
                data += piece
                if not piece:
                    break
        finally:
            loop.remove_reader(0)
    return bytes(data)


def _joined(results: Sequence[Response], max_tokens: int) -> Response:
    """Return the results of several calls as if it had been one."""
    from msgspec import structs

    from ..common.response import clip

    if len(results) == 1:
        return results[0]
    output = "".join(result.output for result in results).encode()
    # "send the rest again" has been done.
    warnings = [warning for result in results for warning in result.warnings if not warning.startswith("only ")]
    return structs.replace(
        results[-1],
        wall_time_seconds=sum(result.wall_time_seconds for result in results),
        original_token_count=sum(result.original_token_count for result in results),
        output=clip([(0, output)], 0, len(output), max_tokens),
        typed=sum(result.typed for result in results),
        warnings=list(dict.fromkeys(warnings)),
    )
