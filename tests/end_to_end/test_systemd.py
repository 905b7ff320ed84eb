"""The broker as a unit of a real systemd, in private namespaces: installed, killed, restarted, removed."""

from __future__ import annotations

import json
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


def test_a_home_may_be_called_what_means_something_to_systemd(systemd: PrivateSystemd) -> None:
    systemd.environment["OUTLIVE_HOME"] = home = f"{systemd.folder}/a b %n %% $HOME ${{x}} \\x41 'q\" #;"
    systemd.outlive("broker", "install", "--system")
    assert systemd.outlive("status", "--no-start")["keeper_pid"] == int(shown(systemd, "MainPID"))
    assert Path(home, "run/keeper").is_socket()
    systemd.outlive("broker", "uninstall")


def test_installing_again_changes_the_unit_and_not_the_broker_that_runs(systemd: PrivateSystemd) -> None:
    unit = systemd.outlive("broker", "install", "--system")["path"]
    before = systemd.outlive("status")
    assert systemd.outlive("broker", "install", "--system")["path"] == unit
    systemd.run("sed", "-i", "s/Restart=always/Restart=no/", unit)
    systemd.outlive("broker", "install", "--system")
    assert "Restart=always" in systemd.run("cat", unit).stdout
    after = systemd.outlive("status")
    assert (after["keeper_pid"], after["broker_pid"]) == (before["keeper_pid"], before["broker_pid"])
    assert int(shown(systemd, "MainPID")) == after["keeper_pid"]


def test_a_unit_of_another_home_is_left_alone(systemd: PrivateSystemd) -> None:
    unit = systemd.outlive("broker", "install", "--system")["path"]
    before = systemd.run("cat", unit).stdout
    systemd.environment["OUTLIVE_HOME"] += "-other"
    systemd.outlive("broker", "install", "--system", told=f"is for the broker of {systemd.home}/run")
    systemd.outlive("broker", "uninstall", told="no unit is installed")
    assert systemd.run("cat", unit).stdout == before
    # It has a broker of its own, outside systemd.
    systemd.outlive("up")
    assert systemd.run("systemctl", "is-active", UNIT).stdout == "active\n"


def test_after_down_the_unit_stays_down_until_somebody_needs_a_broker(systemd: PrivateSystemd) -> None:
    systemd.outlive("broker", "install", "--system")
    systemd.outlive("down")
    while (state := shown(systemd, "ActiveState")) in ("active", "deactivating"):
        pass
    assert (state, shown(systemd, "Result"), shown(systemd, "NRestarts")) == ("inactive", "success", "0")
    systemd.outlive("status", "--no-start", told="no broker runs")
    keeper = systemd.outlive("status")["keeper_pid"]
    assert int(shown(systemd, "MainPID")) == keeper
    # Its log is where messages say, not in the journal.
    log = systemd.run("readlink", f"/proc/{keeper}/fd/2").stdout.strip()
    assert log == str(systemd.home / "state/broker.log")


def test_whoever_needs_a_broker_has_the_stopped_unit_started(systemd: PrivateSystemd) -> None:
    systemd.outlive("broker", "install", "--system")
    systemd.outlive("exec", "--yield-ms", "250", "--tty", "--", "sh")
    systemd.run("systemctl", "stop", UNIT)
    assert shown(systemd, "Result") == "success"
    systemd.outlive("status", "--no-start", told="no broker runs")
    keeper = systemd.outlive("status")["keeper_pid"]
    assert int(shown(systemd, "MainPID")) == keeper


def test_a_unit_that_cannot_be_started_is_told_and_nothing_is_started_beside_it(systemd: PrivateSystemd) -> None:
    unit = systemd.outlive("broker", "install", "--system")["path"]
    systemd.run("systemctl", "stop", UNIT)
    systemd.run("sed", "-i", "/ExecStart/d", unit)
    systemd.run("systemctl", "daemon-reload")
    systemd.outlive("up", told=f"systemctl --system status {UNIT}")
    systemd.outlive("status", "--no-start", told="no broker runs")
    systemd.outlive("broker", "uninstall")
    systemd.outlive("up")


def test_the_users_own_manager_runs_the_broker_and_a_refused_lingering_is_a_warning(
    systemd: PrivateSystemd,
) -> None:
    systemd.start_user_manager()
    done = systemd.run(OUTLIVE, "broker", "install", "--json")
    assert "`sudo loginctl enable-linger" in done.stderr
    installed = json.loads(done.stdout)
    assert installed["lingering"] is False
    assert installed["path"] == f"{systemd.folder}/config/systemd/user/outlive.service"
    keeper = systemd.outlive("status")["keeper_pid"]
    assert int(shown(systemd, "MainPID", "--user", "outlive.service")) == keeper
    systemd.outlive("broker", "install", "--system", told="is installed for this broker already")
    systemd.outlive("broker", "uninstall")
    assert not Path(installed["path"]).exists()
    systemd.outlive("status", "--no-start", told="no broker runs")
