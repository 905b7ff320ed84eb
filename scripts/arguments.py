"""What words on the command line stand for: processes, sizes, keys, signals; and how a shell completes them.

A word that can be nothing of the kind is a usage error, found before a broker is started for it.  Completion asks
a broker that runs, and never starts one; whatever goes wrong there means that nothing is offered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from ..common.client import Host

DEFAULT_THREAD = "default"

# Seconds that a shell waits for our proposals: a person who pressed Tab is looking on.
_COMPLETION_DEADLINE = 1.0

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_CELLS_MAX = 65_535

# What a terminal sends for a key; the cursor keys as in their normal mode.  Ctrl with a letter: see `Key`.
_KEYS = {
    "enter": "\r",
    "tab": "\t",
    "shift-tab": "\x1b[Z",
    "esc": "\x1b",
    "space": " ",
    "backspace": "\x7f",
    "up": "\x1b[A",
    "down": "\x1b[B",
    "right": "\x1b[C",
    "left": "\x1b[D",
    "home": "\x1b[H",
    "end": "\x1b[F",
    "insert": "\x1b[2~",
    "delete": "\x1b[3~",
    "page-up": "\x1b[5~",
    "page-down": "\x1b[6~",
    "ctrl-space": "\0",
    "ctrl-[": "\x1b",
    "ctrl-\\": "\x1c",
    "ctrl-]": "\x1d",
    "ctrl-^": "\x1e",
    "ctrl-_": "\x1f",
}
_SIGNALS = ("TERM", "INT", "HUP", "QUIT", "KILL", "STOP", "CONT", "TSTP", "USR1", "USR2", "WINCH")


class ThreadName(click.ParamType[str]):
    """A thread's name."""

    name = "thread"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name if a thread may be called that."""
        from ..common.errors import BadRequest
        from ..common.names import check_thread

        try:
            return check_thread(str(value))
        except BadRequest as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the threads of the running broker."""

        async def names(host: Host) -> list[CompletionItem]:
            return [CompletionItem(row.thread, help=row.state) for row in await host.threads()]

        return [item for item in _ask(names) if item.value.startswith(incomplete)]


class ProcessName(click.ParamType[tuple[str | None, str]]):
    """A process: `ID`, or `THREAD/ID`; becomes (thread or `None`, id)."""

    name = "process"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str | None, str]:
        """Return the thread, if it was named, and the process id."""
        from ..common.errors import BadRequest
        from ..common.names import check_process, check_thread

        if isinstance(value, tuple):
            return value
        thread, slash, process_id = str(value).rpartition("/")
        try:
            return (check_thread(thread) if slash else None), check_process(process_id)
        except BadRequest as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the processes of the running broker, those of other threads as `THREAD/ID`."""
        thread = ctx.params.get("thread") or DEFAULT_THREAD

        async def names(host: Host) -> list[CompletionItem]:
            # What has ended still has output and an outcome.
            rows = await host.processes(ended=ctx.info_name in ("logs", "screen", "wait", "write"))
            return [
                CompletionItem(
                    row.process_id if row.thread == thread else f"{row.thread}/{row.process_id}",
                    help=f"{row.state}: {' '.join(row.command)}"[:60].replace("\n", " "),
                )
                for row in rows
            ]

        return [item for item in _ask(names) if item.value.startswith(incomplete)]


class Seconds(click.FloatRange):
    """A time to wait."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the seconds; `nan` and `inf` are none."""
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


class WakeNumber(click.ParamType[int]):
    """A wake, by its number."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        text = str(value)
        if not (text.isascii() and text.isdecimal() and 0 < int(text[:20]) < 1 << 62):
            self.fail(f"wake {text[:40]!r}: use its number, as `outlive wakes` shows it", param, ctx)
        return int(text)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer what is not over."""

        async def numbers(host: Host) -> list[CompletionItem]:
            return [
                CompletionItem(
                    str(row.number), help=f"{row.state}: {row.thread} {row.process_id or ''} {row.rule}"[:60]
                )
                for row in await host.wakes()
            ]

        return [item for item in _ask(numbers) if item.value.startswith(incomplete)]


class Size(click.ParamType[tuple[int, int]]):
    """A terminal's size, `COLSxROWS`; becomes (columns, rows)."""

    name = "COLSxROWS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return columns and rows."""
        if isinstance(value, tuple):
            return value
        found = _SIZE.fullmatch(str(value))
        columns, rows = (int(found[1]), int(found[2])) if found else (0, 0)
        if not (1 <= columns <= _CELLS_MAX and 1 <= rows <= _CELLS_MAX):
            wanted = f"write columns x rows, each 1 to {_CELLS_MAX}, such as 80x24"
            self.fail(f"size {str(value)[:40]!r}: {wanted}", param, ctx)
        return columns, rows


class Assignment(click.ParamType[tuple[str, str]]):
    """A variable of the environment, `K=V`; becomes (name, value)."""

    name = "K=V"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        variable, equals, content = str(value).partition("=")
        if not (variable and equals):
            self.fail(f"variable {str(value)[:40]!r}: write NAME=VALUE", param, ctx)
        return variable, content


class Key(click.ParamType[str]):
    """A key of the keyboard; becomes what a terminal sends for it."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the characters."""
        key = str(value).lower()
        letter = re.fullmatch("ctrl-([a-z])", key)
        if not letter and key not in _KEYS:
            self.fail(f"key {str(value)[:40]!r}: use ctrl-a to ctrl-z, {', '.join(_KEYS)}", param, ctx)
        return chr(ord(letter[1]) & 0x1F) if letter else _KEYS[key]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names."""
        names = [*_KEYS, *(f"ctrl-{chr(letter)}" for letter in range(ord("a"), ord("z") + 1))]
        return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


class Signal(click.ParamType[int]):
    """A signal by name or number; becomes its number."""

    name = "signal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        from ..common.outcome import signal_number

        if len(str(value)) > 40:
            self.fail(f"signal {str(value)[:40]!r}…: use a name such as TERM, or a number", param, ctx)
        try:
            return signal_number(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the usual ones."""
        return [CompletionItem(name) for name in _SIGNALS if name.startswith(incomplete.upper())]


def _ask(question: Callable[[Host], Awaitable[list[CompletionItem]]]) -> list[CompletionItem]:
    """Return what the running broker says; nothing when none runs, or it takes too long."""
    import asyncio

    from ..common.client import connect

    async def ask() -> list[CompletionItem]:
        async with asyncio.timeout(_COMPLETION_DEADLINE), connect(start=False) as host:
            return await question(host)

    try:
        return asyncio.run(ask())
    except Exception:  # a shell has no place for our errors: it would show them amid the line being typed
        return []
