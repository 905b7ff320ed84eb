"""How results leave the command line: bytes, text, JSON and tables on standard output, one line on standard error.

Always true
    Standard output carries data only, as UTF-8 whatever the locale says, and unbuffered: nothing is left over for
    the interpreter's end, where a closed pipe could only be reported badly.
    A table is drawn for people on a terminal; elsewhere it is plain columns, never cut.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_STDOUT = 1
# Characters of a message: what was typed wrongly may be huge.
_MESSAGE_MAX = 1000
# Between two columns of a table; and characters of the last one that are worth more than what can be spared.
_BETWEEN = "  "
_LAST_WIDTH = 40


class ReaderGone(Exception):
    """Whoever read our standard output has left: nothing is wrong, and nothing is left to do."""


def write(data: bytes) -> None:
    """Write to standard output; raises `ReaderGone`, or `OSError` when it cannot be written to."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(_STDOUT, view) :]
        except BlockingIOError:  # somebody who shares it has made it non-blocking
            select.select([], [_STDOUT], [])
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            raise OSError(error.errno, f"standard output: {error.strerror}") from None


def write_text(text: str) -> None:
    """Write text as it is; what no encoding has becomes a replacement character."""
    write(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode())


def write_line(text: str) -> None:
    """Write text that ends with a line feed, adding it if need be."""
    write_text(text if text.endswith("\n") else text + "\n")


def write_json(value: Any) -> None:
    """Write plain data as one line of JSON."""
    import json

    write_line(json.dumps(value, ensure_ascii=False))


def message(text: str) -> None:
    """Write one line for people to standard error."""
    if sys.stderr is None:
        return
    line = "outlive: " + printable(" ".join(text.split()))
    if len(line) > _MESSAGE_MAX:
        line = line[: _MESSAGE_MAX - 1] + "…"
    with suppress(OSError):  # nobody may be there to be told
        os.write(2, (line + "\n").encode("utf-8", "replace"))


def printable(text: str) -> str:
    """Return `text` without what would drive a terminal or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Write rows under their headings; `numbers` names the columns that are set to the right.

    `spare`: what a terminal goes without, in this order, as long as the last column finds too little room on it.
    """
    cells = [[printable("-" if cell is None else str(cell)) for cell in row] for row in rows]
    filled = [[name, *column] for name, *column in zip(columns, *cells, strict=True)]
    if sys.stdout is None or not os.isatty(_STDOUT):
        write_line("\n".join(_lines(filled, numbers)))
        return
    import shutil

    width = shutil.get_terminal_size().columns  # also by COLUMNS, unless that is no number of any
    for name in spare:
        if _width_before_last(filled) + min(_LAST_WIDTH, *_widths(filled[-1:])) <= width:
            break
        filled = [column for column in filled if column[0] != name]
    _draw(_lines(filled, numbers), width)


def _widths(filled: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in filled]


def _width_before_last(filled: Sequence[Sequence[str]]) -> int:
    return sum(width + len(_BETWEEN) for width in _widths(filled[:-1]))


def _lines(filled: Sequence[Sequence[str]], numbers: Sequence[str]) -> list[str]:
    padded = [
        [cell.rjust(width) if column[0] in numbers else cell.ljust(width) for cell in column]
        for column, width in zip(filled, _widths(filled), strict=True)
    ]
    return [_BETWEEN.join(line).rstrip() for line in zip(*padded, strict=True)]


def _draw(lines: Sequence[str], width: int) -> None:
    """For a terminal: the headings stand out, and no line is longer than the terminal is wide."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, width=width, height=len(lines))
    for number, line in enumerate(lines):
        text = Text(line, style="" if number else "bold", no_wrap=True, overflow="ellipsis")
        console.print(text, no_wrap=True, overflow="ellipsis")


@contextmanager
def ends_with_reader() -> Iterator[None]:
    """While something is waited for: cancel the running task, with `ReaderGone`, when our reader leaves.

    A write would notice, but there may be nothing to write for hours.
    """
    import asyncio

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    gone = False

    def hung_up() -> None:
        nonlocal gone
        gone = True
        loop.remove_reader(watch.fileno())
        task.cancel()

    with select.epoll() as watch:
        try:
            watch.register(_STDOUT, 0)  # a hang-up is told unasked
        except OSError:  # a file: it cannot hang up
            yield
            return
        loop.add_reader(watch.fileno(), hung_up)
        try:
            yield
        except asyncio.CancelledError:
            if gone:
                raise ReaderGone from None
            raise
        finally:
            loop.remove_reader(watch.fileno())
