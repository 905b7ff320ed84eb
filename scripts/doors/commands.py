"""`outlive mcp` and `outlive tool`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..arguments import DEFAULT_THREAD, ThreadName
from ..frame import command, show, thread_of, with_host
from ..rendering import message

if TYPE_CHECKING:
    from ...common.client import Host
    from .vocabulary import Answer


class Address(click.ParamType[tuple[str, int]]):
    """An address to listen at: `PORT`, or `HOST:PORT`, with an IPv6 host in brackets."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return host and port."""
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not port.isdecimal() or int(port) > 65_535:
            self.fail(f"{value!r}: use [HOST:]PORT, such as 127.0.0.1:8400", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


@command()
@click.option(
    "-t",
    "--thread",
    type=ThreadName(),
    metavar="THREAD",
    help="The thread; default: one of this folder's own. Made if it is new.",
)
@click.option(
    "--http", type=Address(), metavar="[HOST:]PORT", help="Serve over HTTP, on loopback unless HOST says otherwise."
)
def mcp(thread: str | None, http: tuple[str, int] | None, as_json: bool) -> None:
    """Serve agents through the Model Context Protocol.

    On standard input and output, for a client that starts this command: it gets tools to start commands, type into
    them, wait for them and read what they print. All that it starts belongs to one thread, and lives on when this
    command or its client ends.

    With --http clients need a token: the one in OUTLIVE_MCP_TOKEN, or in the file that is named at the start.

    \b
    Examples: outlive mcp
              outlive mcp --http 8400
    """
    import asyncio
    import gc
    import os
    import signal
    from contextlib import AsyncExitStack

    from ...common.client import connect
    from .project import thread_of_folder

    # It has nothing to clean up, and a read of standard input cannot be interrupted otherwise.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # a fifth of the time to start goes into looking for garbage among classes
    try:
        from .bridge import serve_stdio
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed; pip install 'outlive[mcp]'") from None
    gc.freeze()
    gc.enable()
    if http is None and (sys.stdin is None or sys.stdout is None):
        raise click.ClickException("standard input or output is closed; a client starts this command with both")
    if http is None and sys.stdin.isatty():
        message("serving the Model Context Protocol on this terminal, where a client is expected; Ctrl-C ends it")
    host = connect(start=not click.get_current_context().find_root().meta.get("no-start"))
    try:
        served = thread_of(host, thread or thread_of_folder(os.getcwd()))
    except FileNotFoundError:
        raise click.ClickException(
            "the folder that this runs in is gone; start it in another one, or name a thread with --thread"
        ) from None

    async def run() -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_exit(host)  # it connects when the first call needs it
            if http is None:
                await serve_stdio(served)
                return
            from .endpoint import serve_http, token_of

            token, source = token_of(host.paths, os.environ)

            def announce(url: str) -> None:
                text = f"{url}\nthe token is in {source}; the thread is {served.thread_id}"
                show({"url": url, "token_source": source, "thread": served.thread_id}, as_json, text)

            await serve_http(served, *http, token, announce)

    asyncio.run(run())


@command()
@click.option("-t", "--thread", type=ThreadName(), metavar="THREAD", help="The thread; made if it is new.")
@click.argument("name", required=False, metavar="[NAME]")
@click.argument("arguments", default="{}", metavar="[JSON]")
def tool(thread: str | None, name: str | None, arguments: str, as_json: bool) -> None:
    """Call a tool of agents; without NAME list the tools.

    They are those of `outlive mcp`, with the same names, arguments and answers, for an agent that has only a shell.
    JSON is an object with the arguments; - reads it from standard input.

    \b
    Examples: outlive tool exec_command '{"cmd": "python3 -q", "tty": true}'
              outlive tool write_stdin '{"session_id": 52328, "chars": "6 * 7\\n"}'
              outlive tool wait '{"session_ids": [52328], "timeout_ms": 600000}'
    """
    from ...common.errors import BadRequest
    from .catalogue import TOOLS, call, tool_of
    from .schema import understood

    if name is None:
        show([one.to_builtins() for one in TOOLS.values()], as_json, "\n\n".join(map(_shown, TOOLS.values())))
        return
    try:
        given = _decoded(_standard_input() if arguments == "-" else arguments)
        understood(tool_of(name).arguments, given)
    except BadRequest as error:
        raise click.UsageError(str(error)) from None

    async def work(host: Host) -> Answer:
        return await call(thread_of(host, thread or DEFAULT_THREAD), name, given)

    answer = with_host(work)
    show(answer.structured(), as_json, answer.text())


def _standard_input() -> bytes:
    with open(0, "rb", closefd=False) as file:
        return file.read()


def _decoded(text: str | bytes) -> Any:
    import json

    from ...common.errors import BadRequest, shown

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"arguments: {shown(text)} is no JSON: {error}; use an object, such as {{}}") from None


def _shown(one: Any) -> str:
    """Return a tool as text, with its arguments."""
    import json
    from textwrap import fill

    lines = [f"{one.name}", fill(one.description, 100, initial_indent="  ", subsequent_indent="  ")]
    schema = one.to_builtins()["inputSchema"]
    for name, field in schema["properties"].items():
        needed = f"default {json.dumps(field['default'])}" if "default" in field else "optional"
        needed = "required" if name in schema.get("required", ()) else needed
        head = f"    {name} ({field['type']}, {needed}): "
        lines.append(fill(head + field.get("description", ""), 100, subsequent_indent="      "))
    return "\n".join(lines)
