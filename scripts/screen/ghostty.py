"""libghostty-vt as emulator: the terminal of Ghostty, native, fast and complete.

Not here
    Answers to what programs ask a terminal: they would have to be typed, and an observer types nothing.
"""

from __future__ import annotations

from pyghostty import Terminal
from pyghostty._ffi import check, ffi, lib

from .emulator import TITLE_MAX, Picture, shown

# Lines that have left at the top: a terminal that becomes higher shows them again.
_SCROLLBACK = 200


class Ghostty:
    """An `Emulator`."""

    def __init__(self, columns: int, rows: int) -> None:
        self._size = columns, rows
        self._terminal = Terminal(cols=columns, rows=rows, scrollback=_SCROLLBACK)
        # No pictures: we would not see them, and a program may name one by a file, which a terminal then deletes.
        limit = lib.GHOSTTY_TERMINAL_OPT_KITTY_IMAGE_STORAGE_LIMIT
        check(lib.ghostty_terminal_set(self._terminal._t[0], limit, ffi.new("uint64_t*", 0)), "no pictures")

    def feed(self, data: bytes) -> None:
        # It gives DEL a cell, which nothing else does; no character of several bytes has one in it.
        self._terminal.feed(data.replace(b"\x7f", b""))

    def resize(self, columns: int, rows: int) -> None:
        self._size = columns, rows
        self._terminal.resize(columns, rows)

    def picture(self) -> Picture:
        if self._terminal.size != self._size:  # a program asked for 132 columns, which its terminal does not have
            self._terminal.resize(*self._size)
        _, rows = self._size
        column, row = self._terminal.cursor
        lines = [shown(line).rstrip() for line in self._terminal.text().split("\n")[:rows]]
        said = self._terminal.get("title", "GhosttyString")
        title = bytes(ffi.buffer(said.ptr, said.len)) if said.len else b""
        return Picture(
            lines=lines + [""] * (rows - len(lines)),
            row=row,
            column=column,
            visible=bool(self._terminal.get("cursor_visible", "bool")),
            alternate=bool(self._terminal.get("active_screen", "GhosttyTerminalScreen")),
            title=shown(title.decode("utf-8", "replace")[:TITLE_MAX]),
        )
