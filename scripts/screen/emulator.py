"""What a terminal emulator is to us, and which one is taken.

Always true
    Bytes of any kind, in pieces of any size, are fed without an error and give the same screen.

Not here
    The emulators.  Whatever imports theirs costs a tenth of a second, so that happens in the renderer alone.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

# Cells of a screen; twenty times those of a large monitor's terminal.  A terminal may say that it has 4 billion.
CELLS_MAX = 250_000
# Characters of a title.
TITLE_MAX = 1_000
# What a gap is to a terminal.  A sequence or string that was under way is over; what programs set for the moment
# of one drawing, the scroll region, insert mode and charset, is as at the start.  What lasts is left as it was:
# the content, which screen it is, and whether the cursor shows.
AFTER_GAP = b"\x18\x1b\\\x1b7\x1b[r\x1b8\x1b[4l\x1b(B\x0f"


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """What an emulator shows: one text per row without the blanks at its end, and the cursor's place from 0."""

    lines: list[str]
    row: int
    column: int
    visible: bool
    alternate: bool
    title: str


class Emulator(Protocol):
    """A terminal that nobody looks at."""

    def __init__(self, columns: int, rows: int) -> None: ...

    def feed(self, data: bytes) -> None:
        """Draw what a program wrote."""

    def resize(self, columns: int, rows: int) -> None:
        """Become larger or smaller, as when a person draws at the window's corner."""

    def picture(self) -> Picture:
        """Return what it shows."""


def installed() -> type[Emulator] | None:
    """Return the best emulator that is installed and runs on this machine."""
    try:
        from .ghostty import Ghostty
    except (ImportError, OSError):  # not there, or a library for another kind of machine
        pass
    else:
        return Ghostty
    try:
        from .grid import Grid
    except ImportError:
        return None
    return Grid


def shown(text: str) -> str:
    """Return a line or title without what would drive the terminal of whoever reads it."""
    return text if text.isprintable() else "".join(c for c in text if not (c < " " or "\x7f" <= c < "\xa0"))
