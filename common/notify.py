"""What keeper, broker and spawner tell each other: datagrams of NAME=value lines, and descriptors with some.

The words are those of systemd's notification protocol, so that the keeper can pass them up as they are.

    to the keeper      FDSTORE=1 FDNAME=… FDPOLL=0    with descriptors: keep them under this name
                       FDSTOREREMOVE=1 FDNAME=…       close what is kept under it
                       READY=1                        this broker takes requests
                       STOPPING=1                     this broker ends because it is wanted to
                       MAINPID=…                      this process is the broker from now on
                       FORWARD=1 FDNAME=…             ours: hand what is kept under it to the broker of now
    to the broker      FDNAME=…                       with descriptors: what was to be forwarded
                       ORPHAN=… START=… STATUS=…      ours: how an adopted process ended: pid, start time in clock
                                                      ticks since boot, wait status

A started broker gets what is kept as `LISTEN_FDS` descriptors from 3 on, named in `LISTEN_FDNAMES`.

Standard library only: the keeper lives on this.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from .names import SocketPath

if TYPE_CHECKING:
    from pathlib import Path

# The environment variable with the path of the keeper's socket (in the keeper: of systemd's).
ADDRESS = "NOTIFY_SOCKET"
# Set by the keeper for its children when systemd stands behind it: systemd's own such path.
UNIT = "OUTLIVE_UNIT"
# Bytes of one datagram: a few short lines.
DATAGRAM_MAX = 1024
# Descriptors in one datagram: the kernel's SCM_MAX_FD.
DESCRIPTORS_MAX = 253
# Characters of a descriptor's name.  All names of a store have to fit into one variable of 128 KiB.
NAME_MAX = 12
# Descriptors in a store: 10,000 times a name and a colon is what such a variable takes.
STORE_MAX = 10_000
# Plain numbers: the flags are enumerations, whose | is Python.
_CUT = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)
# Seconds that a keeper may take to make room in its queue of ten datagrams; it needs microseconds for one.
SEND_DEADLINE = 5.0

Fields = Mapping[str, str]


def name_of(mark: str) -> str:
    """Return the name under which the descriptors of the process with this mark are kept."""
    return mark[:NAME_MAX]


def encode(fields: Fields) -> bytes:
    """Return the bytes of a datagram."""
    return "\n".join(f"{name}={value}" for name, value in fields.items()).encode()


def decode(raw: bytes) -> dict[str, str]:
    """Understand a datagram; a line that is none is left out, as systemd does."""
    lines = raw.decode("utf-8", "replace").split("\n")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def send(to: socket.socket, fields: Fields, fds: Sequence[int] = (), address: str | None = None) -> None:
    """Send one datagram; the descriptors stay the caller's.  Raises `OSError`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    if address is None:
        to.sendmsg([encode(fields)], rights, socket.MSG_NOSIGNAL)
    else:
        # systemd writes an abstract name with an @.
        to.sendmsg([encode(fields)], rights, socket.MSG_NOSIGNAL, address.replace("@", "\0", 1))


def receive(at: socket.socket) -> tuple[dict[str, str], list[int], int] | None:
    """Return the next datagram: its fields, its descriptors (now the caller's), and its sender's user id, or -1.

    The user id is the kernel's word, on a socket with `SO_PASSCRED`.  A datagram that was cut short comes without
    fields.  `None`: an empty one, or the end of a connection.
    """
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4) + socket.CMSG_SPACE(12)
    raw, ancillary, flags, _ = at.recvmsg(DATAGRAM_MAX, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    user = -1
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            user = struct.unpack("iii", data)[1]
    if not raw and not fds:
        return None
    return {} if flags & _CUT else decode(raw), list(fds), user


def listen(path: Path) -> socket.socket:
    """Return the keeper's socket at `path`, mode 0600, replacing a stale one; only for the holder of its lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with SocketPath(path) as address:
        listener.bind(address)
    path.chmod(0o600)
    listener.setblocking(False)
    return listener


class Notifier:
    """Tells the keeper, whichever it is at that moment, or nobody; for a program without a loop."""

    def __init__(self) -> None:
        path = os.environ.get(ADDRESS)
        self._path = SocketPath(path) if path else None
        self._socket: socket.socket | None = None

    @property
    def there(self) -> bool:
        """Whether there should be a keeper."""
        return self._path is not None

    def tell(self, fields: Fields, fds: Sequence[int] = ()) -> bool:
        """Send; `False` when there is no keeper, or it takes nothing within `SEND_DEADLINE`."""
        if self._path is None:
            return False
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.settimeout(SEND_DEADLINE)
        try:
            send(self._socket, fields, fds, self._path.text)
        except OSError:  # also TimeoutError
            return False
        return True

    def store(self, mark: str, fds: Sequence[int]) -> bool:
        """Have descriptors of the process with this mark kept."""
        return self.tell(stored(mark), fds)


def stored(mark: str) -> Fields:
    """Return the fields that have descriptors kept: also those of a terminal that has hung up (`FDPOLL`)."""
    return {"FDSTORE": "1", "FDNAME": name_of(mark), "FDPOLL": "0"}


def removed(mark: str) -> Fields:
    """Return the fields that have them closed."""
    return {"FDSTOREREMOVE": "1", "FDNAME": name_of(mark)}


def inherited(first: int) -> dict[str, list[int]]:
    """Return the descriptors that we were started with, by name, and take the variables off.

    They come without close-on-exec; it is set here.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    meant_for = os.environ.pop("LISTEN_PID", "")
    if meant_for and int(meant_for) != os.getpid():
        return {}
    found: dict[str, list[int]] = {}
    for fd, name in zip(range(first, first + count), [*names, *["unknown"] * count], strict=False):
        with suppress(OSError):  # a number that is not open
            os.set_inheritable(fd, False)
            found.setdefault(name, []).append(fd)
    return found
