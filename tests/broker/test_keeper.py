"""A real keeper, whose brokers do only what the test says: each shows what it was started with, and waits."""

from __future__ import annotations

import array
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from outlive.broker.keeper import FIRST_PAUSE, GIVE_UP_AFTER, LONGEST_PAUSE, NEEDED, Keeper
from outlive.common import kernel, notify
from outlive.common.paths import Paths

# Seconds for what a busy machine does.
PATIENCE = 30.0
# What every Python of the keeper runs first: a broker becomes this instead.
PUPPET = """
import os, socket
if os.environ.get("OUTLIVE_ROLE") == "broker":
    strings = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    strings.connect(os.environ["PUPPETS"])
    count = int(os.environ["LISTEN_FDS"])
    socket.send_fds(strings, [f"{os.getpid()} {os.environ['LISTEN_FDNAMES']}".encode()], range(3, 3 + count))
    while order := strings.recv(4096):
        if order.isdigit():
            os._exit(int(order))
        strings.send(str(os.posix_spawn("/bin/sh", ["sh", "-c", order], os.environ)).encode())
    os._exit(0)
"""


class Puppet:
    """One broker: what it was started with, and the strings it hangs on."""

    def __init__(self, strings: socket.socket) -> None:
        self.strings = strings
        said, fds, _, _ = socket.recv_fds(strings, 1 << 18, 253)
        pid, _, names = said.decode().partition(" ")
        self.pid = int(pid)
        first, *self.names = names.split(":")
        assert first == "keeper"
        self.line = socket.socket(fileno=fds[0])
        self.line.settimeout(PATIENCE)
        self.fds = fds[1:]
        self.orphans: list[dict[str, str]] = []

    def hear(self) -> tuple[dict[str, str], list[int]]:
        """Return the keeper's next datagram."""
        fields, fds, _ = notify.receive(self.line) or ({}, [], 0)
        assert fields, "the keeper has hung up"
        if "ORPHAN" in fields:
            self.orphans.append(fields)
        return fields, fds

    def hears_of(self, pid: int) -> dict[str, str]:
        """Return what the keeper tells, or has told, of the end of an orphan."""
        while not (told := [orphan for orphan in self.orphans if orphan["ORPHAN"] == str(pid)]):
            self.hear()
        assert len(told) == 1
        return told[0]

    def run(self, line: str) -> int:
        """Have it start a shell, and return the pid of that."""
        self.strings.send(line.encode())
        return int(self.strings.recv(64))

    def end(self, status: int) -> None:
        """Have it end."""
        self.line.close()  # else it is open still, and the keeper sees no end of it
        self.strings.send(str(status).encode())
        assert self.strings.recv(1) == b""

    def close(self) -> None:
        """Let go of everything of it."""
        for fd in self.fds:
            os.close(fd)
        self.line.close()
        self.strings.close()


class Stage:
    """A keeper and its puppets."""

    def __init__(self, folder: Path) -> None:
        self.paths = Paths.from_environment({"OUTLIVE_HOME": str(folder / "h")})
        (folder / "sitecustomize.py").write_text(PUPPET)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(folder / "puppets"))
        self.listener.listen()
        self.listener.settimeout(PATIENCE)
        self.environment = {
            **os.environ,
            "OUTLIVE_HOME": str(folder / "h"),
            "PYTHONPATH": str(folder),
            "PUPPETS": str(folder / "puppets"),
        }
        self.log = (folder / "log").open("w")
        self.puppets: list[Puppet] = []
        self.keeper = self.start()
        self.to = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.to.settimeout(PATIENCE)

    def start(self, *arguments: str, fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a keeper."""
        command = [sys.executable, "-P", "-m", "outlive.broker.keeper", *arguments]
        return subprocess.Popen(command, env=self.environment, stderr=self.log, pass_fds=fds)

    def broker(self, *, ready: bool = True) -> Puppet:
        """Return the next broker; `ready`: the keeper knows that it has come up."""
        self.puppets.append(Puppet(self.listener.accept()[0]))
        if ready:
            self.tell({"READY": "1"})
            self.kept("")
        return self.puppets[-1]

    def tell(self, fields: notify.Fields | bytes, fds: tuple[int, ...] = ()) -> None:
        """Send the keeper a datagram."""
        raw = fields if isinstance(fields, bytes) else notify.encode(fields)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.to.sendmsg([raw], rights, 0, str(self.paths.keeper))

    def kept(self, name: str) -> list[int]:
        """Return what is kept under a name by now: what was told before has been taken in."""
        self.tell({"FORWARD": "1", "FDNAME": name})
        broker = self.puppets[-1]
        while "FORWARD" not in (answer := broker.hear())[0]:
            pass
        _, fds = answer
        broker.fds += fds
        return fds

    def held(self) -> int:
        """Return how many descriptors the keeper has open."""
        return len(os.listdir(f"/proc/{self.keeper.pid}/fd"))

    def close(self) -> None:
        """End them all."""
        self.keeper.kill()
        self.keeper.wait()
        for puppet in self.puppets:
            puppet.close()
        self.listener.close()
        self.to.close()
        self.log.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Opens files, each one another."""
    fds = []

    def opened(name: str) -> int:
        fds.append(os.open(tmp_path / name, os.O_RDWR | os.O_CREAT))
        return fds[-1]

    yield opened
    for fd in fds:
        os.close(fd)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_the_next_broker_gets_what_was_kept_until_the_last_moment_and_nothing_that_was_removed(
    stage: Stage, file: Callable[[str], int]
) -> None:
    broker = stage.broker()
    one, other, last = file("one"), file("other"), file("last")
    stage.tell(notify.stored("a"), (one, other))
    stage.tell(notify.stored("b"), (other,))
    stage.kept("")
    os.kill(stage.keeper.pid, signal.SIGSTOP)
    stage.tell(notify.removed("b"))
    stage.tell(notify.stored("a"), (last,))
    broker.end(1)
    os.kill(stage.keeper.pid, signal.SIGCONT)
    after = stage.broker()
    assert after.names == ["a"] * 3
    assert all(map(kernel.is_same_file, after.fds, (one, other, last)))


def test_it_hands_what_it_keeps_to_the_broker_that_asks(stage: Stage, file: Callable[[str], int]) -> None:
    stage.broker()
    stage.tell(notify.stored("a"), (file("a"),))
    (fd,) = stage.kept("a")
    assert os.path.sameopenfile(fd, file("a"))


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe\0=\n=\n\n===",
        b"FDSTORE",
        b"FDNAME=x",
        b"MAINPID=-1\nORPHAN=1",
        b"MAINPID=one",
        b"FDSTORE=1\nFDNAME=x\n" + b"x" * notify.DATAGRAM_MAX,
        b"FDSTOREREMOVE=1\nFDNAME=x\nFDSTORE=1",
    ],
)
def test_garbage_changes_nothing_and_its_descriptors_are_closed(
    stage: Stage, file: Callable[[str], int], garbage: bytes
) -> None:
    broker = stage.broker()
    stage.tell(notify.stored("a"), (file("a"),))
    stage.kept("")
    before = stage.held()
    for fds in ((), (file("b"), file("c"))):
        stage.tell(garbage, fds)
    assert stage.kept("x") == []
    assert stage.held() == before
    broker.end(0)
    assert stage.broker().names == ["a"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and get past the folder's mode")
def test_what_another_user_sends_is_not_even_read(stage: Stage, file: Callable[[str], int]) -> None:
    broker = stage.broker()
    before = stage.held()
    if (pid := os.fork()) == 0:
        with suppress(BaseException):
            stage.to.connect(str(stage.paths.keeper))
            os.setresuid(65534, 65534, 65534)
            for fields in (notify.stored("foreign"), {"STOPPING": "1"}, {"MAINPID": "1"}):
                notify.send(stage.to, fields, (1,))
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    stage.tell(notify.stored("ours"), (file("a"),))
    assert len(stage.kept("ours")) == 1
    assert stage.held() == before + 1
    broker.end(0)
    assert stage.broker().names == ["ours"]


def test_beyond_its_limit_it_keeps_nothing_more_and_what_it_keeps_stays(
    stage: Stage, file: Callable[[str], int]
) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < notify.STORE_MAX + 100:
        pytest.skip(f"no process may open {notify.STORE_MAX} files here")
    stage.broker()
    before = stage.held()
    many = (file("many"),) * notify.DESCRIPTORS_MAX
    whole, rest = divmod(notify.STORE_MAX, len(many))
    for number in range(whole):
        stage.tell(notify.stored(f"{number}"), many)
        stage.kept("")
    stage.tell(notify.stored("too-many"), many)
    stage.tell(notify.stored("rest"), many[:rest])
    stage.tell(notify.stored("too-many"), many[:1])
    assert stage.kept("too-many") == []
    assert stage.held() == before + notify.STORE_MAX
    stage.tell(notify.removed("0"))
    stage.tell(notify.stored("again"), many[:1])
    assert len(stage.kept("again")) == 1


def test_how_an_orphan_ended_is_told_to_the_broker_of_now_and_to_each_that_comes(
    stage: Stage, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    broker = stage.broker()
    pid = broker.run(f"read x <{tmp_path}/go; exit 42")
    broker.end(1)
    broker = stage.broker()
    told = {"ORPHAN": str(pid), "START": str(kernel.start_time(pid)), "STATUS": str(42 << 8)}
    (tmp_path / "go").write_text("go\n")
    assert broker.hears_of(pid) == told
    for _ in range(2):
        broker.end(0)
        broker = stage.broker()
        assert broker.hears_of(pid) == told


def test_a_broker_that_crashes_while_it_starts_is_started_later_each_time_and_meanwhile_nobody_works(
    stage: Stage, file: Callable[[str], int]
) -> None:
    stage.broker().end(1)  # it had come up: that does not count
    stage.broker(ready=False)
    stage.tell(notify.stored("a"), (file("a"),))
    stage.kept("")
    began, worked = time.monotonic(), cpu_seconds(stage.keeper.pid)
    stage.puppets[-1].end(1)
    for _ in range(GIVE_UP_AFTER - 1):
        stage.broker(ready=False).end(1)
    assert stage.broker(ready=False).names == ["a"]  # it holds something, so it never gives up
    waited = time.monotonic() - began
    assert waited >= FIRST_PAUSE * (2**GIVE_UP_AFTER - 1)
    assert cpu_seconds(stage.keeper.pid) - worked < waited / 3


def test_no_pause_is_longer_than_the_longest_however_often_a_broker_failed() -> None:
    keeper = object.__new__(Keeper)
    keeper.line = None
    keeper.failures = 5000
    before = time.monotonic()
    keeper._pause(failed=True)
    assert before + LONGEST_PAUSE <= keeper.start_at <= time.monotonic() + LONGEST_PAUSE


def test_it_gives_up_brokers_that_do_not_come_up_if_it_holds_nothing(stage: Stage) -> None:
    for _ in range(GIVE_UP_AFTER):
        stage.broker(ready=False).end(1)
    assert stage.keeper.wait(PATIENCE) == 0
    assert not stage.paths.keeper.exists()


@pytest.mark.parametrize(("stored", "status"), [((), 0), (("a",), NEEDED)])
def test_it_ends_with_a_broker_that_was_told_to_and_its_status_says_whether_something_is_left(
    stage: Stage, file: Callable[[str], int], stored: tuple[str, ...], status: int
) -> None:
    broker = stage.broker()
    for name in stored:
        stage.tell(notify.stored(name), (file(name),))
    stage.tell({"STOPPING": "1"})
    broker.end(0)
    assert stage.keeper.wait(PATIENCE) == status
    assert not stage.paths.keeper.exists()


def test_a_sigterm_goes_to_the_broker_and_its_death_is_no_end(stage: Stage) -> None:
    broker = stage.broker()
    stage.keeper.terminate()
    assert broker.strings.recv(1) == b""
    assert stage.broker().hears_of(broker.pid)["STATUS"] == str(int(signal.SIGTERM))


def test_a_second_keeper_of_the_same_folder_says_so_and_ends(stage: Stage) -> None:
    stage.broker()
    ready, theirs = os.pipe()
    second = stage.start(str(theirs), fds=(theirs,))
    os.close(theirs)
    assert os.read(ready, 100) == b"taken"
    os.close(ready)
    assert second.wait(PATIENCE) == 0
    assert stage.kept("") == []


def test_executed_anew_it_is_the_same_with_everything_it_held(
    stage: Stage, tmp_path: Path, file: Callable[[str], int]
) -> None:
    os.mkfifo(tmp_path / "go")
    first = stage.broker()
    orphan = first.run("exit 3")
    late = first.run(f"read x <{tmp_path}/go; exit 4")
    first.end(1)
    broker = stage.broker()
    stage.tell(notify.stored("a"), (file("a"),))
    stage.kept("")
    held = stage.held()
    stage.tell(notify.stored("b"), (file("b"),))
    stage.keeper.send_signal(signal.SIGHUP)
    stage.tell(notify.stored("c"), (file("c"),))  # before or after, it is heard
    while b"\0OUTLIVE_KEEPER=" not in Path(f"/proc/{stage.keeper.pid}/environ").read_bytes():
        assert stage.keeper.poll() is None
    stage.kept("")
    assert stage.held() == held + 2
    (tmp_path / "go").write_text("go\n")
    broker.hears_of(late)
    broker.end(0)
    after = stage.broker()
    assert after.names == ["a", "b", "c"]
    assert os.path.sameopenfile(after.fds[0], file("a"))
    codes = {first.pid: 1, orphan: 3, late: 4, broker.pid: 0}
    assert {pid: int(after.hears_of(pid)["STATUS"]) >> 8 for pid in codes} == codes
