"""The link: a worker's connection to its broker, which may die and come back; the worker stays.

    channel    handshake (yields the token), deposits out, parcels in
    control    ZeroMQ: requests in, replies and notices out

When the channel reaches its end of file the broker is gone: the worker keeps pumping and serving what it has,
tries again for ever, at first quickly, then with growing pauses, registers, and deposits what a new broker lacks.

Always true
    Nothing is queued for a broker that is away; what it must know is in the headers, and told at registration.
    A reply goes to the broker that asked, and to no other.
    Parcels that no message claims are closed after `UNCLAIMED` seconds: the broker still has its copies.
"""

from __future__ import annotations

import asyncio
import secrets
import select
from collections.abc import Callable
from contextlib import suppress

import zmq

from ..common import channel, wire
from ..common.channel import Channel, Packet, open_parcel, parcel_rows, parcels
from ..common.descriptors import Handles
from ..common.errors import HandoffError, OutliveError, PeerError
from ..common.messages import Body, Register, Reply, Request, Welcome
from ..common.names import SocketPath
from ..common.paths import Paths

# Seconds between two attempts to reach a broker while it is likely to be back in a moment (a keeper starts one anew
# in a fraction of a second, and callers wait), for how long that is, and the longest pause afterwards.
FIRST_PAUSE = 0.02
BACK_WITHIN = 2.0
LONGEST_PAUSE = 5.0
# Seconds that a broker has for the handshake and for the answer to a registration.
HANDSHAKE_DEADLINE = 10.0
# Seconds after which descriptors that nobody asked for are closed.
UNCLAIMED = 60.0
_SEND_PAUSE = 0.002


class Link:
    """One worker's link.  The callbacks are called from the loop."""

    def __init__(
        self,
        paths: Paths,
        thread_id: str,
        epoch: int,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        on_request: Callable[[Request], None],
        on_connected: Callable[[Channel, Welcome], None],
        on_lost: Callable[[], None],
        deposits: Callable[[], dict[tuple[str, str], dict[str, int]]],
        starting: Callable[[], list[str]],
    ) -> None:
        self._paths = paths
        self._thread_id = thread_id
        self._epoch = epoch
        self._context = context
        # Counts the connections: a request is answered on its own, since the next broker counts requests anew.
        self.connection = 0
        self._on_request = on_request
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._deposits = deposits
        self._starting = starting
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._port: wire.Port | None = None
        self._address: SocketPath | None = None
        self._token = ""
        self._registered: asyncio.Future[Welcome] | None = None
        self._parcels: dict[str, tuple[dict[tuple[str, str], Handles], asyncio.TimerHandle]] = {}
        self._outgoing: list[bytes] = []
        # What the present broker has had from us at the connection.
        self._deposited: set[tuple[str, str]] = set()
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Connect, and connect again whenever the broker was lost; raises `PeerError` when it refuses us."""
        pause, since = FIRST_PAUSE, self._loop.time()
        while True:
            try:
                await self._connect()
            except (OSError, TimeoutError, HandoffError):
                self._drop()
            else:
                connected = self._loop.time()
                await self._lost.wait()
                self._drop()
                self._on_lost()
                if self._loop.time() - connected > FIRST_PAUSE:
                    pause, since = FIRST_PAUSE, self._loop.time()
                    continue
                # It hangs up on us as soon as we come.
            await asyncio.sleep(pause)
            if self._loop.time() - since > BACK_WITHIN:
                pause = min(pause * 2, LONGEST_PAUSE)

    def send(self, body: Body) -> None:
        """Send a notice, if there is a broker to hear it, together with what else is said in this turn."""
        self._transmit(wire.request(body, token=self._token))

    def reply(self, reply: Reply, connection: int) -> None:
        """Send a reply, if the broker that asked, on that `connection`, is still there to hear it.

        A result goes before what was said in this turn, and at once: somebody waits for it, and for nothing else.
        An error may be about what was said.
        """
        if connection == self.connection:
            self._outgoing.insert(len(self._outgoing) if reply.error else 0, wire.encode(reply))
            self._flush()

    def hears(self, connection: int) -> bool:
        """Tell whether the broker of that connection is there, by the kernel: the loop may learn it later."""
        if connection != self.connection or self._channel is None or self._port is None:
            return False
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLRDHUP)
        return not poll.poll(0)

    def claim(self, tickets: list[str]) -> dict[tuple[str, str], Handles]:
        """Return the parcels with these tickets, now the caller's; raises `HandoffError` for a missing one."""
        self._receive_parcels()
        missing = [ticket for ticket in tickets if ticket not in self._parcels]
        if missing:
            raise HandoffError(f"parcels {', '.join(missing)} have not arrived")
        claimed: dict[tuple[str, str], Handles] = {}
        for ticket in tickets:
            parcel, expiry = self._parcels.pop(ticket)
            expiry.cancel()
            claimed |= parcel
        return claimed

    def close(self) -> None:
        """Hang up."""
        self._drop()

    async def _connect(self) -> None:
        self._lost.clear()
        link = channel.connect(self._paths.channel)
        self._channel = link
        await link.send_async("hello", role="worker", thread=self._thread_id, epoch=self._epoch)
        answer = await self._first_packet(link)
        if answer.kind != "welcome":
            raise PeerError(f"the broker refused this worker: {answer.message.get('message')}")
        self._token = str(answer.message["token"])
        self._loop.add_reader(link.fileno(), self._receive_parcels)
        self._deposited.clear()
        await self._deposit(link)
        self._open_control()
        self._registered = self._loop.create_future()
        held = sorted(process_id for _, process_id in self._deposits())
        register = Register(processes=held, starting=self._starting())
        self._transmit(wire.request(register, id=1, token=self._token))
        async with asyncio.timeout(HANDSHAKE_DEADLINE):
            welcome = await self._registered
        self._on_connected(link, welcome)
        await self._deposit(link)  # what was started since, while the spawner knew no broker

    async def _deposit(self, link: Channel) -> None:
        """Deposit what this broker has not had from us yet; numbers are looked up anew after each pause."""
        async with asyncio.timeout(HANDSHAKE_DEADLINE):
            while new := {key: held for key, held in self._deposits().items() if key not in self._deposited}:
                parcel = parcels(new)[0]
                rows, fds = parcel_rows(parcel)
                try:
                    link.send("deposit", fds, processes=rows)
                except BlockingIOError:
                    await asyncio.sleep(_SEND_PAUSE)
                    continue
                self._deposited |= set(parcel)

    async def _first_packet(self, link: Channel) -> Packet:
        arrived = self._loop.create_future()
        self._loop.add_reader(link.fileno(), lambda: None if arrived.done() else arrived.set_result(None))
        try:
            async with asyncio.timeout(HANDSHAKE_DEADLINE):
                await arrived
        finally:
            self._loop.remove_reader(link.fileno())
        packet = link.receive()
        if packet is None:
            raise ConnectionResetError("the broker hung up")
        return packet

    def _open_control(self) -> None:
        socket = wire.new_socket(self._context, zmq.DEALER)
        self._address = SocketPath(self._paths.control)
        socket.connect(f"ipc://{self._address.text}")
        self._port = wire.Port(socket, self._receive)
        self.connection += 1

    def _transmit(self, message: Request | Reply) -> None:
        if self._port is None:
            return
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(wire.encode(message))
        if len(self._outgoing) == wire.BATCH_MAX:
            self._flush()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if self._port and outgoing:
            with suppress(zmq.ZMQError):
                self._port.send(outgoing)

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames[-1])
        except PeerError:
            return  # a broker that speaks nonsense will be replaced; until then there is nobody to tell
        if isinstance(message, Request):
            self._on_request(message)
        elif self._registered and not self._registered.done():
            try:
                self._registered.set_result(wire.result_of(message, Welcome))
            except OutliveError as error:
                self._registered.set_exception(error)

    def _receive_parcels(self) -> None:
        while self._channel:
            try:
                packet = self._channel.receive()
            except BlockingIOError:
                return
            except PeerError:
                continue  # refused whole; the broker still has its copies
            except OSError:
                packet = None
            if packet is None:
                self._loop.remove_reader(self._channel.fileno())
                self._lost.set()
                return
            if packet.kind == "parcel":
                with suppress(PeerError):
                    ticket = str(packet.message.get("ticket", secrets.token_hex(8)))
                    parcel = open_parcel(packet)
                    self._parcels[ticket] = parcel, self._loop.call_later(UNCLAIMED, self._expire, ticket)
            packet.close()

    def _expire(self, ticket: str) -> None:
        parcel, expiry = self._parcels.pop(ticket)
        expiry.cancel()
        for handles in parcel.values():
            handles.close()

    def _drop(self) -> None:
        self._flush()
        if self._port:
            self._port.close()
        if self._address:
            self._address.close()
        if self._channel:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
        self._port = self._channel = self._address = None
        for ticket in list(self._parcels):
            self._expire(ticket)
