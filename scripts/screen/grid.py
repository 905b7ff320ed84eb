"""pyte as emulator, where no native one is installed: its grid, with a parser and the repairs that it needs.

pyte's own parser raises on some sequences that programs do send, prints parts of others, and knows no alternate
screen; its grid stays at odds with real terminals where margins, wide characters or the last column are concerned.
What follows is what xterm and tmux do.

Always true
    Nothing raises, whatever is fed; no sequence or string is remembered beyond a few kilobytes.

Not here
    Colours and other attributes, which a `Picture` lacks.  Lines that were wrapped are not laid anew at a resize.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

import pyte
from pyte import charsets, modes
from pyte.screens import Char, Margins, wcwidth

from .emulator import TITLE_MAX, Picture, shown

_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]+")
_CSI = re.compile(r"\x1b\[([<=>?]?)([0-9:;]*)([ -/]*)([@-~])")
# Whatever is longer makes no sense, and is ignored to its end.
_CSI_MAX = 1_000
# Numbers of a sequence: no screen is larger.
_NUMBER_MAX = 65_535
# Characters of a cell: a letter and its marks.
_CELL_MAX = 16
_BLANK = Char(" ")
_ASCII: dict[int, str] = {}
_LINES = {number: charsets.VT100_MAP[number] for number in range(ord("`"), ord("~") + 1)}


class Grid:
    """An `Emulator`."""

    def __init__(self, columns: int, rows: int) -> None:
        self._screen = _Screen(columns, rows)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state: Callable[[str], None] = self._ground
        self._collected = ""

    def feed(self, data: bytes) -> None:
        text = self._decoder.decode(data)
        at, end = 0, len(text)
        while at < end:
            if self._state == self._ground:
                if found := _TEXT.match(text, at):
                    self._screen.draw(found[0])
                    at = found.end()
                    continue
                if found := _CSI.match(text, at):
                    self._csi(*found.groups())
                    at = found.end()
                    continue
            self._state(text[at])
            at += 1

    def resize(self, columns: int, rows: int) -> None:
        self._screen.resize(rows, columns)

    def picture(self) -> Picture:
        screen = self._screen
        lines = ["".join(screen.buffer[row][x].data for x in range(screen.columns)) for row in range(screen.lines)]
        return Picture(
            lines=[shown(line).rstrip() for line in lines],
            row=screen.cursor.y,
            column=min(screen.cursor.x, screen.columns - 1),
            visible=not screen.cursor.hidden,
            alternate=screen.alternate,
            title=shown(screen.title),
        )

    # States: each takes one character.  <https://vt100.net/emu/dec_ansi_parser>

    def _ground(self, char: str) -> None:
        if char == "\x1b":
            self._collected = ""
            self._state = self._escape
        elif char < " ":
            self._screen.control(char)

    def _interrupted(self, char: str) -> bool:
        """Do what a control character does in the middle of a sequence; tell whether it was one."""
        if char in "\x18\x1a":
            self._state = self._ground
        elif char < " " or char == "\x7f":
            self._ground(char)
        else:
            return False
        return True

    def _escape(self, char: str) -> None:
        if self._interrupted(char):
            return
        if char <= "/":
            self._collected = (self._collected + char)[:3]
            return
        self._state = self._ground
        if self._collected or char not in "[]PX^_":
            self._screen.escape(self._collected + char)
        elif char == "[":
            self._state = self._parameters
        elif char == "]":
            self._state = self._command
        else:
            self._state = self._string

    def _parameters(self, char: str) -> None:
        if self._interrupted(char):
            return
        if "@" <= char <= "~":
            self._state = self._ground
            if found := _CSI.fullmatch(f"\x1b[{self._collected}{char}"):
                self._csi(*found.groups())
        elif len(self._collected) <= _CSI_MAX:
            self._collected += char

    def _command(self, char: str) -> None:
        if char in "\x07\x1b\x18\x1a":
            number, _, title = self._collected.partition(";")
            if number in ("0", "2") and char in "\x07\x1b":
                self._screen.set_title(title[:TITLE_MAX])
            self._collected = ""
            self._state = self._escape if char == "\x1b" else self._ground
        elif len(self._collected) <= TITLE_MAX + 2:
            self._collected += char

    def _string(self, char: str) -> None:
        if char in "\x1b\x18\x1a":
            self._state = self._escape if char == "\x1b" else self._ground

    def _csi(self, prefix: str, parameters: str, intermediates: str, final: str) -> None:
        if len(parameters) <= _CSI_MAX:
            numbers = [int(n) if n.isdecimal() else 0 for n in parameters.split(";")]
            numbers = [min(number, _NUMBER_MAX) for number in numbers]
            self._screen.sequence(prefix + intermediates + final, numbers)


class _Screen(pyte.Screen):
    """pyte's grid, repaired."""

    def __init__(self, columns: int, lines: int) -> None:
        self.alternate = False
        self._other: Any = None
        self._saved: dict[bool, tuple[Any, ...]] = {}
        self._last = ""
        super().__init__(columns, lines)

    def reset(self) -> None:
        super().reset()
        self.alternate, self._other, self._saved, self._last = False, None, {}, ""
        self._charsets = [_ASCII, _ASCII]

    # What the parser found.

    def control(self, char: str) -> None:
        """Carry out a control character."""
        if char in "\n\x0b\x0c":
            self.linefeed()
        elif char == "\r":
            self.carriage_return()
        elif char == "\b":
            self.cursor_back()
        elif char == "\t":
            self._tab(1)
        elif char in "\x0e\x0f":
            self.charset = int(char == "\x0e")

    def escape(self, text: str) -> None:
        """Carry out what stands after an ESC."""
        if text in ("(0", ")0", "(B", ")B", "(A", ")A"):
            self._charsets[text[0] == ")"] = _LINES if text[1] == "0" else _ASCII
        elif text == "7":
            self._save()
        elif text == "8":
            self._restore()
        elif text == "D":
            self.index()
        elif text == "E":
            self.carriage_return()
            self.index()
        elif text == "M":
            self.reverse_index()
        elif text == "H":
            self.tabstops.add(min(self.cursor.x, self.columns - 1))
        elif text == "c":
            self.reset()
        elif text == "#8":
            self.margins = None
            self.alignment_display()
            self.cursor_position()

    def sequence(self, name: str, numbers: list[int]) -> None:
        """Carry out a control sequence; `name`: what is not a number of it."""
        first = numbers[0] or 1
        if name in "hl" or name in ("?h", "?l"):
            for mode in numbers:
                self._set(name, mode)
            return
        if name == "b":
            self.draw(self._last * min(first, self.columns * self.lines))
            return
        if act := _SEQUENCES.get(name):
            if name not in "IST":
                # Behind the last column the next character would go to the next line: not after most sequences.
                self.ensure_hbounds()
            act(self, first, numbers)

    def _set(self, name: str, mode: int) -> None:
        on = name[-1] == "h"
        if name in "hl":
            if mode in (modes.IRM, modes.LNM):
                (self.mode.add if on else self.mode.discard)(mode)
        elif mode in (modes.DECAWM >> 5, modes.DECOM >> 5):
            (self.mode.add if on else self.mode.discard)(mode << 5)
            if mode << 5 == modes.DECOM:
                self.cursor_position()
        elif mode == modes.DECTCEM >> 5:
            self.cursor.hidden = not on
        elif mode == 1048:
            self._save() if on else self._restore()
        elif mode in (47, 1047, 1049):
            self._switch(mode, on)

    def _switch(self, mode: int, on: bool) -> None:
        if mode == 1049 and on:
            self._save()
        if mode == 1047 and self.alternate and not on:
            self.buffer.clear()
        if on != self.alternate:
            self.buffer, self._other = self._other or self._no_lines(), self.buffer
            self.alternate = on
        if mode == 1049:
            if on:
                self.buffer.clear()
            else:
                self._restore(of=False)

    def _no_lines(self) -> Any:
        lines = self.buffer.copy()
        lines.clear()
        return lines

    # Characters.

    def draw(self, data: str) -> None:
        charset = self._charsets[self.charset]
        if charset:
            data = data.translate(charset)
        cursor, columns = self.cursor, self.columns
        line = self.buffer[cursor.y]
        for char in data:
            width = 1 if char < "\x7f" else wcwidth(char)
            if width <= 0:
                if width == 0:
                    self._combine(char)
                continue
            if width > columns:
                continue
            if cursor.x + width > columns:
                if modes.DECAWM in self.mode:
                    cursor.x = 0
                    self.index()
                    line = self.buffer[cursor.y]
                elif width == 2:
                    continue
                else:
                    cursor.x = columns - 1
            if modes.IRM in self.mode:
                self.insert_characters(width)
            x = cursor.x
            if line[x].data == "":
                line[x - 1] = _BLANK
            line[x] = Char(char)
            if width == 2:
                if x + 2 < columns and line[x + 2].data == "" and line[x + 1].data != "":
                    line[x + 2] = _BLANK
                line[x + 1] = Char("")
            elif x + 1 < columns and line[x + 1].data == "":
                line[x + 1] = _BLANK
            cursor.x = x + width
            self._last = char

    def _combine(self, char: str) -> None:
        line, x = self.buffer[self.cursor.y], self.cursor.x - 1
        if x > 0 and line[x].data == "":
            x -= 1
        if x >= 0 and len(line[x].data) < _CELL_MAX:
            line[x] = Char(line[x].data + char)

    def _mend(self) -> None:
        """Blank the halves of wide characters of which an edit has left only one."""
        line = self.buffer[self.cursor.y]
        for x in [x for x, cell in line.items() if cell.data == ""]:
            if x == 0 or x >= self.columns or wcwidth(line[x - 1].data[:1]) != 2:
                line[x] = _BLANK
        for x in [x for x, cell in line.items() if cell.data > "\x7f" and wcwidth(cell.data[0]) == 2]:
            if x + 1 >= self.columns or line[x + 1].data != "":
                line[x] = _BLANK

    def insert_characters(self, count: int | None = None) -> None:
        line, x, count = self.buffer[self.cursor.y], self.cursor.x, count or 1
        cells = [line[at] for at in range(x, self.columns - count)]
        self._lay(x, [_BLANK] * min(count, self.columns - x) + cells)

    def delete_characters(self, count: int | None = None) -> None:
        line, x = self.buffer[self.cursor.y], self.cursor.x
        cells = [line[at] for at in range(x + (count or 1), self.columns)]
        self._lay(x, cells + [_BLANK] * (self.columns - x - len(cells)))

    def _lay(self, x: int, cells: list[Char]) -> None:
        line = self.buffer[self.cursor.y]
        for at, cell in enumerate(cells, x):
            line[at] = cell
        self._mend()

    def _erase(self, first: int, end: int) -> None:
        line = self.buffer[self.cursor.y]
        for x in range(first, min(end, self.columns)):
            line[x] = _BLANK
        self._mend()

    def _erase_in_line(self, how: int) -> None:
        x = self.cursor.x
        if how <= 2:
            self._erase(0 if how else x, x + 1 if how == 1 else self.columns)

    def _erase_in_display(self, how: int) -> None:
        if how > 2:  # 3: what has scrolled away, of which we have nothing
            return
        y = self.cursor.y
        rows = range(y + 1, self.lines) if how == 0 else range(y) if how == 1 else range(self.lines)
        for row in rows:
            self.buffer.pop(row, None)
        if how < 2:
            self._erase_in_line(how)

    def _tab(self, count: int) -> None:
        if self.cursor.x >= self.columns - 1:
            return  # and the next character still goes to the next line
        for _ in range(min(count, self.columns)):
            stops = [stop for stop in self.tabstops if self.cursor.x < stop < self.columns]
            self.cursor.x = min(stops, default=self.columns - 1)

    def _tab_back(self, count: int) -> None:
        for _ in range(min(count, self.columns)):
            self.cursor.x = max((stop for stop in self.tabstops if stop < self.cursor.x), default=0)

    # The cursor and the margins.

    def _bounds(self) -> tuple[int, int]:
        """Return the first and last row that scroll."""
        return self.margins or (0, self.lines - 1)

    def cursor_up(self, count: int | None = None) -> None:
        top, _ = self._bounds()
        self.cursor.y = max(self.cursor.y - (count or 1), top if self.cursor.y >= top else 0)

    def cursor_down(self, count: int | None = None) -> None:
        _, bottom = self._bounds()
        self.cursor.y = min(self.cursor.y + (count or 1), bottom if self.cursor.y <= bottom else self.lines - 1)

    def cursor_position(self, line: int | None = None, column: int | None = None) -> None:
        self.cursor_to_line(line)
        self.cursor_to_column(column)

    def cursor_to_line(self, line: int | None = None) -> None:
        top, bottom = self._bounds() if modes.DECOM in self.mode else (0, self.lines - 1)
        self.cursor.y = min(top + (line or 1) - 1, bottom)

    def _set_margins(self, numbers: list[int]) -> None:
        top, bottom = (*numbers, 0)[:2]
        top, bottom = max(top, 1) - 1, min(bottom or self.lines, self.lines) - 1
        if top < bottom:
            self.margins = Margins(top, bottom)
            self.cursor_position()

    def insert_lines(self, count: int | None = None) -> None:
        self._edit_lines(-(count or 1))

    def delete_lines(self, count: int | None = None) -> None:
        self._edit_lines(count or 1)

    def _edit_lines(self, up: int) -> None:
        top, bottom = self._bounds()
        if top <= self.cursor.y <= bottom:
            self._scroll(up, self.cursor.y)
            self.cursor.x = 0

    def _scroll(self, up: int, first: int | None = None) -> None:
        """Move the rows of the scroll region, or those from `first` on, so far up; a negative number: down."""
        top, bottom = self._bounds()
        top = top if first is None else first
        for row, line in [(row, self.buffer.pop(row, None)) for row in range(top, bottom + 1)]:
            if line is not None and top <= row - up <= bottom:
                self.buffer[row - up] = line

    def _save(self) -> None:
        origin = modes.DECOM in self.mode
        self._saved[self.alternate] = (self.cursor.x, self.cursor.y, origin, list(self._charsets), self.charset)

    def _restore(self, of: bool | None = None) -> None:
        """Put the cursor where it was saved; `of`: on the alternate screen, or not; else the one that is shown."""
        plain = (0, 0, False, [_ASCII] * 2, 0)
        x, y, origin, sets, charset = self._saved.get(self.alternate if of is None else of, plain)
        (self.mode.add if origin else self.mode.discard)(modes.DECOM)
        self._charsets, self.charset = list(sets), charset
        self.cursor.x, self.cursor.y = min(x, self.columns), min(y, self.lines - 1)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        lines, columns = lines or self.lines, columns or self.columns
        self.margins = None
        # Blank rows below the cursor go first, then those at the top.
        drawn = [row for row, line in self.buffer.items() if any(cell.data != " " for cell in line.values())]
        lost = max(0, min(max(*drawn, self.cursor.y, 0) + 1 - lines, self.cursor.y))
        for buffer in (self.buffer, self._other):
            if not buffer:
                continue
            for row in sorted(buffer):
                line = buffer.pop(row)
                if 0 <= row - lost < lines:
                    buffer[row - lost] = line
                for x in [x for x in line if x >= columns]:
                    del line[x]
        self.tabstops |= set(range(-(-self.columns // 8) * 8, columns, 8))
        self.lines, self.columns = lines, columns
        self.cursor.x, self.cursor.y = min(self.cursor.x, columns - 1), min(self.cursor.y - lost, lines - 1)


_SEQUENCES: dict[str, Callable[[_Screen, int, list[int]], Any]] = {
    "A": lambda screen, n, _: screen.cursor_up(n),
    "B": lambda screen, n, _: screen.cursor_down(n),
    "e": lambda screen, n, _: screen.cursor_down(n),
    "C": lambda screen, n, _: screen.cursor_forward(n),
    "a": lambda screen, n, _: screen.cursor_forward(n),
    "D": lambda screen, n, _: screen.cursor_back(n),
    "E": lambda screen, n, _: screen.cursor_down1(n),
    "F": lambda screen, n, _: screen.cursor_up1(n),
    "G": lambda screen, n, _: screen.cursor_to_column(n),
    "`": lambda screen, n, _: screen.cursor_to_column(n),
    "d": lambda screen, n, _: screen.cursor_to_line(n),
    "H": lambda screen, n, numbers: screen.cursor_position(n, (*numbers, 0)[1]),
    "f": lambda screen, n, numbers: screen.cursor_position(n, (*numbers, 0)[1]),
    "I": lambda screen, n, _: screen._tab(n),
    "Z": lambda screen, n, _: screen._tab_back(n),
    "g": lambda screen, _, numbers: screen.clear_tab_stop(numbers[0]),
    "J": lambda screen, _, numbers: screen._erase_in_display(numbers[0]),
    "?J": lambda screen, _, numbers: screen._erase_in_display(numbers[0]),
    "K": lambda screen, _, numbers: screen._erase_in_line(numbers[0]),
    "?K": lambda screen, _, numbers: screen._erase_in_line(numbers[0]),
    "X": lambda screen, n, _: screen._erase(screen.cursor.x, screen.cursor.x + n),
    "@": lambda screen, n, _: screen.insert_characters(n),
    "P": lambda screen, n, _: screen.delete_characters(n),
    "L": lambda screen, n, _: screen.insert_lines(n),
    "M": lambda screen, n, _: screen.delete_lines(n),
    "S": lambda screen, n, _: screen._scroll(n),
    "T": lambda screen, n, _: screen._scroll(-n),
    "r": lambda screen, _, numbers: screen._set_margins(numbers),
    "s": lambda screen, _, numbers: screen._save(),
    "u": lambda screen, _, numbers: screen._restore(),
}
