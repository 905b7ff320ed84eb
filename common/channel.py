"""Descriptors between processes: SOCK_SEQPACKET with SCM_RIGHTS, and peers checked by the kernel's word.

One packet is one msgpack map and the descriptors it speaks of:

    key      for
    v        version of the protocol: 1
    kind     hello | welcome | refused | parcel | …
    fds      how many descriptors come along; fewer than promised means that the kernel cut them off
    …        what the kind needs

Packets are sent whole or not at all, and stay in the queue when their sender dies: a parcel that was accepted
needs no reply.

Always true
    A received descriptor is close-on-exec, and is in exactly one returned list, or closed.
    A packet that is cut short, too large, or not understood is refused whole with `PeerError`.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

import msgpack

from . import kernel
from .descriptors import ROLES, Handles
from .errors import HandoffError, PeerError, shown
from .names import SocketPath

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1
# Bytes of one packet's map.  Larger ones meet EMSGSIZE at the default socket buffer of 208 KiB.
PACKET_MAX = 64 << 10
# Descriptors in one packet: the kernel's SCM_MAX_FD; one more is EINVAL.
DESCRIPTORS_MAX = 253
# Seconds.  A packet takes microseconds; a peer that is stopped, or a machine that swaps, may need more, and
# nobody must lose a child for that.
SEND_DEADLINE = 5.0
# Plain numbers: the flags are enumerations, whose | is Python.
_CUT = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)
# Seconds before descriptors are sent again when too many of this user's are in flight.
_IN_FLIGHT_PAUSE = 0.002


class Packet:
    """One received packet; whoever takes `fds` out of it owns them."""

    __slots__ = ("fds", "message")

    def __init__(self, message: dict[str, Any], fds: list[int]) -> None:
        self.message = message
        self.fds = fds

    @property
    def kind(self) -> str:
        """What the packet is."""
        return str(self.message["kind"])

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class Channel:
    """One end of a descriptor channel; owns its socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection

    def fileno(self) -> int:
        """Return the socket's number, for a poller."""
        return self.socket.fileno()

    def send(self, kind: str, fds: list[int] | None = None, **fields: Any) -> None:
        """Send one packet now; raises `BlockingIOError` when the queue is full.

        The descriptors stay the caller's.  Raises `HandoffError` for a packet that can never be sent.
        """
        raw = pack(kind, len(fds or ()), **fields)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([raw], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise BlockingIOError(errno.EAGAIN, "too many descriptors in flight") from error
            raise

    def send_patiently(self, kind: str, fds: list[int] | None = None, **fields: Any) -> None:
        """Send one packet, waiting for room; raises `HandoffError` after `SEND_DEADLINE` or when cut off."""
        deadline = time.monotonic() + SEND_DEADLINE
        while True:
            try:
                return self.send(kind, fds, **fields)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HandoffError(f"{kind}: not accepted within {SEND_DEADLINE:.0f} s") from None
                # Room is not all that may be missing: with too many descriptors in flight the socket is writable.
                time.sleep(_IN_FLIGHT_PAUSE)
            except OSError as error:
                raise HandoffError(f"{kind}: {error.strerror}") from error

    async def send_async(self, kind: str, fds: list[int] | None = None, **fields: Any) -> None:
        """Like `send_patiently`, for a loop."""
        import asyncio  # late: the spawner uses this module and must stay light

        deadline = time.monotonic() + SEND_DEADLINE
        while True:
            try:
                return self.send(kind, fds, **fields)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HandoffError(f"{kind}: not accepted within {SEND_DEADLINE:.0f} s") from None
                await asyncio.sleep(_IN_FLIGHT_PAUSE)
            except OSError as error:
                raise HandoffError(f"{kind}: {error.strerror}") from error

    def receive(self) -> Packet | None:
        """Return the next packet, `None` at end of file; raises `BlockingIOError` when there is none yet.

        Raises `PeerError` for a packet that is refused; its descriptors are closed.
        """
        space = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
        try:
            raw, ancillary, flags, _ = self.socket.recvmsg(PACKET_MAX, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            # Said once, and first, when the peer died before it had read everything from us.  What it had sent is
            # still in the queue: a deposit, perhaps.
            raw, ancillary, flags, _ = self.socket.recvmsg(PACKET_MAX, space, socket.MSG_CMSG_CLOEXEC)
        fds = _descriptors(ancillary)
        if not raw:
            _close(fds)
            return None
        try:
            if flags & _CUT:
                raise PeerError(f"packet cut short: {len(raw)} bytes and {len(fds)} descriptors arrived")
            message = unpack(raw)
            if message["fds"] != len(fds):
                raise PeerError(f"packet promises {message['fds']} descriptors and carries {len(fds)}")
        except PeerError:
            _close(fds)
            raise
        return Packet(message, fds)

    def receive_within(self, seconds: float) -> Packet | None:
        """Wait for the next packet; `None` at end of file, `TimeoutError` when none came."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while True:
            try:
                return self.receive()
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    raise TimeoutError(f"no packet within {seconds:.1f} s") from None

    def close(self) -> None:
        """Close our end."""
        self.socket.close()


def pack(kind: str, fds: int = 0, **fields: Any) -> bytes:
    """Return a packet's bytes; raises `HandoffError` when they would not fit into one packet."""
    raw: bytes = msgpack.packb({"v": VERSION, "kind": kind, "fds": fds, **fields})
    if len(raw) > PACKET_MAX or fds > DESCRIPTORS_MAX:
        raise HandoffError(
            f"{kind}: {len(raw)} bytes and {fds} descriptors; one packet takes {PACKET_MAX} and {DESCRIPTORS_MAX}"
        )
    return raw


def unpack(raw: bytes) -> dict[str, Any]:
    """Understand a packet's bytes, or raise `PeerError`."""
    try:
        message = msgpack.unpackb(raw, strict_map_key=True, ext_hook=_refuse_extension, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise PeerError(f"packet of {len(raw)} bytes is not msgpack: {error!r}") from None
    if not isinstance(message, dict):
        raise PeerError(f"packet is a {type(message).__name__}, not a map")
    for name, wanted in (("v", int), ("kind", str), ("fds", int)):
        if not isinstance(message.get(name), wanted):
            raise PeerError(f"packet field {name!r} is {shown(message.get(name))}, not of type {wanted.__name__}")
    return message


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


# Parcels: the descriptors of one or several processes.


def parcel_rows(handles: dict[tuple[str, str], dict[str, int]]) -> tuple[list[list[Any]], list[int]]:
    """Return what a parcel says and carries: rows of [thread, process, roles], and the descriptors."""
    rows = [[thread, process, list(held)] for (thread, process), held in handles.items()]
    return rows, [fd for held in handles.values() for fd in held.values()]


def parcels(handles: dict[tuple[str, str], dict[str, int]]) -> list[dict[tuple[str, str], dict[str, int]]]:
    """Split the descriptors of many processes into parcels that one packet can carry each."""
    result: list[dict[tuple[str, str], dict[str, int]]] = []
    room = 0
    for key, held in handles.items():
        if not result or room < len(held):
            result.append({})
            room = DESCRIPTORS_MAX
        result[-1][key] = held
        room -= len(held)
    return result


def open_parcel(packet: Packet) -> dict[tuple[str, str], Handles]:
    """Return the handles in a parcel, now the caller's; raises `PeerError`, closing all, if they do not fit."""
    try:
        rows = [(thread, process, list(roles)) for thread, process, roles in packet.message["processes"]]
        named = [role for _, _, roles in rows for role in roles]
        if (
            len(named) != len(packet.fds)
            or any(role not in ROLES for role in named)
            or any(type(name) is not str for thread, process, _ in rows for name in (thread, process))
            or len({(thread, process) for thread, process, _ in rows}) != len(rows)
            or any(len(set(roles)) != len(roles) for _, _, roles in rows)
        ):
            raise PeerError(f"parcel carries {len(packet.fds)} descriptors and does not name each of them once")
    except (KeyError, TypeError, ValueError) as error:
        packet.close()
        raise PeerError(f"parcel not understood: {error!r}") from None
    except PeerError:
        packet.close()
        raise
    fds = iter(packet.fds)
    opened = {(thread, process): Handles({role: next(fds) for role in roles}) for thread, process, roles in rows}
    packet.fds.clear()
    return opened


# Sockets by path.


def listen(path: Path) -> socket.socket:
    """Return a listening channel socket at `path`, mode 0600, replacing a stale one.

    Only for the holder of the runtime folder's lock: a second bind would steal a live path.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with SocketPath(path) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path) -> Channel:
    """Return a channel to the broker that listens at `path`; raises `OSError` when none does.

    Raises `PeerError` when it belongs to another user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with SocketPath(path) as address:
            connection.connect(address)
        check_user(connection)
    except BaseException:
        connection.close()
        raise
    return Channel(connection)


def check_user(connection: socket.socket) -> int:
    """Return the peer's pid if it is of our own user, by the kernel's word; else raise `PeerError`."""
    pid, uid = kernel.peer_credentials(connection)
    if uid != os.getuid():
        raise PeerError(f"peer {pid} is of user {uid}; only user {os.getuid()} is served")
    return pid


def pair() -> tuple[Channel, Channel]:
    """Return two connected ends."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(first), Channel(second)
