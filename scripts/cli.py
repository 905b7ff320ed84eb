"""`outlive`: the command line.  Each command is a thin dress over methods of the Python API.

Always true
    Standard output is data, standard error is messages, one line each; no traceback for a foreseeable mistake.
    Exit status: 0; 1 our error; 2 usage; 124 timed out; 130 interrupted; 141 when our reader has left.  `wait` of
    one process passes its exit code on (128 + N for signal N, 125 for `lost`).
    A command that only prints help imports neither asyncio nor ZeroMQ: it answers at once.

    arguments   what the words stand for, and shell completion.
    rendering   how results leave.
    frame       what all commands share.
    tools       exec, write.
    views       what only looks: status, doctor, ps, threads, wakes, logs, screen, events.
    orders      what changes something: up, down, kill, resize, whatever is done to a thread, and `broker`.
    doctor/     the checks of `outlive doctor`.
    doors/      what agents come in by: mcp, tool.
"""

from __future__ import annotations

import os
import sys

import click

from .. import __version__
from . import orders, tools, views, waiting
from .doors import commands as doors
from .frame import FAILED, INTERRUPTED, NO_START, READER_GONE, USAGE, Commands
from .rendering import ReaderGone, message, write_json, write_line


@click.group(
    cls=Commands,
    params=[NO_START],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Run processes that outlive the agent, worker or terminal that started them.

    Processes belong to named threads (default: "default"). They keep running, keep their ids and lose no output
    when whoever started them dies; a small broker in the background, started when needed, looks after them.

    \b
        outlive exec --tty -- python3 -i       start it; prints its id, say 4711
        outlive write 4711 'print(6 * 7)' --enter
        outlive logs 4711
        outlive kill 4711
    """


for _command in (
    orders.up,
    orders.down,
    views.status,
    views.doctor,
    tools.exec_,
    tools.write_,
    views.ps,
    views.threads,
    views.wakes,
    views.logs,
    views.screen,
    waiting.wait,
    waiting.watch,
    orders.kill,
    orders.resize,
    views.events,
    orders.start,
    orders.stop,
    orders.detach,
    orders.resume,
    orders.reattach,
    orders.clean,
    orders.shutdown,
    orders.broker,
    doors.mcp,
    doors.tool,
):
    cli.add_command(_command)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell.

    It completes commands, options, threads and processes.

    \b
    Examples: eval "$(outlive completion bash)"        in ~/.bashrc
              eval "$(outlive completion zsh)"         in ~/.zshrc
              outlive completion fish > ~/.config/fish/completions/outlive.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    # Not the bash class's own `source`, which runs a bash first to look at its version.
    script = ShellComplete.source(complete(cli, {}, "outlive", "_OUTLIVE_COMPLETE"))
    write_json({"shell": shell, "script": script}) if as_json else write_line(script)


def main() -> int:
    """Run the command line; returns the exit status."""
    # A closed standard stream would be the number of our next socket, and be written to.
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        result = cli.main(prog_name="outlive", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ReaderGone:
        return READER_GONE
    except (KeyboardInterrupt, click.Abort):
        message("interrupted; what was started runs on (see `outlive ps`)")
        return INTERRUPTED
    except click.ClickException as error:
        return _complain(error)
    except Exception as error:
        from ..common.errors import OutliveError

        if not isinstance(error, (OutliveError, OSError)):
            raise
        message(str(error) or type(error).__name__)
        return FAILED


def _complain(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None) or None
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        return USAGE
    hint = f"; see `{context.command_path} --help`" if context else ""
    message(error.format_message().rstrip(".") + hint)
    return USAGE if isinstance(error, click.UsageError) else FAILED


if __name__ == "__main__":
    sys.exit(main())
