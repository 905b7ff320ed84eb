"""The nursery: the worker's end of its spawner; one start, from an order to the handles of a process.

The spawner is started when it is first needed, and again when it died.  If it is stuck in a start (a directory
on a dead network mount blocks `chdir` in the kernel), the next start gets a fresh one; the stuck one keeps its
children and its chance.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgpack

from ..common import channel, kernel
from ..common.channel import Channel, Packet, open_parcel, parcel_rows
from ..common.descriptors import Handles
from ..common.errors import HandoffError, PeerError, SpawnError
from ..common.launch import launch
from ..common.transcript import Facts, Lease

# Seconds after which a start counts as stuck.  It takes milliseconds; nothing is killed for being slow, but
# the next start need not wait for it.
STUCK = 2.0


@dataclass(frozen=True, slots=True)
class Order:
    """What the spawner needs for one start."""

    facts: Facts
    environment: dict[bytes, bytes]
    lease: Lease

    def to_memfd(self) -> int:
        """Return a descriptor with the order: an environment may be larger than a packet."""
        lease = self.lease
        raw = msgpack.packb(
            {
                "facts": self.facts.to_bytes(),
                "environment": self.environment,
                "lease": [lease.pid, lease.start_time, lease.epoch],
            }
        )
        fd = kernel.memfd("outlive-order")
        try:
            os.pwrite(fd, raw, 0)
        except BaseException:
            os.close(fd)
            raise
        return fd


@dataclass(slots=True)
class _Start:
    facts: Facts
    since: float
    handles: asyncio.Future[Handles]
    # With whom the spawner deposits.
    broker: Channel | None


@dataclass(slots=True)
class _Spawner:
    pid: int
    channel: Channel
    starts: dict[int, _Start] = field(default_factory=dict)

    @property
    def stuck(self) -> bool:
        return any(time.monotonic() - start.since > STUCK for start in self.starts.values())


class Nursery:
    """All spawners of this worker; usually one."""

    def __init__(
        self, log: Path | None = None, on_orphan: Callable[[Facts], None] = lambda _: None, *, lock: int = -1
    ) -> None:
        """`on_orphan`: told of a start whose end the broker may not know, its spawner or a broker having died.

        `lock`: shows that this epoch is not over; the spawners inherit it.
        """
        self._lock = lock
        self._log = log
        self._on_orphan = on_orphan
        self._numbers = itertools.count(1)
        self._spawners: list[_Spawner] = []
        self._broker: Channel | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def pids(self) -> list[int]:
        """The spawners' pids."""
        return [spawner.pid for spawner in self._spawners]

    def use_broker(self, broker: Channel | None) -> None:
        """Deposit with this broker from now on."""
        self._broker = broker
        for spawner in self._spawners:
            self._introduce(spawner)

    async def start(self, order: Order) -> Handles:
        """Start a command and return its handles, now the caller's; raises `SpawnError`.

        Cancelled, it still runs: the broker has the deposit, and its call id finds it.
        """
        number = next(self._numbers)
        start = _Start(order.facts, time.monotonic(), self._loop.create_future(), self._broker)
        fd = order.to_memfd()
        try:
            while not await self._send(self._spawner(), number, start, fd):
                pass
        finally:
            os.close(fd)
        try:
            handles = await start.handles
        except SpawnError:
            if self._broker is not start.broker:  # the spawner told nobody, or one who is gone
                self._on_orphan(order.facts)
            raise
        if self._broker and self._broker is not start.broker:
            # The spawner had its order before it heard of this broker, and deposited with the former one.
            rows, fds = parcel_rows({(order.facts.thread_id, order.facts.process_id): handles.held()})
            try:
                await self._broker.send_async("deposit", fds, processes=rows)
            except HandoffError:
                pass  # gone as well: the next one gets what it lacks when it is found
            except BaseException:
                handles.close()
                raise
        return handles

    async def _send(self, spawner: _Spawner, number: int, start: _Start, fd: int) -> bool:
        """Give a spawner an order; `False`: it is dead, and has not had it."""
        spawner.starts[number] = start
        start.broker = self._broker
        try:
            await spawner.channel.send_async("spawn", [fd], number=number)
        except HandoffError as error:
            spawner.starts.pop(number, None)
            if not isinstance(error.__cause__, OSError):
                raise SpawnError(f"the spawner (pid {spawner.pid}) takes no orders: {error}", "spawner") from None
            if spawner in self._spawners:
                self._part_from(spawner)
            return False
        except BaseException:
            spawner.starts.pop(number, None)
            raise
        return True

    def close(self) -> None:
        """Let the spawners finish their starts and end; their children are adopted by the broker."""
        for spawner in list(self._spawners):
            self._hang_up(spawner)
            _refuse(spawner, "the worker is ending; the same call again finds out what became of it")
            _reap_later(spawner.pid, lambda: None)

    def _spawner(self) -> _Spawner:
        for spawner in reversed(self._spawners):
            if not spawner.stuck:
                return spawner
        return self._launch()

    def _launch(self) -> _Spawner:
        ours, theirs = channel.pair()
        log = -1
        if self._log:
            with suppress(OSError):  # a state folder that cannot be written keeps nobody from working
                log = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            lock = [self._lock] if self._lock >= 0 else []
            pid = launch("outlive.worker.spawner", fds=[theirs.fileno(), *lock], log=log)
        except OSError as error:
            ours.close()
            raise SpawnError(f"no spawner: {error.strerror}", "spawner") from error
        finally:
            theirs.close()
            if log >= 0:
                os.close(log)
        spawner = _Spawner(pid, ours)
        self._spawners.append(spawner)
        self._loop.add_reader(ours.fileno(), self._receive, spawner)
        self._introduce(spawner)
        return spawner

    def _introduce(self, spawner: _Spawner) -> None:
        with suppress(HandoffError):  # it has died; its end of file comes next
            spawner.channel.send_patiently("broker", [self._broker.fileno()] if self._broker else None)

    def _receive(self, spawner: _Spawner) -> None:
        while True:
            try:
                packet = spawner.channel.receive()
            except BlockingIOError:
                return
            except (PeerError, OSError):
                packet = None
            if packet is None:
                self._part_from(spawner)
                return
            self._answered(spawner, packet)

    def _answered(self, spawner: _Spawner, packet: Packet) -> None:
        start = spawner.starts.pop(packet.message.get("number", 0), None)
        if packet.kind == "started":
            (handles,) = open_parcel(packet).values()
            if start is None or start.handles.done():
                handles.close()  # nobody waits any more; the broker has its own copies
            else:
                start.handles.set_result(handles)
        elif start and not start.handles.done():
            message = packet.message
            start.handles.set_exception(SpawnError(str(message["message"]), str(message["stage"])))
        packet.close()

    def _part_from(self, spawner: _Spawner) -> None:
        """It is dying: once it is dead, nothing comes of its starts any more."""
        self._hang_up(spawner)

        def dead() -> None:
            for start in spawner.starts.values():
                self._on_orphan(start.facts)
            _refuse(spawner, "the spawner died during the start; the same call again finds out what became of it")

        _reap_later(spawner.pid, dead)

    def _hang_up(self, spawner: _Spawner) -> None:
        self._spawners.remove(spawner)
        self._loop.remove_reader(spawner.channel.fileno())
        spawner.channel.close()


def _refuse(spawner: _Spawner, reason: str) -> None:
    for start in spawner.starts.values():
        if not start.handles.done():
            start.handles.set_exception(SpawnError(reason, "spawner"))


def _reap_later(pid: int, then: Callable[[], None]) -> None:
    """Take the spawner off the process table once it is gone; it may be finishing a start."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        then()
        return
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(pidfd)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        os.close(pidfd)
        then()

    loop.add_reader(pidfd, gone)
