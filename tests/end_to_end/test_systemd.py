"""The broker as a unit of a real systemd, in private namespaces: installed, killed, restarted, removed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlive.scripts.units import Service, render

from .private_systemd import OUTLIVE, PrivateSystemd, unavailable

UNIT = f"outlive-{os.getuid()}.service"

# A main process that stores a file once, and tells the named pipe in its argument what it found at its start.
STORER = """
import os, signal, socket, sys
count = int(os.environ.get("LISTEN_FDS", "0"))
names = os.environ.get("LISTEN_FDNAMES", "").split(":")
found = [f"{name}={os.pread(fd, 100, 0).decode()}" for fd, name in zip(range(3, 3 + count), names)]
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.connect(os.environ["NOTIFY_SOCKET"])
if not found:
    file = os.memfd_create("x")
    os.write(file, b"kept")
    socket.send_fds(manager, [b"FDSTORE=1\\nFDNAME=0123456789ab\\nFDPOLL=0"], [file])
manager.send(b"READY=1")
with open(sys.argv[1], "w") as told:
    told.write(f"{os.getpid()} {','.join(found)}\\n")
signal.pause()
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[PrivateSystemd]:
    """A booted systemd."""
    if reason := unavailable():
        pytest.skip(reason)
    systemd = PrivateSystemd(tmp_path)
    yield systemd
    systemd.close()


def shown(systemd: PrivateSystemd, name: str, manager: str = "--system", unit: str = UNIT) -> str:
    """Return one property of a unit."""
    return systemd.run("systemctl", manager, "show", f"--property={name}", "--value", unit).stdout.strip()


def test_a_unit_of_ours_gives_what_was_stored_to_each_next_main_process(systemd: PrivateSystemd) -> None:
    pipe = systemd.folder / "told"
    os.mkfifo(pipe)
    (systemd.folder / "storer.py").write_text(STORER)
    service = Service(
        [sys.executable, "-IS", str(systemd.folder / "storer.py"), str(pipe)], pipe, uid=0, systemd=252
    )
    (systemd.folder / "storer.service").write_text(render(service))
    systemd.run("cp", systemd.folder / "storer.service", "/etc/systemd/system")
    systemd.run("systemctl", "enable", "--now", "--no-block", "storer.service")
    pid, found = pipe.read_text().split(" ")
    assert found == "\n"
    acts = (["kill", "-KILL"], ["kill", "-TERM"], ["systemctl", "restart", "--no-block"])
    for command in acts * 2:
        systemd.run(*command, pid if command[0] == "kill" else "storer.service")
        pid, found = pipe.read_text().split(" ")
        assert found == "0123456789ab=kept\n"
    settings = systemd.run("systemctl", "show", "storer.service").stdout.splitlines()
    # What systemd made of the settings: one that it does not understand it only complains about.
    assert {
        "FileDescriptorStoreMax=10000",
        "NFileDescriptorStore=1",
        "KillMode=process",
        "OOMPolicy=continue",
        "Restart=always",
        "StartLimitIntervalUSec=0",
        "TasksMax=infinity",
        "TimeoutStartUSec=infinity",
        "Delegate=yes",
        "LimitNOFILESoft=1024",
        "NotifyAccess=main",
        "WatchdogUSec=0",
        "UnitFileState=enabled",
    } <= set(settings), settings
    assert not [line for line in systemd.log().splitlines() if "storer.service:" in line and "gnoring" in line]


def test_install_without_a_manager_is_refused_with_what_to_do_instead(systemd: PrivateSystemd) -> None:
    systemd.outlive("broker", "install", "--user", told="no systemd user manager runs for you")
    done = systemd.run("env", f"PATH={systemd.folder}", OUTLIVE, "broker", "install", "--system", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no systemctl" in done.stderr
    assert "`outlive up`" in done.stderr


def test_install_leaves_a_broker_that_runs_outside_systemd_alone_and_says_what_to_do(
    systemd: PrivateSystemd,
) -> None:
    # In no session, and nobody's child: with nsenter's end nothing of it ends.
    before = systemd.outlive("up")
    systemd.outlive("broker", "install", "--system", told="`outlive down`")
    assert systemd.outlive("status")["broker_pid"] == before["broker_pid"]
    assert systemd.run("ls", "/etc/systemd/system").stdout.split() == sorted(
        f"{name}.target" for name in ("basic", "multi-user", "shutdown", "sysinit")
    )
    systemd.outlive("broker", "uninstall", told="no unit is installed")
    assert systemd.outlive("status")["broker_pid"] == before["broker_pid"]


def test_a_unit_that_does_not_come_up_is_taken_out_again(systemd: PrivateSystemd) -> None:
    systemd.home.mkdir()
    (systemd.home / "run").write_text("in the way")
    systemd.outlive("broker", "install", "--system", told="taken out again")
    assert "outlive" not in systemd.run("find", "/etc/systemd/system").stdout
