"""The command line, as a person or a script meets it: real brokers, the installed `outlive`, its exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sysconfig
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from outlive.common import kernel

OUTLIVE = str(Path(sysconfig.get_path("scripts")) / "outlive")
COMMANDS = (
    *("up", "down", "status", "doctor", "exec", "write", "ps", "threads", "logs", "wait", "kill", "resize"),
    *("watch", "screen"),
    *("events", "detach", "resume", "reattach", "clean", "shutdown", "completion"),
    *("broker install", "broker uninstall", "mcp", "tool"),
)
# Seconds that one command may take on a busy machine before we call it hung.
PATIENCE = 60


class Home:
    """One OUTLIVE_HOME, and the command line in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {n: v for n, v in os.environ.items() if not n.startswith("OUTLIVE_")}
        self.environment["OUTLIVE_HOME"] = str(path)
        # Commands run in a login shell: whatever a person's own profile says and does is not for us.
        self.environment.update(HOME=str(path), SHELL="/bin/sh")

    def run(self, *words: str | bytes, input: bytes = b"", **settings: Any) -> subprocess.CompletedProcess[bytes]:
        """Run `outlive WORDS` to its end."""
        settings = {"env": self.environment, "input": input, "timeout": PATIENCE, **settings}
        if "stdout" not in settings:
            settings["stdout"] = subprocess.PIPE
        return subprocess.run([OUTLIVE, *words], stderr=subprocess.PIPE, **settings)

    def start(self, *words: str | bytes, **settings: Any) -> subprocess.Popen[bytes]:
        """Start `outlive WORDS`, its output in pipes."""
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
        return subprocess.Popen([OUTLIVE, *words], env=self.environment, **settings)

    def json(self, *words: str | bytes, **settings: Any) -> Any:
        """Run a command that has to succeed, and return what it prints with `--json`."""
        command, *rest = words
        done = self.run(command, "--json", *rest, **settings)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def exec(self, *words: str | bytes, options: tuple[str, ...] = ()) -> Any:
        """Return the result of `exec` as soon as the command has printed something or ended."""
        return self.json("exec", "--yield-ms", "250", *options, "--", *words)

    def shell(self, *options: str) -> str:
        """Return the id of a shell without line editing or echo, on a terminal."""
        script = "stty -echo; PS1= exec sh"
        process_id: str = self.exec(script, options=("--tty", *options))["process_id"]
        return process_id

    def processes(self) -> dict[int, str]:
        """Return everything that carries this home, our own children left out."""
        found = {}
        mark = f"OUTLIVE_HOME={self.path}".encode()
        for entry in os.listdir("/proc"):
            with suppress(OSError):
                if entry.isdecimal() and mark in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found[int(entry)] = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


@contextmanager
def a_home() -> Iterator[Home]:
    """Give a home whose broker is ended afterwards with all it has started: nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="cli-") as folder:
        home = Home(Path(folder))
        yield home
        if not (home.path / "run").exists():
            return
        done = home.run("down", "--force")
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + PATIENCE  # they were told, and are not our children
        while (left := home.processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left


@pytest.fixture
def cli_home() -> Iterator[Home]:
    """A home of its own."""
    with a_home() as home:
        yield home


@pytest.fixture(scope="module")
def broker() -> Iterator[Home]:
    """A home whose broker serves all tests that ask only for what they have started themselves."""
    with a_home() as home:
        yield home


@pytest.fixture
def shared_home(broker: Home) -> Home:
    """That home, with an environment of its own."""
    return Home(broker.path)


def one_line(message: bytes) -> str:
    """Return the message, which is one line of ours."""
    assert re.fullmatch(rb"outlive: [^\n]+\n", message), message
    return message.decode()


# Help and mistakes: no broker is needed, and none is started.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(cli_home: Home, command: str) -> None:
    done = cli_home.run(*command.split(), "--help")
    assert done.returncode == 0
    assert re.search(rb"Examples?: .*outlive " + command.encode(), done.stdout)


def test_help_imports_neither_asyncio_nor_zmq(cli_home: Home) -> None:
    environment = {**cli_home.environment, "PYTHONPROFILEIMPORTTIME": "1"}
    done = cli_home.run("--help", env=environment)
    imported = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert b"click" in imported
    assert not imported & {b"asyncio", b"zmq", b"msgspec", b"msgpack", b"rich", b"psutil"}


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["bogus"], 2, "bogus"),
        (["exec"], 2, "CMD"),
        (["exec", "--", ""], 2, "empty"),
        (["exec", "--size", "80", "--", "ls"], 2, "size '80'"),
        (["exec", "--size", "0x24", "--", "ls"], 2, "size '0x24'"),
        (["exec", "--size", "99999x24", "--", "ls"], 2, "size '99999x24'"),
        (["exec", "-e", "=x", "--", "ls"], 2, "variable '=x'"),
        (["exec", "--call-id", "x" * 257, "--", "ls"], 2, "257 characters"),
        (["exec", "-t", "../x", "--", "ls"], 2, "'../x'"),
        (["exec", "-t", "", "--", "ls"], 2, "thread ''"),
        (["detach", "a\nb"], 2, r"a\nb"),
        (["resume", "x" * 10_000], 2, "10000 characters"),
        (["logs", "../../etc"], 2, "thread '../..'"),
        (["logs", "x"], 2, "process 'x'"),
        (["logs", "1" * 5000], 2, "5000 characters"),
        (["logs", "--since", "-1", "1000"], 2, "since"),
        (["logs", "--raw", "--json", "1000"], 2, "--raw"),
        (["wait", "-t", "one", "two/1000"], 2, "two/1000"),
        (["wait", "--until", "moon=full", "1000"], 2, "--until: wake rule 'moon=full'"),
        (["watch", "1000"], 2, "at least one --wake-on"),
        (["watch", "1000", "--wake-on", "port=0"], 2, "--wake-on: wake rule port: 0"),
        (["exec", "--wake-on", "output=(", "--", "ls"], 2, "missing )"),
        (["kill", "-s", "NOSUCH", "1000"], 2, "NOSUCH"),
        (["kill", "-s", "9" * 5000, "1000"], 2, "signal"),
        (["write", "--key", "ctrl-!", "1000"], 2, "ctrl-!"),
        (["resize", "1000", "80x"], 2, "80x"),
        (["--no-start", "ps"], 1, "no broker"),
        (["ps", "--no-start"], 1, "no broker"),
        (["up", "--no-start"], 1, "no broker"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line_and_starts_nothing(
    cli_home: Home, words: list[str], status: int, told: str
) -> None:
    done = cli_home.run(*words)
    assert done.returncode == status
    assert told in one_line(done.stderr)
    assert done.stdout == b""
    assert not (cli_home.path / "run").exists()


def test_mistakes_that_the_broker_finds_are_told_in_one_line(shared_home: Home) -> None:
    for words, told in [
        (["logs", "1234"], "default"),
        (["wait", "nobody/1234"], "nobody"),
        (["resume", "nobody"], "nobody"),
        (["ps", "-t", "nobody"], "nobody"),
        (["exec", "--", "no-such-program"], "no-such-program"),
        (["exec", "-w", "/no/such/folder", "--", "ls"], "/no/such/folder"),
    ]:
        done = shared_home.run(*words)
        assert done.returncode == 1, words
        assert told in one_line(done.stderr)


def test_a_folder_that_cannot_be_used_is_told_in_one_line(cli_home: Home) -> None:
    file = cli_home.path / "file"
    file.touch()
    done = cli_home.run("ps", env={**cli_home.environment, "OUTLIVE_HOME": str(file)})
    assert done.returncode == 1
    assert str(file) in one_line(done.stderr)


# The two tools.


def test_exec_returns_the_result_of_the_contract(shared_home: Home) -> None:
    result = shared_home.json("exec", "-t", "build", "--", "sh", "-c", "echo hello; exit 3")
    assert result["thread"] == "build"
    assert result["output"] == "hello\n"
    assert result["outcome"] == {"kind": "exited", "code": 3}
    assert (result["exit_code"], result["session_id"], result["original_token_count"]) == (3, None, 2)
    assert re.fullmatch("[0-9a-f]{6}", result["chunk_id"])
    assert 1000 <= int(result["process_id"]) <= 99999


def test_exec_prints_the_text_that_models_know_and_exits_0_whatever_the_child_did(shared_home: Home) -> None:
    done = shared_home.run("exec", "--", "sh", "-c", "echo hello; kill -9 $$")
    assert done.returncode == 0
    assert re.fullmatch(
        rb"Chunk ID: [0-9a-f]{6}\nWall time: [0-9.]+ seconds\nProcess ended by signal 9 \(SIGKILL\)\n"
        rb"Original token count: 2\nOutput:\nhello\n",
        done.stdout,
    )
    assert done.stderr == b""


def test_one_word_with_spaces_is_for_the_shell_and_several_are_an_argv(shared_home: Home) -> None:
    assert shared_home.json("exec", "--", "echo one | tr n N")["output"] == "oNe\n"
    assert shared_home.json("exec", "--", "echo", "one | tr n N")["output"] == "one | tr n N\n"
    assert shared_home.json("exec", "echo", "--json", "--")["output"] == "--json --\n"
    assert shared_home.json("exec", "--", "true")["outcome"] == {"kind": "exited", "code": 0}


def test_exec_runs_in_the_callers_directory_and_environment_unless_told_otherwise(
    shared_home: Home, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    shared_home.environment["COLOUR"] = "red"
    show = "pwd; echo $COLOUR"
    assert shared_home.json("exec", "--", show, cwd=tmp_path)["output"] == f"{tmp_path}\nred\n"
    changed = shared_home.json("exec", "-w", "sub", "-e", "COLOUR=a=b", "--", show, cwd=tmp_path)
    assert changed["output"] == f"{tmp_path}/sub\na=b\n"


def test_the_same_write_id_types_nothing_twice_and_is_answered_again(cli_home: Home) -> None:
    cat = cli_home.exec("stty -echo; echo ready; exec cat", options=("--tty", "--yield-ms", "1000"))["process_id"]
    answers = [cli_home.json("write", cat, "--enter", "word", "--write-id", "w1") for _ in range(2)]
    assert [answer["output"].split() for answer in answers] == [["word"], ["word"]]
    assert cli_home.json("write", cat, "--enter", "other", "--write-id", "w2")["output"].split() == ["other"]


def test_the_same_call_id_starts_nothing_twice(cli_home: Home) -> None:
    first = cli_home.exec("sh", "-c", "echo $$; sleep 100", options=("--call-id", "c1"))
    again = cli_home.exec("sh", "-c", "echo $$; sleep 100", options=("--call-id", "c1"))
    assert again["process_id"] == first["process_id"]
    assert len(cli_home.json("ps")) == 1


def test_words_that_are_not_utf8_reach_the_program_and_do_not_silence_the_broker(cli_home: Home) -> None:
    assert cli_home.json("exec", "--", b"printf", b"%s", b"\xff\xfe")["output"] == "\ufffd\ufffd"
    assert "377" in cli_home.json("exec", "--", b"printf '\xff' | od -b")["output"]
    assert r"no-such\xff" in one_line(cli_home.run("exec", "--", b"no-such\xff").stderr)
    rows = cli_home.json("ps", "--all")
    assert rows[0]["command"] == ["printf", "%s", "\ufffd\ufffd"]
    process_id = cli_home.exec("cat", options=("--tty",))["process_id"]
    assert cli_home.json("write", process_id, b"\xff", "--enter")["typed"] == 2
    events = map(json.loads, cli_home.run("events", "--json").stdout.splitlines())
    assert [event["event"] for event in events].count("begin") == 3
    first, again = (cli_home.json("exec", "--call-id", b"\xff", "--", "echo", "once") for _ in range(2))
    assert first["process_id"] == again["process_id"]


def test_a_terminal_has_the_size_it_was_given_and_can_be_resized(shared_home: Home) -> None:
    process_id = shared_home.shell("--size", "100x40")
    assert "40 100" in shared_home.json("write", process_id, "stty size", "--enter")["output"]
    assert shared_home.json("resize", process_id, "120x50")["columns"] == 120
    assert "50 120" in shared_home.json("write", process_id, "stty size", "--enter")["output"]


def test_keys_do_what_they_do_on_a_keyboard(shared_home: Home) -> None:
    process_id = shared_home.shell()
    shared_home.json("write", process_id, "trap 'echo interrupted' INT; echo started; sleep 100", "--enter")
    assert "interrupted" in shared_home.json("write", process_id, "--key", "ctrl-c", "--yield-ms", "500")["output"]
    typed = shared_home.json("write", process_id, "echo ab", "--key", "backspace", "--key", "Enter")
    assert typed["output"].endswith("a\r\n")
    ended = shared_home.json("write", process_id, "--key", "ctrl-d", "--yield-ms", "5000")
    assert ended["outcome"]["kind"] == "exited"


def test_input_of_any_bytes_and_any_length_arrives_whole(shared_home: Home, tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than two calls take
    received = tmp_path / "received"
    script = f"stty raw -echo; echo ready; head -c {len(data)} > {received}"
    process_id = shared_home.exec(script, options=("--tty", "--yield-ms", "1000"))["process_id"]
    result = shared_home.json("write", process_id, "--stdin", "--yield-ms", "30000", input=data)
    assert result["typed"] == len(data)
    assert result["outcome"] == {"kind": "exited", "code": 0}
    assert received.read_bytes() == data


def test_what_a_process_that_ended_did_not_take_is_told(shared_home: Home) -> None:
    script = "stty raw -echo; echo ready; head -c 10 >/dev/null"
    process_id = shared_home.exec(script, options=("--tty", "--yield-ms", "1000"))["process_id"]
    done = shared_home.run("write", process_id, "--stdin", input=b"x" * 3_000_000)
    assert done.returncode == 0
    assert "has ended after" in one_line(done.stderr)


def test_a_process_on_pipes_takes_no_input(shared_home: Home) -> None:
    process_id = shared_home.exec("sleep", "100")["process_id"]
    done = shared_home.run("write", process_id, "x")
    assert done.returncode == 1
    assert "tty" in one_line(done.stderr)


def test_what_a_dead_worker_typed_is_counted_in_the_answer(cli_home: Home) -> None:
    process_id = cli_home.exec("cat", options=("--tty",))["process_id"]
    writing = cli_home.start("write", "--json", process_id, "hello", "--enter", "--yield-ms", "3000")
    deadline = time.monotonic() + PATIENCE
    while cli_home.json("ps")[0]["bytes_written"] < len("hello\r\nhello\r\n"):
        assert time.monotonic() < deadline
    os.kill(cli_home.json("ps")[0]["worker_pid"], signal.SIGKILL)
    output, message = writing.communicate(timeout=PATIENCE)
    assert writing.returncode == 0, message
    assert json.loads(output)["typed"] == 6


def test_the_broker_types_for_a_sleeping_thread_that_is_not_to_be_woken(cli_home: Home) -> None:
    process_id = cli_home.shell()
    assert cli_home.json("detach", "default") == {"process_count": 1, "process_ids": [process_id]}
    assert "42" in cli_home.json("write", "--no-resume", process_id, "echo $((6*7))", "--enter")["output"]
    assert cli_home.json("threads")[0]["state"] == "asleep"
    assert cli_home.json("write", process_id, "echo awake", "--enter")["output"] == "awake\r\n"
    assert cli_home.json("threads")[0]["state"] == "awake"


# Looking.


def test_a_relative_home_is_the_same_place_for_the_broker(cli_home: Home) -> None:
    relative = {**cli_home.environment, "OUTLIVE_HOME": cli_home.path.name}
    command = ("exec", "--json", "--yield-ms", "250", "--", "sleep", "1000")
    done = cli_home.run(*command, env=relative, cwd=cli_home.path.parent)
    assert done.returncode == 0, done.stderr
    assert [row["process_id"] for row in cli_home.json("ps")] == [json.loads(done.stdout)["process_id"]]


def test_ps_shows_the_live_ones_and_with_all_the_ended_ones_too(cli_home: Home) -> None:
    cli_home.json("exec", "-t", "a", "--", "true")
    live = cli_home.exec("sleep", "100", options=("-t", "b", "--call-id", "c7"))["process_id"]
    (row,) = cli_home.json("ps")
    assert (row["thread"], row["process_id"], row["call_id"]) == ("b", live, "c7")
    assert (row["state"], row["tty"], row["command"], row["outcome"]) == ("attached", False, ["sleep", "100"], None)
    assert os.path.exists(f"/proc/{row['pid']}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["started_at"])
    assert {row["state"] for row in cli_home.json("ps", "--all")} == {"attached", "ended"}
    assert cli_home.json("ps", "-t", "a") == []


def test_tables_in_a_pipe_are_plain_and_whole(cli_home: Home) -> None:
    long = "x" * 300
    cli_home.exec("sh", "-c", "sleep 100", long, "a\x1b[31m\nb")
    head, row = cli_home.run("ps", env={**cli_home.environment, "COLUMNS": "40"}).stdout.decode().splitlines()
    assert head.split()[:3] == ["THREAD", "ID", "STATE"]
    assert long in row
    assert row.isprintable()
    threads = cli_home.run("threads").stdout.decode().splitlines()
    assert [line.split()[0] for line in threads] == ["THREAD", "default"]


def test_a_table_on_a_terminal_fits_into_it_and_what_is_last_finds_room(cli_home: Home) -> None:
    cli_home.exec("sh", "-c", "sleep 100", "x" * 300)
    for columns, width, term, head in (
        ("130", 130, "xterm", "THREAD ID STATE PID TTY STARTED BYTES OUTCOME COMMAND"),
        ("90", 90, "dumb", "THREAD ID STATE PID BYTES OUTCOME COMMAND"),
        ("40", 40, "dumb", "THREAD ID STATE COMMAND"),
        ("0", 70, "xterm", "THREAD ID STATE COMMAND"),  # then the terminal itself is asked
    ):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 70))
        environment = {**cli_home.environment, "COLUMNS": columns, "TERM": term}
        done = cli_home.run("ps", stdout=theirs, env=environment)
        os.close(theirs)
        shown = os.read(ours, 100_000).decode()
        os.close(ours)
        assert done.returncode == 0
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.splitlines()]
        assert lines[0].split() == head.split()
        assert len(lines[1]) <= width
        assert "default" in lines[1]
        assert "attached  " in lines[1]
        assert "sh -c 's" in lines[1]


def test_raw_logs_are_the_bytes_and_nothing_else(shared_home: Home) -> None:
    process_id = shared_home.json("exec", "--", r"printf 'a\377\000b'")["process_id"]
    done = shared_home.run("logs", "--raw", process_id)
    assert (done.stdout, done.stderr, done.returncode) == (b"a\xff\0b", b"", 0)
    assert shared_home.run("logs", "--raw", "--since", "3", process_id).stdout == b"b"
    assert shared_home.run("logs", process_id).stdout == "a\ufffd\0b".encode()


def test_a_gap_is_told_where_it_does_no_harm(shared_home: Home) -> None:
    size = 3_000_000
    process_id = shared_home.json("exec", "--", f"yes | head -c {size}")["process_id"]
    raw = shared_home.run("logs", "--raw", process_id)
    gaps = re.findall(r"gap: (\d+) bytes", raw.stderr.decode())
    assert gaps
    assert len(raw.stdout) + sum(map(int, gaps)) == size
    assert set(raw.stdout) == set(b"y\n")
    assert b"are not kept]" in shared_home.run("logs", process_id).stdout
    told = shared_home.json("logs", process_id)
    assert len(told["output"]) + sum(gap["to"] - gap["from"] for gap in told["gaps"]) == size
    assert told["outcome"] == {"kind": "exited", "code": 0}


def test_followed_logs_go_on_to_the_end(shared_home: Home) -> None:
    process_id = shared_home.shell()
    raw = shared_home.start("logs", "-f", "--raw", process_id)
    lines = shared_home.start("logs", "-f", "--json", process_id)
    assert raw.stdout is not None
    shared_home.json("write", process_id, "printf 'caf\\303'", "--enter")
    assert raw.stdout.read(4) == b"caf\xc3"  # it is there before the end
    shared_home.json("write", process_id, "printf '\\251'; exit 4", "--enter", "--yield-ms", "5000")
    assert raw.communicate(timeout=PATIENCE)[0] == b"\xa9"
    told = [json.loads(line) for line in lines.communicate(timeout=PATIENCE)[0].splitlines()]
    assert "".join(line.get("output", "") for line in told) == "café"
    assert told[-1]["outcome"] == {"kind": "exited", "code": 4}
    assert (raw.returncode, lines.returncode) == (0, 0)


@pytest.mark.parametrize("words", [["logs", "-f"], ["wait"]], ids=lambda words: words[0])
def test_a_reader_who_leaves_ends_what_was_waiting(shared_home: Home, words: list[str]) -> None:
    process_id = shared_home.shell()
    waiting = shared_home.start(*words, process_id)
    assert waiting.stdout is not None
    waiting.stdout.close()
    assert waiting.wait(PATIENCE) == 141
    assert waiting.stderr is not None
    assert waiting.stderr.read() == b""
    waiting.stderr.close()


def test_a_reader_who_leaves_early_is_no_error_message(shared_home: Home) -> None:
    process_id = shared_home.json("exec", "--", "yes | head -c 900000")["process_id"]
    showing = shared_home.start("logs", process_id)
    assert showing.stdout is not None
    assert showing.stdout.read(2) == b"y\n"
    showing.stdout.close()
    assert showing.wait(PATIENCE) == 141
    assert showing.stderr is not None
    assert showing.stderr.read() == b""
    showing.stderr.close()


def test_standard_output_that_cannot_be_written_is_told_in_one_line(shared_home: Home) -> None:
    with open("/dev/full", "wb") as full:
        done = shared_home.run("ps", "--json", stdout=full)
    assert done.returncode == 1
    assert "standard output" in one_line(done.stderr)
    closed = subprocess.run(
        ["sh", "-c", f"exec {OUTLIVE} ps --json >&-"], env=shared_home.environment, stderr=subprocess.PIPE
    )
    assert closed.returncode == 1
    assert "standard output" in one_line(closed.stderr)


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)])
def test_wait_of_one_passes_its_exit_code_on(shared_home: Home, script: str, status: int) -> None:
    result = shared_home.json("exec", "--", "sh", "-c", script)
    done = shared_home.run("wait", "--json", f"default/{result['process_id']}")
    assert done.returncode == status
    assert json.loads(done.stdout) == {
        "thread": "default",
        "process_id": result["process_id"],
        "outcome": result["outcome"],
    }
    # What has ended needs no time.
    assert shared_home.run("wait", "--timeout", "0", result["process_id"]).returncode == status


def test_wait_of_several_tells_each_end_in_a_line_and_exits_0(shared_home: Home) -> None:
    first = shared_home.shell("-t", "a")
    second = shared_home.shell("-t", "b")
    waiting = shared_home.start("wait", "--json", f"a/{first}", f"b/{second}")
    assert waiting.stdout is not None
    shared_home.run("write", f"b/{second}", "exit 2", "--enter")
    assert json.loads(waiting.stdout.readline())["thread"] == "b"
    shared_home.run("write", f"a/{first}", "exit 1", "--enter")
    rest, _ = waiting.communicate(timeout=PATIENCE)
    assert json.loads(rest) == {"thread": "a", "process_id": first, "outcome": {"kind": "exited", "code": 1}}
    assert waiting.returncode == 0


def test_wait_that_times_out_exits_124(shared_home: Home) -> None:
    live = shared_home.exec("sleep", "100")["process_id"]
    ended = shared_home.json("exec", "--", "true")["process_id"]
    alone = shared_home.run("wait", "--timeout", "0.1", live)
    assert (alone.returncode, alone.stdout) == (124, b"")
    assert live in one_line(alone.stderr)
    both = shared_home.run("wait", "--timeout", "0.1", "--json", live, ended)
    assert both.returncode == 124
    assert json.loads(both.stdout)["process_id"] == ended


def test_wait_until_a_rule_is_true_exits_0_and_1_when_none_can_be_any_more(shared_home: Home) -> None:
    shell = shared_home.shell("-t", "until")
    waiting = shared_home.start("wait", "--json", f"until/{shell}", "--until", "output=^six: (42)")
    shared_home.run("write", f"until/{shell}", "echo six: $((6*7))", "--enter")
    told, _ = waiting.communicate(timeout=PATIENCE)
    line = json.loads(told)
    assert (line["rule"], line["text"], line["outcome"]) == ("output=^six: (42)", "six: 42", None)
    assert waiting.returncode == 0
    text = shared_home.run("wait", f"until/{shell}", "--until", "output=^six: (42)").stdout
    assert text == f"until/{shell}: output=^six: (42) at offset {line['offset']}: six: 42\n".encode()
    shared_home.run("write", f"until/{shell}", "exit 0", "--enter")
    ended = shared_home.run("wait", f"until/{shell}", "--until", "output=seven")
    assert (ended.returncode, b"before any rule came true" in ended.stdout) == (1, True)
    assert shared_home.run("wait", f"until/{shell}", "--until", "output=seven", "--until", "exit").returncode == 0


def test_wait_for_any_of_several_tells_the_first_and_exits_0(shared_home: Home) -> None:
    live = shared_home.exec("sleep", "100")["process_id"]
    ended = shared_home.json("exec", "--", "false")["process_id"]
    done = shared_home.run("wait", "--any", "--json", live, ended)
    assert (done.returncode, json.loads(done.stdout)["process_id"]) == (0, ended)
    assert shared_home.run("wait", "--any", "--timeout", "0.1", live, live).returncode == 124


def test_rules_that_are_set_are_told_in_a_line_each(shared_home: Home) -> None:
    live = shared_home.json("exec", "--wake-on", "exit", "--yield-ms", "250", "--", "sleep", "100")["process_id"]
    rows = shared_home.json("watch", live, "--wake-on", "exit", "--wake-on", "output=x")
    assert [(row["rule"], row["open"]) for row in rows] == [("exit", True), ("output=x", True)]
    assert [row["wake_on"] for row in shared_home.json("ps") if row["process_id"] == live] == [["exit"]]
    shared_home.run("kill", live)
    shared_home.run("wait", live)
    assert (
        shared_home.run("watch", live, "--wake-on", "port=1").stdout
        == f"default/{live}: port=1 (at once)\n".encode()
    )


def test_ctrl_c_ends_a_wait_and_nothing_else(cli_home: Home) -> None:
    live = cli_home.shell()
    waiting = cli_home.start("logs", "-f", "--raw", live)
    cli_home.run("write", live, "echo seen", "--enter")
    assert waiting.stdout is not None
    assert waiting.stdout.read(6) == b"seen\r\n"
    waiting.send_signal(signal.SIGINT)
    _, message = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 130
    assert "interrupted" in one_line(message)
    assert [row["process_id"] for row in cli_home.json("ps")] == [live]


def test_events_go_on_from_the_recent_ones_without_a_gap(cli_home: Home) -> None:
    process_id = cli_home.exec("cat", options=("--tty",))["process_id"]
    following = cli_home.start("events", "-f", "--deltas", "--json")
    assert following.stdout is not None
    seen = [json.loads(following.stdout.readline())]
    while seen[-1]["event"] != "begin":
        seen.append(json.loads(following.stdout.readline()))
    cli_home.run("detach", "default")
    cli_home.run("resume", "default")
    cli_home.run("write", process_id, "echoed", "--enter")
    while seen[-1]["event"] != "delta":
        seen.append(json.loads(following.stdout.readline()))
    assert [event["event"] for event in seen if event["process_id"]] == ["begin", "detached", "reattached", "delta"]
    assert seen[-1]["chunk"].startswith("echoed")
    numbers = [event["seq"] for event in seen]
    assert numbers == sorted(set(numbers))
    cli_home.run("kill", process_id)
    cli_home.run("down", "--force")
    rest, message = following.communicate(timeout=PATIENCE)
    assert "end" in [json.loads(line)["event"] for line in rest.splitlines()]
    assert following.returncode == 0
    assert "broker has ended" in one_line(message)


def test_status_and_up_tell_about_the_one_broker(cli_home: Home) -> None:
    up = cli_home.json("up")
    status = cli_home.json("status")
    assert up["broker_pid"] == status["broker_pid"]
    assert status["transcript_mode"] in ("spliced", "copied")
    assert status["started_at"].endswith("Z")
    assert "broker pid" in cli_home.run("status").stdout.decode()


def test_doctor_starts_no_broker_and_names_what_is_broken(cli_home: Home) -> None:
    found = cli_home.json("doctor")
    assert {check["check"] for check in found} >= {"kernel", "pidfd", "memfd", "open files", "broker"}
    assert not (cli_home.path / "run").exists()
    (cli_home.path / "config.toml").write_text("max_processes = 'many'\n")
    done = cli_home.run("doctor")
    assert done.returncode == 1
    assert re.search("error +configuration: .*max_processes", done.stdout.decode())
    (cli_home.path / "config.toml").unlink()
    pid = cli_home.json("up")["broker_pid"]
    assert f"pid {pid}" in cli_home.run("doctor").stdout.decode()


# Acting.


def test_kill_tells_what_it_did_though_another_thread_is_not_known(shared_home: Home) -> None:
    process_id = shared_home.exec("sleep", "1000")["process_id"]
    done = shared_home.run("kill", "--json", process_id, "nosuch/1")
    assert [row["process_id"] for row in json.loads(done.stdout)] == [process_id]
    assert (done.returncode, b"thread nosuch is not known" in done.stderr) == (1, True)
    assert shared_home.run("kill", "nosuch/1", "neither/1").returncode == 1


def test_kill_signals_and_escalates_only_when_asked(shared_home: Home) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    process_id = shared_home.exec("sh", "-c", script)["process_id"]
    assert shared_home.json("kill", process_id)[0]["signal"] == 15
    assert shared_home.run("wait", "--timeout", "0.2", process_id).returncode == 124
    for seconds in ("nan", "inf", "-1"):
        assert shared_home.run("wait", "--timeout", seconds, process_id).returncode == 2
    assert shared_home.json("kill", process_id, "--after", "0.2")[0]["signalled"] >= 1
    done = shared_home.run("wait", "--json", process_id)
    assert done.returncode == 137
    assert json.loads(done.stdout)["outcome"] == {"kind": "signaled", "signal": 9, "by": "caller"}
    assert shared_home.json("kill", process_id)[0]["signalled"] == 0


def test_kill_foreground_leaves_the_shell_alone(shared_home: Home) -> None:
    process_id = shared_home.exec("bash --norc -i", options=("--tty",))["process_id"]
    shared_home.json("write", process_id, "echo st''arted; sleep 100; echo st''atus=$?", "--enter")
    shared_home.run("kill", "-s", "int", "--foreground", process_id)
    again = shared_home.json("write", process_id, "echo still=$((1+1))", "--enter", "--yield-ms", "500")
    assert "still=2" in again["output"]
    assert again["outcome"] is None


def test_a_thread_sleeps_wakes_and_is_cleaned(cli_home: Home) -> None:
    process_id = cli_home.exec("sleep", "100", options=("-t", "build"))["process_id"]
    one = {"process_count": 1, "process_ids": [process_id]}
    assert cli_home.json("detach", "build") == one
    assert cli_home.json("detach", "unknown") == {"process_count": 0, "process_ids": []}
    assert cli_home.run("reattach", "build").returncode == 1  # it has no worker
    row = cli_home.json("resume", "build")
    assert (row["thread"], row["state"], row["epoch"], row["attached"]) == ("build", "awake", 2, 1)
    assert cli_home.json("detach", "build", "--keep-worker") == one
    assert cli_home.json("reattach", "build") == {
        "reattached_count": 1,
        "skipped_count": 0,
        "skipped_process_ids": [],
    }
    assert cli_home.json("clean", "build")["process_count"] == 0  # it is attached
    assert cli_home.json("detach", "build") == one
    assert cli_home.json("clean", "build") == one
    assert cli_home.run("wait", f"build/{process_id}").returncode in (137, 143)


def test_shutdown_of_a_thread_and_of_all(cli_home: Home) -> None:
    cli_home.exec("sleep", "100", options=("-t", "a"))
    cli_home.exec("sleep", "100", options=("-t", "b"))
    row = cli_home.json("shutdown", "a")
    assert (row["thread"], row["state"], row["attached"]) == ("a", "asleep", 0)
    assert [row["thread"] for row in cli_home.json("ps")] == ["b"]
    assert [row["state"] for row in cli_home.json("shutdown")] == ["asleep", "asleep"]
    assert cli_home.json("ps") == []


def test_down_refuses_while_processes_live_and_has_ended_the_broker_when_it_returns(cli_home: Home) -> None:
    assert cli_home.json("down") == {"ended": []}
    process_id = cli_home.exec("sleep", "100")["process_id"]
    pid = cli_home.json("status")["broker_pid"]
    refused = cli_home.run("down")
    assert refused.returncode == 1
    assert f"default/{process_id}" in one_line(refused.stderr)
    assert cli_home.json("down", "--force") == {"ended": [f"default/{process_id}"]}
    assert kernel.zombie_status(pid) is not None or not os.path.exists(f"/proc/{pid}")


# Completion.


def complete(home: Home, *words: str) -> list[str]:
    """Return what bash would offer for the last word."""
    environment = {
        **home.environment,
        "_OUTLIVE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["outlive", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = home.run(env=environment)
    assert done.stderr == b""
    return [line.rpartition(",")[2] for line in done.stdout.decode().split()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed_for_each_shell(cli_home: Home, shell: str) -> None:
    assert f"_OUTLIVE_COMPLETE={shell}_complete" in cli_home.run("completion", shell).stdout.decode()


def test_completion_offers_threads_and_processes_and_starts_no_broker(cli_home: Home) -> None:
    assert complete(cli_home, "detach", "b") == []
    assert complete(cli_home, "ev") == ["events"]
    assert not (cli_home.path / "run").exists()
    other = cli_home.exec("sleep", "100", options=("-t", "build"))["process_id"]
    own = cli_home.exec("sleep", "100")["process_id"]
    assert complete(cli_home, "detach", "b") == ["build"]
    assert sorted(complete(cli_home, "kill", "")) == sorted([own, f"build/{other}"])
    assert complete(cli_home, "kill", "-t", "build", other[:2]) == [other]
