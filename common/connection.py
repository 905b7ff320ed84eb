"""One connection to the broker: found, or started; greeted; asked; lost.

    channel    handshake; its end of file is how we learn at once that the broker is gone
    control    ZeroMQ: requests out, replies in

A broker that was killed is started again by its keeper, on the same sockets, in a fraction of a second.  So a
socket that refuses, or hangs up during the handshake, is tried again for a moment before we start anything.

Always true
    Nothing is started while a keeper or a broker holds its lock, unless they do not answer for `BACK_WITHIN`.
    Looking who holds a lock takes none, so that it cannot make a broker that is starting believe it comes second.
    A request that fails with `NotSent` was not done; with `ConnectionError`, it may have been.

Not here
    What can be asked, and what may be asked twice: `client`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from contextlib import suppress
from typing import Any

import zmq

from . import channel, kernel, launch, wire
from .channel import Channel
from .errors import HandoffError, OutliveError, PeerError, Unavailable
from .messages import Body, NeverMind, Reply
from .names import SocketPath
from .paths import Paths
from .unit import installed

# Seconds until a broker that is being started has to answer.
START_DEADLINE = 20.0
_LOOK = 0.01
# Seconds that a broker which is being started again may take before we start one, or give up; and between two
# looks.  A keeper needs about 0.2 s; a busy machine several times that.
BACK_WITHIN = 2.0
_LOOK_FOR_RESTART = 0.02
# Seconds for which nobody must hold a lock before we believe that nobody will start a broker: systemd waits 0.1 s
# before it starts a keeper that was killed.
NOBODY_FOR = 0.2
# The files in the runtime folder that a keeper and a broker lock.
_LOCKS = ("keeper.lock", "lock")
# Seconds that the kernel may take between closing a dying broker's first socket and its last.
_HANG_UP = 2.0


class NotSent(ConnectionError):
    """The broker was lost before the request was on its way: asking again does nothing twice."""


class _HungUp(ConnectionError):
    """The broker closed the channel during the handshake."""


class Connection:
    """One connection to one broker: the channel that vouches for us, the socket for requests."""

    def __init__(self, paths: Paths, context: zmq.Context[zmq.Socket[bytes]], link: Channel, token: str) -> None:
        self.lost = asyncio.Event()
        self._token = token
        self._channel = link
        self._loop = asyncio.get_running_loop()
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = itertools.count(1)
        self._address = SocketPath(paths.control)
        socket = wire.new_socket(context, zmq.DEALER)
        socket.connect(f"ipc://{self._address.text}")
        self._port = wire.Port(socket, self._receive)
        self._loop.add_reader(link.fileno(), self._hung_up)

    async def ask(self, body: Body, seconds: float | None) -> Reply:
        """Return the reply; raises `ConnectionError` when the broker is lost, `TimeoutError` after `seconds`."""
        number = next(self._numbers)
        answer: asyncio.Future[Reply] = self._loop.create_future()
        self._replies[number] = answer
        deadline = None if seconds is None else kernel.boottime() + seconds
        try:
            if self.lost.is_set():
                raise NotSent("the broker has gone")
            request = wire.request(body, id=number, token=self._token, deadline=deadline)
            frame = wire.encode(request)
            try:
                self._port.send([frame])
            except zmq.Again:  # nobody is connected, and the channel will say so; or our queue is full
                await self._until_lost()
                if self.lost.is_set():
                    raise NotSent("the broker has gone") from None
                raise
            async with asyncio.timeout(seconds):
                return await answer
        finally:
            self._replies.pop(number, None)
            if not answer.done() or answer.cancelled():
                self._never_mind(number)
            else:
                answer.exception()  # it may have failed while nobody awaited it yet, which asyncio would report

    def _never_mind(self, number: int) -> None:
        if not self.lost.is_set():
            with suppress(zmq.ZMQError):  # it learns it when we hang up
                self._port.send([wire.encode(wire.request(NeverMind(request=number), token=self._token))])

    async def _until_lost(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_HANG_UP):
                await self.lost.wait()

    def close(self) -> None:
        """Hang up; what is under way fails with `ConnectionError`."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._port.close()
            self._address.close()
        self.lost.set()
        for answer in self._replies.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError("the broker has gone"))

    def _receive(self, frames: list[bytes]) -> None:
        try:
            reply = wire.decode(frames[-1])
            if isinstance(reply, Reply) and reply.id == 0:
                wire.result_of(reply, Any)  # the broker could not read what we had sent
        except OutliveError as error:
            for waiting in self._replies.values():
                if not waiting.done():
                    waiting.set_exception(Unavailable(f"the broker does not understand us, or we not it: {error}"))
            return
        if isinstance(reply, Reply) and (answer := self._replies.get(reply.id)) and not answer.done():
            answer.set_result(reply)

    def _hung_up(self) -> None:
        try:
            packet = self._channel.receive()
        except BlockingIOError:
            return
        except (PeerError, OSError):
            packet = None
        if packet is None:
            self.close()
        else:
            packet.close()


async def open_connection(paths: Paths, context: zmq.Context[zmq.Socket[bytes]], *, start: bool) -> Connection:
    """Return a connection to the broker, which is started if there is none and `start` allows it.

    One that is being started again is waited for, for `BACK_WITHIN` seconds.
    Raises `Unavailable` when there is none, or it does not answer within `START_DEADLINE`.
    """
    until = time.monotonic() + BACK_WITHIN
    while True:
        link = await _reach(paths, start=start)
        try:
            return Connection(paths, context, link, await _greet(paths, link))
        except _HungUp as error:  # it was killed in this moment, or is ending
            link.close()
            if time.monotonic() > until:
                raise Unavailable(f"the broker hangs up during the handshake ({error}); see {paths.log}") from None
            await asyncio.sleep(_LOOK_FOR_RESTART)
        except BaseException:
            link.close()
            raise


async def _reach(paths: Paths, *, start: bool) -> Channel:
    """Return a channel to the broker, which is waited for, then started if need be and allowed."""
    began = held_at = time.monotonic()
    while True:
        try:
            return channel.connect(paths.channel)
        except ConnectionRefusedError:
            refused = True
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            # A folder that cannot be used is told, with its name, when it is prepared.
            refused = False
        now = time.monotonic()
        if _is_held(paths):
            held_at = now
        elif not refused:  # a broker that ends takes its sockets away; one that is killed leaves them
            break
        if now - began > BACK_WITHIN or (start and now - held_at > NOBODY_FOR):
            break
        await asyncio.sleep(_LOOK_FOR_RESTART)
    if not start:
        was = f"; one was killed and is not back within {BACK_WITHIN:.0f} s, see {paths.log}" if refused else ""
        raise Unavailable(f"no broker runs for {paths.run}{was}; `outlive up` starts it")
    deadline = time.monotonic() + START_DEADLINE
    if unit := installed(paths.run):
        if wrong := await asyncio.to_thread(unit.start, START_DEADLINE):
            raise Unavailable(
                f"{unit.path} did not start: {wrong}; see `systemctl {unit.manager} status {unit.name}`"
            )
        said = "ready"
    else:
        said = await asyncio.to_thread(_start_broker, paths)
    if said not in ("ready", "taken", ""):
        raise Unavailable(f"the broker did not start: {said}")
    while time.monotonic() < deadline:
        with suppress(ConnectionRefusedError, FileNotFoundError):
            return channel.connect(paths.channel)
        if not said:
            raise Unavailable(f"the broker ended at its start; see {paths.log}")
        await asyncio.sleep(_LOOK)
    raise Unavailable(f"the broker did not come up within {START_DEADLINE:.0f} s; see {paths.log}")


def _is_held(paths: Paths) -> bool:
    """Tell whether a keeper or a broker has its lock, by the kernel's list; where that cannot tell, it is not."""
    wanted = set()
    for name in _LOCKS:
        with suppress(OSError):
            found = (paths.run / name).stat()
            wanted.add(f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}")
    if not wanted:
        return False
    with suppress(OSError), open("/proc/locks", encoding="ascii", errors="replace") as file:
        return any(not wanted.isdisjoint(line.split()) for line in file)
    return False


async def _greet(paths: Paths, link: Channel) -> str:
    """Shake hands, and return our token."""
    try:
        await link.send_async("hello", role="client", pid=os.getpid())
        # Not in a thread: a caller that gives up would have to wait for it.
        if not await until_readable(link.fileno(), START_DEADLINE):
            raise Unavailable(f"the broker does not answer within {START_DEADLINE:.0f} s; see {paths.log}")
        packet = link.receive()
    except (OSError, HandoffError) as error:
        if isinstance(error, ConnectionError) or isinstance(error.__cause__, ConnectionError):
            raise _HungUp(str(error)) from None
        raise Unavailable(f"the broker does not answer: {error}") from None
    if packet is None:
        raise _HungUp("without a word")
    if packet.kind != "welcome":
        raise Unavailable(f"the broker refused the connection: {packet.message.get('message')}")
    return str(packet.message["token"])


def _start_broker(paths: Paths) -> str:
    """Start a keeper that is nobody's child; return the one line its broker says, empty when it said none."""
    paths.prepare()
    ready, theirs = os.pipe()
    log = paths.open_log()
    try:
        arguments = [str(launch.FIRST_FD)]
        # It will be in another directory, where a relative one would be another.
        home = {"OUTLIVE_HOME": str(paths.config.parent)} if os.environ.get("OUTLIVE_HOME") else {}
        pid = launch.launch("outlive.broker.keeper", arguments, fds=[theirs], log=log, extra=home, forsaken=True)
    finally:
        os.close(theirs)
        os.close(log)
    try:
        os.waitpid(pid, 0)
        return os.read(ready, 4096).decode("utf-8", "replace").strip()
    except ChildProcessError:  # the application waits for all children itself
        return os.read(ready, 4096).decode("utf-8", "replace").strip()
    finally:
        os.close(ready)


async def until_readable(fd: int, seconds: float) -> bool:
    """Wait until `fd` is readable; false after `seconds`."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(seconds):
            await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True
