"""A systemd of our own: PID 1 of private namespaces, for the tests that need one.

It sees the machine's files, read-only, and its own: `/run`, `/etc/systemd/system`, a process table, a cgroup.  Only
the folder that it is given can be written to.  It knows no unit of the machine's, since booting those would mount,
load and clean up for real.  It is up in a tenth of a second, and gone as soon as its PID 1 is killed: the kernel
ends what is in the namespaces, and the mounts with the last process.

Process ids differ inside, so whoever talks to a broker there has to be there: `run` runs a command, `play` an async
function of a test module.
"""

from __future__ import annotations

import functools
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Seconds for what takes a tenth of one.
PATIENCE = 30.0

OUTLIVE = str(Path(sysconfig.get_path("scripts")) / "outlive")
_TESTS = Path(__file__).parents[1]
_SYSTEMD = next((p for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(p)), "")
_PROGRAMS = ("setpriv", "unshare", "nsenter", "mount", "umount", "systemctl")
_NAMESPACES = ("--pid", "--mount", "--uts", "--ipc")

# `sh -c ENTER CGROUP COMMAND...`: the cgroup that we are in when its namespace is made is the root of that.
_ENTER = 'echo 0 >"$0/cgroup.procs" && exec unshare --cgroup "$@"'

# `sh -euc BOOT FOLDER SYSTEMD CONSOLE`.  Remounting is for this namespace only.  A systemd that is PID 1 logs to
# the console, which has to be a terminal, and must not be the machine's.
_BOOT = """
mount --make-rprivate /
mount --bind "$0" "$0"
mount -o remount,bind,ro /
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind "$2" /dev/console
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/systemd/system
cd /etc/systemd/system
for target in sysinit basic multi-user shutdown; do
    printf '[Unit]\\nDefaultDependencies=no\\n' >$target.target
done
mkdir -p /run/systemd/system /run/systemd/system.conf.d /run/none
printf '[Manager]\nDefaultStandardOutput=tty\n' >/run/systemd/system.conf.d/log.conf
exec env -i PATH="$PATH" container=outlive-test NOTIFY_SOCKET="$0/up" SYSTEMD_UNIT_PATH=$PWD \\
    SYSTEMD_GENERATOR_PATH=/run/none "$1" --system --unit=multi-user.target \
    --log-target=console --show-status=no
"""

# `sh -euc USER FOLDER SYSTEMD`: a user's manager, with units of its own below FOLDER.
_USER = """
mkdir -p "$0/config/systemd/user" "$0/runtime"
for target in default basic shutdown; do
    printf '[Unit]\\nDefaultDependencies=no\\n' >"$0/config/systemd/user/$target.target"
done
cat >/etc/systemd/system/manager.service <<-X
	[Service]
	Type=notify
	Delegate=yes
	KillMode=mixed
	Environment=HOME=$0 XDG_RUNTIME_DIR=$0/runtime XDG_CONFIG_HOME=$0/config
	Environment=SYSTEMD_UNIT_PATH=$0/config/systemd/user SYSTEMD_GENERATOR_PATH=/run/none
	ExecStart=$1 --user --log-target=console
X
systemctl daemon-reload
systemctl start manager.service
"""

# `python -c PLAY TESTS MODULE FUNCTION ARGUMENTS...`
_PLAY = """
import asyncio, importlib, sys
sys.path.insert(0, sys.argv[1])
asyncio.run(getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:]))
"""


@functools.cache
def unavailable() -> str:
    """Return why this machine cannot have a private systemd; empty when it can."""
    if os.geteuid() != 0:
        return "a private systemd needs root"
    if not _SYSTEMD:
        return "there is no systemd here"
    if missing := [name for name in _PROGRAMS if not shutil.which(name)]:
        return f"a private systemd needs {', '.join(missing)}"
    cgroup = None
    try:
        cgroup = _new_cgroup()
        script = "mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
        command = ["unshare", "--fork", *_NAMESPACES, "sh", "-c", _ENTER, str(cgroup), "sh", "-c", script]
        tried = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a private systemd cannot be had: {error}"
    finally:
        if cgroup:
            _remove_cgroup(cgroup)
    return f"namespaces are refused: {' '.join(tried.stderr.split())}" if tried.returncode else ""


class PrivateSystemd:
    """One booted systemd; `folder` is where it may write, and has to be short: there is a socket in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "h"
        self.environment = {
            "PATH": os.environ["PATH"],
            "OUTLIVE_HOME": str(self.home),
            "HOME": str(folder),
            "SHELL": "/bin/sh",
            "LANG": "C.UTF-8",
            # Ours, not inherited: only the units in /etc/systemd/system exist, for `systemctl` too.
            "SYSTEMD_UNIT_PATH": "/etc/systemd/system",
        }
        self._cgroup = _new_cgroup()
        self._pid = 0
        self._log = folder / "systemd.log"
        master, console = pty.openpty()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as up,
            self._log.open("ab") as log,
            open(master, "rb") as said,
            open(console, "rb") as console_file,
        ):
            # It ends, with an error, when the console is closed for good.
            self._logger = subprocess.Popen(["cat"], stdin=said, stdout=log, stderr=subprocess.DEVNULL)
            up.bind(str(folder / "up"))
            boot = ["sh", "-euc", _BOOT, str(folder), _SYSTEMD, os.ttyname(console_file.fileno())]
            command = [
                "unshare",
                "--fork",
                "--kill-child",
                *_NAMESPACES,
                "sh",
                "-c",
                _ENTER,
                str(self._cgroup),
                *boot,
            ]
            # With whoever runs the tests it dies too.
            self._unshare = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                self._wait_until_up(up)
            except BaseException:
                self.close()
                raise

    def _wait_until_up(self, up: socket.socket) -> None:
        ended = os.pidfd_open(self._unshare.pid)
        try:
            poll = select.poll()
            poll.register(up, select.POLLIN)
            poll.register(ended, select.POLLIN)
            said = b""
            while b"READY=1" not in said.split(b"\n"):
                ready = [fd for fd, _ in poll.poll(PATIENCE * 1000)]
                assert ready == [up.fileno()], f"systemd did not boot: {self.log()}"
                said = up.recv(4096)
        finally:
            os.close(ended)
        (self._pid,) = _children_of(self._unshare.pid)

    def start_user_manager(self) -> None:
        """Start a manager as a login has one; from then on commands find it."""
        self.run("sh", "-euc", _USER, str(self.folder), _SYSTEMD)
        self.environment |= {
            "XDG_RUNTIME_DIR": f"{self.folder}/runtime",
            "XDG_CONFIG_HOME": f"{self.folder}/config",
            "SYSTEMD_UNIT_PATH": f"{self.folder}/config/systemd/user",
        }

    def log(self) -> str:
        """Return what systemd has said so far."""
        return self._log.read_text(errors="replace")

    def run(
        self, *words: str | Path, environment: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, to its end; unless `check` says otherwise it has to succeed."""
        enter = ["nsenter", "--target", str(self._pid), "--pid", "--mount", "--cgroup", "--uts", "--ipc", "--"]
        done = subprocess.run(
            [*enter, *words],
            env={**self.environment, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2 * PATIENCE,
        )
        assert not (check and done.returncode), f"{words}: {done.stderr}\n{done.stdout}\n{self.log()}"
        return done

    def outlive(self, *words: str, told: str = "") -> Any:
        """Run the command line inside and return what it prints with `--json`.

        `told`: it has to fail, with a message of one line that has this in it.
        """
        *command, options = (*words[:2], words[2:]) if words[0] == "broker" else (words[0], words[1:])
        done = self.run(OUTLIVE, *command, "--json", *options, check=not told)
        if not told:
            return json.loads(done.stdout)
        assert done.returncode == 1, done
        assert told in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        return None

    def play(self, scene: Callable[..., Coroutine[Any, Any, None]], *arguments: str) -> None:
        """Run an async function of a test module beside this one inside, in a process of its own."""
        module = f"end_to_end.{scene.__module__.rpartition('.')[2]}"
        self.run(sys.executable, "-P", "-c", _PLAY, str(_TESTS), module, scene.__name__, *arguments)

    def close(self) -> None:
        """End it with all that runs inside, and see it gone."""
        for pid in _children_of(self._unshare.pid):  # PID 1: when that is reaped, nothing is left in there
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not self._pid:
            self._unshare.kill()
        self._unshare.wait(PATIENCE)
        self._logger.wait(PATIENCE)
        _remove_cgroup(self._cgroup)


def _children_of(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _new_cgroup() -> Path:
    """Return a new cgroup below our own; raises `OSError` where we may not have one."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            root, mounted = fields[3], Path(fields[4])
            break
    else:
        raise OSError("no cgroup2 is mounted")
    (ours,) = (
        line.removeprefix("0::") for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
    )
    cgroup = mounted / os.path.relpath(ours, root) / f"outlive-test-{os.urandom(4).hex()}"
    cgroup.mkdir()
    return cgroup


def _remove_cgroup(cgroup: Path) -> None:
    for folder, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(folder)
