"""Under a real systemd's store: what outlives the keeper, the broker, both at once, and a restart of the unit."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import outlive

from .conftest import HELD, PATIENCE, Home, Numbered
from .private_systemd import OUTLIVE, PrivateSystemd, unavailable

# How often it happens in one test: what was given back once has to be stored anew.
TURNS = 2
UNIT = f"outlive-{os.getuid()}.service"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[PrivateSystemd]:
    """A booted systemd."""
    if reason := unavailable():
        pytest.skip(reason)
    systemd = PrivateSystemd(tmp_path)
    yield systemd
    systemd.close()


def die(how: str, status: dict[str, Any]) -> None:
    """Let happen what the test is about."""
    if how == "restart":
        subprocess.run(["systemctl", "restart", UNIT], check=True)
    else:
        # The keeper first: it must not have the time to start the next broker.
        for role in ("keeper_pid", "broker_pid"):
            if how in (role, "both"):
                with suppress(ProcessLookupError):
                    os.kill(status[role], signal.SIGKILL)


class Cast:
    """One thread's processes: a shell with state, a flood on a terminal, and one child to end in each turn."""

    def __init__(self, thread: outlive.Thread, folder: Path, *, awake: bool) -> None:
        self.thread = thread
        self.folder = folder
        self.awake = awake

    async def enter(self) -> None:
        """Start them."""
        self.gates = [self.folder / f"{self.thread.thread_id}-{turn}" for turn in range(TURNS)]
        for gate in self.gates:
            os.mkfifo(gate)
        words = [
            ["sh", "-c", HELD, str(gate), f"printf last; exit {40 + turn}"] for turn, gate in enumerate(self.gates)
        ]
        self.flood, shell, *held = await asyncio.gather(
            Numbered.start(self.thread, self.folder, tty=True),
            self.thread.exec_command(["sh"], tty=True, yield_time_ms=250),
            *(self.thread.exec_command(command, yield_time_ms=250) for command in words),
        )
        self.shell, self.held = shell.process_id, [child.process_id for child in held]
        await self.type(f"stty -echo; PS1=; value={self.thread.thread_id}")
        self.pids = {row.process_id: row.pid for row in await self.thread.processes()}
        if not self.awake:
            await self.thread.detach()

    async def type(self, line: str) -> None:
        """Type into the shell; whoever has it: the thread's worker, or the broker."""
        await self.thread.write_stdin(self.shell, f"{line}\n", resume=self.awake)

    async def hear(self, wanted: bytes) -> None:
        """Wait until the shell has said it, once."""
        at, said = 0, b""
        while wanted not in said:
            output = await self.thread.read_output(self.shell, at, wait_ms=5000)
            said, at = said + b"".join(data for _, data in output.pieces), output.next_offset
        assert said.count(wanted) == 1, said

    async def go_on(self, turn: int) -> None:
        """See that nothing was lost, and that what was to end has ended as it should."""
        assert await self.thread.wait(self.held[turn]) == outlive.Outcome("exited", code=40 + turn)
        assert await self.thread.output(self.held[turn]) == b"last"
        await self.flood.more(300_000)
        await self.type(f"echo is:$value:{turn}")
        await self.hear(f"is:{self.thread.thread_id}:{turn}\r\n".encode())
        living = {row.process_id: row.pid for row in await self.thread.processes()}
        assert living == {name: pid for name, pid in self.pids.items() if name not in self.held[: turn + 1]}

    async def leave(self) -> None:
        """End what still lives, and hold all it printed against what it says it has printed."""
        await self.type("exit 5")
        assert await self.thread.wait(self.shell) == outlive.Outcome("exited", code=5)
        assert await self.flood.finish() == outlive.Outcome("exited", code=7)
        await self.flood.check()


async def survive(how: str) -> None:
    """Let it happen again and again to an awake thread and a sleeping one."""
    home = Home(Path(os.environ["OUTLIVE_HOME"]))
    async with outlive.connect() as host:
        casts = [Cast(await host.thread(name), home.path, awake=name == "awake") for name in ("awake", "asleep")]
        await asyncio.gather(*(cast.enter() for cast in casts))
        for turn in range(TURNS):
            before = await host.status()
            die(how, before)
            for cast in casts:
                cast.gates[turn].write_text("go\n")
            for role in ("broker_pid",) if how == "broker_pid" else ("keeper_pid", "broker_pid"):
                # Between two keepers there is none.
                while (await host.status())[role] in (None, before[role]):
                    pass
            await asyncio.gather(*(cast.go_on(turn) for cast in casts))
        await asyncio.gather(*(cast.leave() for cast in casts))


@pytest.mark.parametrize(
    ("manager", "how"),
    [("--system", "keeper_pid"), ("--system", "broker_pid"), ("--system", "restart"), ("--user", "both")],
)
def test_everything_survives_byte_for_byte_and_with_its_exit_code(
    systemd: PrivateSystemd, manager: str, how: str
) -> None:
    if manager == "--user":
        systemd.start_user_manager()
    systemd.run(OUTLIVE, "broker", "install", manager)
    systemd.play(survive, how)


def test_uninstall_refuses_while_a_process_lives_and_by_force_leaves_nothing(systemd: PrivateSystemd) -> None:
    systemd.outlive("broker", "install", "--system")
    started = systemd.outlive("exec", "--yield-ms", "250", "--tty", "--", "sh")
    named = f"default/{started['process_id']}"
    shown = systemd.run("systemctl", "show", "--property=NFileDescriptorStore", "--value", UNIT).stdout
    assert int(shown) >= 6
    systemd.outlive("broker", "uninstall", told=named)
    assert systemd.outlive("ps")
    assert systemd.outlive("broker", "uninstall", "--force")["ended"] == [named]
    assert "outlive" not in systemd.run("find", "/etc/systemd/system").stdout
    assert "python" not in systemd.run("ps", "-eo", "args").stdout


def test_a_stop_is_obeyed_while_the_broker_has_only_begun_to_start(home: Home, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unit:
        unit.bind(str(tmp_path / "unit"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "unit")}
        for command in ([sys.executable, "-P", "-m", "outlive.broker.keeper"],) * 3:
            keeper = subprocess.Popen(command, env=environment)
            while not home.pids("broker"):
                assert keeper.poll() is None
            keeper.terminate()
            keeper.wait(PATIENCE)
            assert not home.pids("broker")
