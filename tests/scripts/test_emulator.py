"""What escape sequences do to a screen, for each emulator: as xterm and tmux have it."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlive.scripts.screen.emulator import AFTER_GAP, Emulator, Picture, shown
from outlive.scripts.screen.grid import Grid
from outlive.scripts.screen.renderer import whole

EMULATORS: list[type[Emulator]] = [Grid]
try:
    from outlive.scripts.screen.ghostty import Ghostty
except ImportError:  # no wheel of it for this machine
    pass
else:
    EMULATORS.append(Ghostty)

each_emulator = pytest.mark.parametrize("kind", EMULATORS)


def drawn(kind: type[Emulator], *data: bytes, size: tuple[int, int] = (10, 4)) -> Picture:
    screen = kind(*size)
    for piece in data:
        screen.feed(piece)
    return screen.picture()


def lines_of(picture: Picture) -> str:
    """Return the lines with `|` between, without the empty ones at the end; marks are joined with their letters."""
    return unicodedata.normalize("NFC", "|".join(picture.lines).rstrip("|"))


NUMBERS = b"1\r\n2\r\n3\r\n4"

# What is fed to a screen of 10 columns and 4 rows, its lines, and row and column of the cursor.
DRAWINGS = {
    "text": (b"hello\r\nworld", "hello|world", (1, 5)),
    "a line feed alone keeps the column": (b"ab\ncd", "ab|  cd", (1, 4)),
    "a long line goes on in the next": (b"0123456789ab", "0123456789|ab", (1, 2)),
    "a full line does not yet": (b"0123456789", "0123456789", (0, 9)),
    "nor with a carriage return": (b"0123456789\r\nx", "0123456789|x", (1, 1)),
    "nor when wrapping is off": (b"\x1b[?7l0123456789ab", "012345678b", (0, 9)),
    "backspace in the last column": (b"0123456789\bx", "01234567x9", (0, 9)),
    "scrolling": (NUMBERS + b"\r\n5", "2|3|4|5", (3, 1)),
    "tabs": (b"a\tb\tc", "a       bc", (0, 9)),
    "tab stops set and cleared": (b"\x1b[3g\x1b[4G\x1bH\ra\tb", "a  b", (0, 4)),
    "tabs forwards and back": (b"\x1b[Ix\x1b[Zy\x1b[2Zz", "z       y", (0, 1)),
    "moving": (b"\x1b[3;5Hx\x1b[2Ay\x1b[3Dz\x1b[Bw", "   z y|    w|    x", (1, 5)),
    "moving stops at the edges": (b"\x1b[99;99Hx\x1b[99A\x1b[99Dy", "y|||         x", (0, 1)),
    "lines and columns by number": (b"\x1b[3d\x1b[4Gx\x1b[2`y", "||" + " y x", (2, 2)),
    "next and previous lines": (b"ab\x1b[2Ec\x1b[Fd", "ab|d|c", (1, 1)),
    "erasing to the end of the line": (b"abcdef\x1b[3G\x1b[K", "ab", (0, 2)),
    "erasing from its beginning": (b"abcdef\x1b[3G\x1b[1K", "   def", (0, 2)),
    "erasing all of it": (b"abc\r\ndef\x1b[2K", "abc", (1, 3)),
    "erasing below": (NUMBERS + b"\x1b[2;1H\x1b[J", "1", (1, 0)),
    "erasing above": (NUMBERS + b"\x1b[3;1H\x1b[1J", "|||4", (2, 0)),
    "erasing everything": (NUMBERS + b"\x1b[2J", "", (3, 1)),
    "erasing what has scrolled away": (NUMBERS + b"\x1b[3J", "1|2|3|4", (3, 1)),
    "erasing characters": (b"abcdef\x1b[2G\x1b[3X", "a   ef", (0, 1)),
    "inserting characters": (b"abcdefghij\x1b[2G\x1b[3@", "a   bcdefg", (0, 1)),
    "deleting characters": (b"abcdef\x1b[2G\x1b[3P", "aef", (0, 1)),
    "insert mode": (b"abc\r\x1b[4hxy\x1b[4lz", "xyzbc", (0, 3)),
    "inserting lines": (NUMBERS + b"\x1b[2;1H\x1b[2L", "1|||2", (1, 0)),
    "deleting lines": (NUMBERS + b"\x1b[2;1H\x1b[2M", "1|4", (1, 0)),
    "more than there are": (NUMBERS + b"\x1b[2;1H\x1b[99M\x1b[99Lx", "1|x", (1, 1)),
    "scrolling up and down": (NUMBERS + b"\x1b[2S\x1b[T", "|3|4", (3, 1)),
    "scrolling the only line away": (b"x\x1b[S", "", (0, 1)),
    "deleting it": (b"abc\x1b[M", "", (0, 0)),
    "repeating": (b"ab\x1b[3bc", "abbbbc", (0, 6)),
    "repeating over the border": ("–".encode() + b"\x1b[10b", "–" * 10 + "|–", (1, 1)),
    "a scroll region": (NUMBERS + b"\x1b[2;3r\x1b[3;1H\nx", "1|3|x|4", (2, 1)),
    "its other end": (NUMBERS + b"\x1b[2;3r\x1b[2;1H\x1bMx", "1|x|2|4", (1, 1)),
    "outside of it": (NUMBERS + b"\x1b[2;3r\x1b[4;1H\nx", "1|2|3|x", (3, 1)),
    "lines inserted in it": (NUMBERS + b"\x1b[2;3r\x1b[2;1H\x1b[L", "1||2|4", (1, 0)),
    "counted from it": (b"\x1b[2;3r\x1b[?6h\x1b[2;2Hx\x1b[9;1Hy", "||yx", (2, 1)),
    "one that is none": (NUMBERS + b"\x1b[3;2r\x1b[4;1H\nx", "2|3|4|x", (3, 1)),
    "the cursor put back": (b"ab\x1b7\x1b[3;3Hx\x1b8c", "abc||  x", (0, 3)),
    "and so by another name": (b"ab\x1b[s\x1b[3;3Hx\x1b[uc", "abc||  x", (0, 3)),
    "line drawing": (b"\x1b(0lqk\x1b(Bq", "┌─┐q", (0, 4)),
    "line drawing, shifted": (b"\x1b)0l\x0eq\x0fq", "l─q", (0, 3)),
    "reset": (b"abc\x1b[2;3r\x1b[?1049hdef\x1bcx", "x", (0, 1)),
    "alignment": (b"\x1b#8", "|".join(["E" * 10] * 4), (0, 0)),
    "a control character within a sequence": (b"ab\x1b[\r2Cx", "abx", (0, 3)),
    "a sequence broken off": (b"\x1b[3\x18x\x1b[3\x1b[2Gy", "xy", (0, 2)),
    "an escape broken off": (b"\x1b\x1b[2Gx", " x", (0, 2)),
    # Wide and combining characters.
    "wide": ("中文x".encode(), "中文x", (0, 5)),
    "wide at the border": ("\x1b[10G中".encode(), "|中", (1, 2)),
    "the left half overwritten": ("中文\x1b[1Gx".encode(), "x 文", (0, 1)),
    "the right half overwritten": ("中文\x1b[2Gx".encode(), " x文", (0, 2)),
    "both overwritten by another's": ("中文\x1b[2G字".encode(), " 字", (0, 3)),
    "half of it deleted": ("中文\x1b[2G\x1b[P".encode(), " 文", (0, 1)),
    "half of it pushed out": ("12345678中\x1b[1G\x1b[@".encode(), " 12345678", (0, 0)),
    "half of it erased": ("中文\x1b[3G\x1b[K".encode(), "中", (0, 2)),
    "combining": ("e\u0301a\u0308x".encode(), "éäx", (0, 3)),
    "combining with a wide one": ("が".encode()[:3] + "か\u3099x".encode(), "ががx", (0, 5)),
    "combining with nothing": ("\u0301x".encode(), "x", (0, 1)),
    "no UTF-8": (b"a\xff\xc3(b", "a\ufffd\ufffd(b", (0, 5)),
    # What is for other terminals, for a keyboard, or no business of a screen of text.
    "colours": (b"\x1b[1;31ma\x1b[38;5;7mb\x1b[38:2::1:2:3mc\x1b[m\x1b[4:3md", "abcd", (0, 4)),
    "private colours": (b"\x1b[>4;2m\x1b[?4mab", "ab", (0, 2)),
    "questions": (b"\x1b[c\x1b[>c\x1b[=c\x1b[6n\x1b[?6n\x1b[?2026$p\x1b[>qab\x05", "ab", (0, 2)),
    "keyboards": (b"\x1b[?2004h\x1b[>1u\x1b[<u\x1b[?u\x1b=\x1b>ab", "ab", (0, 2)),
    "private cousins": (b"ab\x1b[?1;2r\x1b[>1S\x1b[<3M\x1b[?5;1Wc", "abc", (0, 3)),
    "cursor shapes": (b"\x1b[2 q\x1b[1 @ab", "ab", (0, 2)),
    "a palette": (b"\x1b]4;1;rgb:0/0/0\x1b\\\x1b]104\x07ab", "ab", (0, 2)),
    "links": (b"\x1b]8;;http://a/\x1b\\ab\x1b]8;;\x1b\\c", "abc", (0, 3)),
    "strings": (b"\x1bP+q544e\x1b\\a\x1b^b\x1b\\\x1b_Gc\x1b\\d\x1bXe\x1b\\", "ad", (0, 2)),
    "charsets of others": (b"\x1b%G\x1b*B\x1b F\x1b#3ab", "ab", (0, 2)),
    "a bell, nothing, and delete": (b"a\x07\x00\x7fb", "ab", (0, 2)),
}


@each_emulator
@pytest.mark.parametrize("name", DRAWINGS)
def test_bytes_become_the_screen_of_a_terminal(kind: type[Emulator], name: str) -> None:
    data, lines, cursor = DRAWINGS[name]
    screens = [
        drawn(kind, data),
        drawn(kind, *(bytes([byte]) for byte in data)),
        drawn(kind, data[: len(data) // 2], data[len(data) // 2 :]),
    ]
    assert [(lines_of(screen), (screen.row, screen.column)) for screen in screens] == [(lines, cursor)] * 3


@each_emulator
@pytest.mark.parametrize(("on", "off"), [("\x1b[?1049h", "\x1b[?1049l"), ("\x1b7\x1b[?47h", "\x1b[?47l\x1b8")])
def test_what_was_on_the_screen_comes_back_when_a_program_leaves_the_alternate_one(
    kind: type[Emulator], on: str, off: str
) -> None:
    before, during = f"shell\r\n$ vim{on}".encode(), b"\x1b[H\x1b[2Jtext\x1b[4;3H"
    full = drawn(kind, before, during)
    assert (full.alternate, lines_of(full), full.row, full.column) == (True, "text", 3, 2)
    after = drawn(kind, before, during, off.encode())
    assert (after.alternate, lines_of(after), after.row, after.column) == (False, "shell|$ vim", 1, 5)
    again = drawn(kind, before, during, off.encode(), on.encode(), b"\x1b[Hx")
    assert (again.alternate, again.lines[0][0]) == (True, "x")


@each_emulator
def test_cursor_and_title_are_told(kind: type[Emulator]) -> None:
    hidden = drawn(kind, b"\x1b[?25l\x1b]0;one\x07\x1b]2;tw", "ö\x1b\\ab".encode())
    assert (hidden.visible, hidden.title, lines_of(hidden)) == (False, "twö", "ab")
    assert drawn(kind, b"\x1b[?25l\x1b[?25h").visible
    assert len(drawn(kind, b"\x1b]0;" + b"x" * 100_000 + b"\x07").title) <= 1000


@each_emulator
def test_a_smaller_screen_keeps_the_lines_around_the_cursor(kind: type[Emulator]) -> None:
    screen = kind(10, 4)
    screen.feed(b"1\r\n2\r\n3\r\n4")
    screen.resize(8, 2)
    assert (lines_of(screen.picture()), screen.picture().row) == ("3|4", 1)
    screen.feed(b"\r\n5\x1b[Hx")
    assert lines_of(screen.picture()) == "x|5"


@each_emulator
def test_blank_lines_go_before_those_with_text(kind: type[Emulator]) -> None:
    screen = kind(10, 4)
    screen.feed(b"1\r\n2")
    screen.resize(10, 2)
    assert (lines_of(screen.picture()), screen.picture().row) == ("1|2", 1)


@each_emulator
def test_a_larger_screen_has_room_at_once(kind: type[Emulator]) -> None:
    screen = kind(4, 2)
    screen.feed(b"\x1b[?1049h\x1b[Hab")
    screen.resize(12, 3)
    screen.feed(b"\x1b[3;1H0123456789ab\x1b[1;9H\tx")
    assert lines_of(screen.picture()) == "ab         x||0123456789ab"
    assert len(screen.picture().lines) == 3


@each_emulator
def test_a_screen_is_no_wider_than_its_terminal_whatever_a_program_asks_for(kind: type[Emulator]) -> None:
    picture = drawn(kind, b"\x1b[?40h\x1b[?3h" + b"x" * 40)
    assert len(picture.lines) == 4
    assert max(map(len, picture.lines)) == 10
    assert picture.column < 10


@each_emulator
def test_after_a_gap_nothing_of_the_moment_is_left(kind: type[Emulator]) -> None:
    for cut in (b"\x1b[3", b"\x1b]0;title", b"\x1bPq", b"\x1b[2;3r", b"\x1b(0", b"\x1b[4h"):
        screen = drawn(kind, b"\x1b[?1049h\x1b[Hqq\x1b[4;1H", cut, AFTER_GAP, b"\x1b[1;1Hm\x1b[4;1H\nx")
        assert screen.alternate
        assert lines_of(screen).endswith("x"), cut
        assert "└" not in lines_of(screen)
        assert not lines_of(screen).startswith("mqq"), cut


def test_what_follows_a_gap_begins_with_a_whole_sequence() -> None:
    assert whole(b"5;10Hfoo\x1b[Hbar") == b"\x1b[Hbar"
    assert whole(b"\xb8\xad rest of a line\r\nnext") == b"\r\nnext"
    assert whole(b"no control" * 1000) == b"no control" * 1000


def test_no_line_drives_the_terminal_of_its_reader() -> None:
    assert shown("a\x1b[31mb\x9bc\x7f中e\u0301👨\u200d👩") == "a[31mbc中e\u0301👨\u200d👩"


def test_only_the_renderer_loads_an_emulator() -> None:
    code = (
        "import sys, outlive.scripts.cli, outlive.scripts.screen.screens;"
        "assert not {'pyghostty', 'cffi', 'pyte', 'wcwidth'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(len(EMULATORS) < 2, reason="pyghostty is not installed")
def test_no_file_that_a_picture_names_is_touched(tmp_path: Path) -> None:
    import base64

    for medium in "tfs":
        file = tmp_path / "tty-graphics-protocol.rgb"
        file.write_bytes(b"\xff" * 12)
        name = base64.b64encode(str(file).encode()).decode()
        drawn(Ghostty, f"\x1b_Ga=T,f=24,s=2,v=2,i=1,t={medium};{name}\x1b\\".encode())
        assert file.exists()


# Pieces of which programs, and their enemies, make output.
FRAGMENTS = st.one_of(
    st.binary(max_size=4),
    st.sampled_from(
        [b"\x1b[", b"\x1b]", b"\x1bP", b"\x1b_G", b"\x1b\\", b"\x07", b"\r\n", b"\x1b7", b"\x1b8", b"\x1bc"]
    ),
    st.sampled_from([b"?", b">", b"$p", b"!p", b";", b":", b"0", b"1", b"2", b"7", b"47", b"1049", b"99999999999"]),
    st.sampled_from([bytes([byte]) for byte in range(0x40, 0x7F)]),
    st.sampled_from(["中", "e\u0301", "\u3099", "👨\u200d👩", "\u00ad", "\u2028", "\ud7ff", "\U0010ffff"]).map(
        str.encode
    ),
    st.tuples(
        st.sampled_from(["", "?", ">"]), st.integers(0, 70_000), st.sampled_from("ABCDGHJKLMPSTXZ@bdfghilmrsu")
    ).map(lambda parts: "\x1b[{}{}{}".format(*parts).encode()),
)


@each_emulator
@given(st.lists(FRAGMENTS, max_size=40).map(b"".join), st.data())
def test_any_bytes_in_any_pieces_are_drawn_alike(kind: type[Emulator], data: bytes, choices: st.DataObject) -> None:
    cuts = sorted(choices.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    size = choices.draw(st.tuples(st.integers(1, 12), st.integers(1, 6)))
    whole_screen = drawn(kind, data, size=size)
    assert drawn(kind, *pieces, size=size) == whole_screen
    assert len(whole_screen.lines) == size[1]
    assert 0 <= whole_screen.row < size[1]
    assert 0 <= whole_screen.column < size[0]


@each_emulator
@given(st.lists(st.one_of(FRAGMENTS, st.tuples(st.integers(1, 12), st.integers(1, 6))), max_size=40))
def test_no_resize_amid_any_bytes_fails(kind: type[Emulator], steps: list[bytes | tuple[int, int]]) -> None:
    screen = kind(10, 4)
    size = (10, 4)
    for step in steps:
        if isinstance(step, bytes):
            screen.feed(step)
        else:
            size = step
            screen.resize(*size)
        picture = screen.picture()
        assert len(picture.lines) == size[1]
        assert (0 <= picture.row < size[1], 0 <= picture.column < size[0]) == (True, True)
