"""Screens of real programs, held against those of a real terminal, tmux, for the same bytes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import unicodedata
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import outlive
from outlive.scripts.screen import Screen, Screens, screen_of
from outlive.scripts.screen.emulator import Emulator
from outlive.scripts.screen.grid import Grid

from .conftest import PYTHON, Home

RENDERER = "scripts.screen.renderer"
OUTLIVE = str(Path(sysconfig.get_path("scripts")) / "outlive")
TERMINAL = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "LINES": "", "COLUMNS": ""}


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test where one of these is not installed."""
    missing = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def told(lines: list[str], row: int, column: int, visible: bool, alternate: bool) -> str:
    """Return all that is compared, as one text, of which pytest shows the lines that differ."""
    cursor = f"cursor in {row},{column}, {'shown' if visible else 'hidden'}"
    text = "\n".join([*lines, cursor, "alternate screen" if alternate else "main screen"])
    return unicodedata.normalize("NFC", text)


def shown(screen: Screen) -> str:
    return told(screen.lines, screen.cursor.row, screen.cursor.column, screen.cursor.visible, screen.alternate)


def emulated(kind: type[Emulator], data: bytes, size: tuple[int, int]) -> str:
    emulator = kind(*size)
    emulator.feed(data)
    now = emulator.picture()
    return told(now.lines, now.row, now.column, now.visible, now.alternate)


class Tmux:
    """A tmux with one window, on which it shows what it is given."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        self._folder = folder
        self._socket = str(folder / "tmux")
        self._shown = 0
        self.columns, self.rows = size
        os.mkfifo(folder / "pieces")
        (folder / "conf").write_text("set -g status off\n")
        # Each line names a file to show; when it is on the screen, the title says so.
        tell = r'printf "\033]2;%s\033\\" "$title"'
        loop = f'stty raw -opost -echo; while read -r file title; do cat "$file"; {tell}; done'
        self._run("new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), f"{loop} <>{folder}/pieces")

    def _run(self, *words: str) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "SHELL": "/bin/sh"}
        environment.pop("TMUX", None)
        command = ["tmux", "-u", "-S", self._socket, "-f", str(self._folder / "conf"), *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=30).stdout.decode()

    async def show(self, data: bytes) -> None:
        """Give it bytes, and wait until they are on its screen."""
        self._shown += 1
        piece, title = self._folder / f"piece-{self._shown}", f"shown-{self._shown}"
        piece.write_bytes(data)
        (self._folder / "pieces").write_text(f"{piece} {title}\n")
        while self._run("display-message", "-p", "#{pane_title}").strip() != title:
            await asyncio.sleep(0.01)

    def resize(self, columns: int, rows: int) -> None:
        self._run("resize-window", "-x", str(columns), "-y", str(rows))
        self.columns, self.rows = columns, rows

    def shown(self) -> str:
        lines = [line.rstrip() for line in self._run("capture-pane", "-p").split("\n")][: self.rows]
        asked = "#{cursor_y} #{cursor_x} #{cursor_flag} #{alternate_on}"
        row, column, visible, alternate = map(int, self._run("display-message", "-p", asked).split())
        # Behind the last column, tmux counts on, and others stay there.
        column = min(column, self.columns - 1)
        return told(lines, row, column, bool(visible), bool(alternate))

    def end(self) -> None:
        self._run("kill-server")


@pytest.fixture
async def tmux(tmp_path: Path) -> AsyncIterator[Callable[[tuple[int, int]], Tmux]]:
    """Makes terminals, and ends them."""
    made: list[Tmux] = []

    def make(size: tuple[int, int]) -> Tmux:
        folder = tmp_path / f"tmux-{len(made)}"
        folder.mkdir()
        made.append(Tmux(folder, size))
        return made[-1]

    yield make
    for one in made:
        one.end()


async def start(thread: outlive.Thread, *command: str, size: tuple[int, int] = (80, 24)) -> str:
    """Start a program that fills the screen, and return its id."""
    answer = await thread.exec_command(command, tty=True, size=size, env=TERMINAL, yield_time_ms=250)
    assert answer.session_id is not None, answer
    return answer.process_id


async def until(
    screens: Screens, thread: outlive.Thread, process_id: str, text: str, row: int | None = None
) -> Screen:
    """Return the first screen with this text on it, or at the beginning of that row."""
    while True:
        screen = await screens.of(thread, process_id)
        if text in screen.text if row is None else screen.lines[row].startswith(text):
            return screen
        await thread.read_output(process_id, screen.offset, wait_ms=5000)


async def output_of(thread: outlive.Thread, screen: Screen) -> bytes:
    """Return the bytes that made a screen."""
    return (await thread.output(screen.process_id))[: screen.offset]


WORDS = "Wörter 中文 e\u0301 → "
TEXT = "".join(f"{line} {WORDS * (line % 9)}\ttab\n" for line in range(1, 200))


@needs("tmux", "vim")
async def test_vim_looks_as_in_tmux_before_and_after_a_resize(
    host: outlive.Host, tmux: Callable[[tuple[int, int]], Tmux], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    thread = await host.thread("vim")
    size = (91, 31)
    terminal = tmux(size)
    vim = await start(thread, "vim", "-u", "NONE", "-N", "-n", "text", size=size)
    async with Screens() as screens:
        await until(screens, thread, vim, "199L")
        # Scrolls, inserts, deletes, splits; what the status line says last is there when all is.
        keys = ":set nu ls=2 showcmd\r20\x05\x15ddp5ddOnew 字\x1bxJ:sp\rG\x17w/99\rcwend\x1b:set stl=do%{'ne'}\r"
        await thread.write_stdin(vim, keys)
        before = await until(screens, thread, vim, "done", row=-2)
        data = await output_of(thread, before)
        await terminal.show(data)
        assert (before.columns, before.rows, before.complete, before.alternate) == (*size, True, True)
        assert shown(before) == terminal.shown()
        assert emulated(Grid, data, size) == terminal.shown()

        await thread.resize(vim, 70, 20)
        terminal.resize(70, 20)
        await thread.write_stdin(vim, ":set stl=re%{'sized'}\r")
        after = await until(screens, thread, vim, "resized", row=-2)
        await terminal.show((await output_of(thread, after))[before.offset :])
        assert (after.columns, after.rows) == (70, 20)
        assert shown(after) == terminal.shown()
        assert shown(await screen_of(thread, vim)) == terminal.shown()

        await thread.write_stdin(vim, ":qa!\r")
        await thread.wait(vim)
        ended = await screens.of(thread, vim)
        assert (ended.alternate, ended.cursor.visible, ended.columns, ended.rows) == (False, True, 70, 20)


@needs("tmux", "less")
async def test_less_looks_as_in_tmux(
    host: outlive.Host, tmux: Callable[[tuple[int, int]], Tmux], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    thread = await host.thread("less")
    less = await start(thread, "less", "text")
    async with Screens() as screens:
        await until(screens, thread, less, "1 ")
        await thread.write_stdin(less, " kkkj/47\rng-N\r\x1b)G30y")
        await thread.write_stdin(less, "=")
        screen = await until(screens, thread, less, "byte")
    data = await output_of(thread, screen)
    terminal = tmux((80, 24))
    await terminal.show(data)
    assert shown(screen) == terminal.shown()
    assert emulated(Grid, data, (80, 24)) == terminal.shown()


@pytest.mark.parametrize(
    ("program", "word"),
    [
        pytest.param("htop", "F10Quit", marks=needs("tmux", "htop")),
        pytest.param("top", "COMMAND", marks=needs("tmux", "top")),
    ],
)
async def test_what_redraws_all_the_time_looks_as_in_tmux_at_any_moment(
    host: outlive.Host, tmux: Callable[[tuple[int, int]], Tmux], program: str, word: str
) -> None:
    thread = await host.thread("monitor")
    size = (100, 30)
    monitor = await start(thread, program, "-d", "1", size=size)
    terminal = tmux(size)
    async with Screens() as screens:
        await until(screens, thread, monitor, word)
        at = 0
        for keys in ("M", "\x1b[B\x1b[B", "t"):
            await thread.write_stdin(monitor, keys)
            screen = await screens.of(thread, monitor)
            data = await output_of(thread, screen)
            await terminal.show(data[at:])
            assert shown(screen) == terminal.shown()
            assert emulated(Grid, data, size) == terminal.shown()
            at = screen.offset


async def test_only_what_is_new_is_rendered_and_a_gap_is_told(host: outlive.Host) -> None:
    thread = await host.thread("gap")
    script = """
print("\\033[2J\\033[Htitle, drawn once")
for round in "12345":
    for line in range(9_000):
        print("\\033[2H", "line", line, "." * 20, flush=False)
    print("\\033[3Hround", round, "over", flush=True)
    input()
"""
    process = await start(thread, *PYTHON, script)
    async with Screens() as screens:
        for number in "12345":
            screen = await until(screens, thread, process, f"round {number} over")
            assert screen.complete  # each round alone fits into what is kept, and nothing was missed
            assert screen.lines[0] == "title, drawn once"
            if number != "5":
                await thread.write_stdin(process, "\n")
        late = await screen_of(thread, process)
        assert not late.complete
        assert (late.lines, late.offset) == (screen.lines, screen.offset)


async def test_looking_disturbs_nobody(home: Home, host: outlive.Host) -> None:
    thread = await host.thread("asleep")
    process = await start(thread, *PYTHON, "print('unread', flush=True); input()")
    await thread.detach()
    (before,) = await thread.processes()
    done = await asyncio.to_thread(
        subprocess.run, [OUTLIVE, "screen", f"asleep/{process}", "--json"], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    screen = json.loads(done.stdout)
    assert screen["lines"] == ["unread", *[""] * 23]
    assert (screen["columns"], screen["rows"], screen["complete"], screen["title"]) == (80, 24, True, "")
    assert screen["cursor"] == {"row": 1, "column": 0, "visible": True}
    text = await asyncio.to_thread(
        subprocess.run, [OUTLIVE, "screen", "-t", "asleep", process], capture_output=True, timeout=60
    )
    assert (text.returncode, text.stdout, text.stderr) == (0, b"unread\n", b"")
    (after,) = await thread.processes()
    assert after.bytes_delivered == before.bytes_delivered
    assert [row.state for row in await host.threads()] == ["asleep"]


async def test_a_renderer_that_dies_is_an_error_and_the_next_one_begins_anew(
    home: Home, host: outlive.Host
) -> None:
    thread = await host.thread("crash")
    process = await start(thread, *PYTHON, "print('here', flush=True); input()")
    async with Screens() as screens:
        first = await until(screens, thread, process, "here")
        (renderer,) = home.pids(RENDERER)
        os.kill(renderer, signal.SIGSTOP)
        looking = asyncio.create_task(screens.of(thread, process))
        await asyncio.sleep(0)  # it asks the broker now, and will wait for the renderer in vain
        os.kill(renderer, signal.SIGKILL)
        with pytest.raises(outlive.Unavailable, match="died of SIGKILL"):
            await looking
        assert await screens.of(thread, process) == first
        (other,) = home.pids(RENDERER)
        assert other != renderer
    assert home.pids(RENDERER) == []


@pytest.mark.parametrize("missing", [["pyghostty"], ["pyghostty", "pyte"]])
async def test_what_is_not_installed_is_replaced_by_the_next_or_named(
    host: outlive.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    for name in missing:
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    thread = await host.thread("fallback")
    process = await start(thread, *PYTHON, "print('here\\033[?1049h\\033[Hthere'); input()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with Screens() as screens:
        if "pyte" in missing:
            with pytest.raises(outlive.Unavailable, match="install `outlive\\[screen\\]`"):
                await screens.of(thread, process)
        else:
            await until(screens, thread, process, "there", row=0)


async def test_what_has_no_screen_is_an_error_that_says_what_to_do(host: outlive.Host) -> None:
    thread = await host.thread("none")
    pipes = await thread.exec_command(["sleep", "1000"], yield_time_ms=250)
    vast = await start(thread, "sleep", "1000", size=(65_535, 65_535))
    with pytest.raises(outlive.BadRequest, match="no terminal; see its output with `outlive logs`"):
        await screen_of(thread, pipes.process_id)
    with pytest.raises(outlive.BadRequest, match="65535x65535 is not rendered"):
        await screen_of(thread, vast)
    with pytest.raises(outlive.UnknownProcess):
        await screen_of(thread, "1")
