"""Messages as bytes, with limits; and a ZeroMQ socket as the loop sees it.

A frame is decoded only within the limits below, then checked into its type.  Whatever is wrong with it is a
`PeerError` that names the field, and costs at most the sender's connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack
import msgspec
import zmq

from .errors import BadRequest, OutliveError, PeerError, SpawnError, from_wire
from .messages import OLDEST, VERSION, Body, Failure, Ops, Reply, Request, op_of

# Bytes of one frame: a command line and environment (2 MiB at most for Linux), or a piece of transcript.
FRAME_MAX = 4 << 20
# Entries of one list or map: more than Linux takes as arguments and variables, of ten bytes each at least, in the
# 2 MiB that it has for them.
ENTRIES_MAX = 250_000
# Messages that may wait for one peer.
QUEUE_MAX = 10_000

# Events that may wait for one subscriber; a slower one sees a jump in their numbers.
EVENTS_MAX = 2000
# Messages in one ZeroMQ message, at most: what was said in one turn of a loop travels together.
BATCH_MAX = 64

# Plain numbers: pyzmq's own are enumerations, and slow to combine.
_NOBLOCK, _EVENTS, _POLLIN = int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)
_NOBLOCK_MORE = _NOBLOCK | int(zmq.SNDMORE)
# What `to_builtins` makes of lists and maps.
_TABLES = (list, dict)

T = TypeVar("T")


def encode(message: Request | Reply) -> bytes:
    """Return a frame; raises `BadRequest` when it would exceed `FRAME_MAX`, or has text that is no Unicode.

    What Python makes of a file name or an argument that is not UTF-8 (`surrogateescape`) travels as it is.
    """
    try:
        raw: bytes = msgpack.packb(
            msgspec.to_builtins(message, builtin_types=(bytes,)), unicode_errors="surrogateescape"
        )
    except UnicodeEncodeError as error:
        raise BadRequest(f"{error.object!r:.80} is no text: it has a lone surrogate") from None
    if isinstance(message, Request):
        for name, value in message.body.items():
            if type(value) in _TABLES and len(value) > ENTRIES_MAX:
                raise BadRequest(f"{message.op}: {name} has {len(value)} entries; at most {ENTRIES_MAX} are sent")
    if len(raw) > FRAME_MAX:
        raise BadRequest(f"message of {len(raw)} bytes; at most {FRAME_MAX} are sent")
    return raw


def decode(frame: bytes) -> Request | Reply:
    """Understand a frame, or raise `PeerError`."""
    if len(frame) > FRAME_MAX:
        raise PeerError(f"frame of {len(frame)} bytes; at most {FRAME_MAX} are read")
    try:
        table = msgpack.unpackb(
            frame,
            strict_map_key=False,
            unicode_errors="surrogateescape",
            max_array_len=ENTRIES_MAX,
            max_map_len=ENTRIES_MAX,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise PeerError(f"frame of {len(frame)} bytes is not msgpack: {error}") from None
    if not isinstance(table, dict):
        raise PeerError(f"frame is a {type(table).__name__}, not a map")
    version = table.get("v")
    if not isinstance(version, int) or not OLDEST <= version <= VERSION:
        raise PeerError(f"field `v` is {version!r:.40}; this side speaks versions {OLDEST} to {VERSION}")
    return convert(table, Request) if "op" in table else convert(table, Reply)


def convert(table: Any, wanted: type[T]) -> T:
    """Check decoded data into `wanted`, or raise `PeerError` with the path of the bad field."""
    try:
        return msgspec.convert(table, wanted, strict=True, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError) as error:
        raise PeerError(str(error)) from None


def body_of(request: Request, known: Ops) -> Body:
    """Return a request's body in its type; raises `BadRequest` for an unknown `op` or a bad field."""
    wanted = known.get(request.op)
    if wanted is None:
        raise BadRequest(f"unknown request {request.op!r}; this side knows {', '.join(sorted(known))}")
    try:
        return convert(request.body, wanted)
    except PeerError as error:
        raise BadRequest(f"{request.op}: {error}") from None


def request(body: Body, *, id: int = 0, token: str = "", deadline: float | None = None) -> Request:
    """Return the request that carries `body`; without `id` it is a notice."""
    table = msgspec.to_builtins(body, builtin_types=(bytes,))
    return Request(v=VERSION, op=op_of(type(body)), body=table, token=token, id=id, deadline=deadline)


def success(id: int, result: Any) -> Reply:
    """Return the reply with a result."""
    return Reply(v=VERSION, id=id, result=msgspec.to_builtins(result, builtin_types=(bytes,)))


def failure(id: int, error: OutliveError) -> Reply:
    """Return the reply that carries `error`."""
    stage = error.stage if isinstance(error, SpawnError) else None
    return Reply(v=VERSION, id=id, error=Failure(kind=error.kind, message=str(error), stage=stage))


def result_of(reply: Reply, wanted: type[T]) -> T:
    """Return a reply's result in its type, or raise the error that it carries."""
    if reply.error is not None:
        raise from_wire(reply.error.kind, reply.error.message, reply.error.stage)
    return convert(reply.result, wanted)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


class Port:
    """A ZeroMQ socket as the loop sees it: frames in by callback, frames out at once.

    ZeroMQ's descriptor is edge-triggered and says only that something has changed; therefore every send is
    followed by a look at what may be received.  An idle port costs no wake-up.
    """

    # Frames taken in before the loop gets its turn.
    BATCH = 64

    def __init__(self, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._fd: int = socket.fileno()
        self._loop.add_reader(self._fd, self._receive)
        self._look_again()

    def send(self, frames: list[bytes]) -> None:
        """Queue one message; raises `zmq.ZMQError` (EAGAIN: queue full, EHOSTUNREACH: peer gone)."""
        for frame in frames[:-1]:
            self._socket.send(frame, _NOBLOCK_MORE)
        self._socket.send(frames[-1], _NOBLOCK)
        self._look_again()

    def close(self) -> None:
        """Close the socket; what is still queued is dropped."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(0)

    def _look_again(self) -> None:
        if not self._scheduled and self._readable():
            self._scheduled = True
            self._loop.call_soon(self._receive)

    def _readable(self) -> bool:
        return not self._socket.closed and bool(int(self._socket.getsockopt(_EVENTS)) & _POLLIN)

    def _receive(self) -> None:
        self._scheduled = False
        for _ in range(self.BATCH):
            if not self._readable():
                return
            self._on_frames(self._socket.recv_multipart(_NOBLOCK))
        self._look_again()


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """Return a socket with our limits and no lingering."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, FRAME_MAX)
    socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
    if kind == zmq.XPUB:
        socket.setsockopt(zmq.SNDHWM, EVENTS_MAX)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if kind in (zmq.DEALER, zmq.SUB):
        # Losing the broker is noticed on the channel; ZeroMQ's own ten attempts a second are wake-ups.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
    return socket
