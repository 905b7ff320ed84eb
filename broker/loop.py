"""The broker's loop: its sockets, its signals, its workers' pidfds.

It accepts peers on the channel (the kernel says who they are), frames on the control socket (the token says who
sent them), watches its workers' pidfds, and waits for adopted orphans.  What to do is decided elsewhere.

Always true
    A worker's channel is read before its frame is acted on: what it deposited first is known first.
    Nothing here waits with a timer while nothing is under way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import zmq

from ..common import channel, ending, kernel, launch, messages, notify, wire
from ..common.channel import Channel, Packet, open_parcel
from ..common.config import Config
from ..common.connection import until_readable
from ..common.errors import BadRequest, DeadlineExceeded, HandoffError, OutliveError, PeerError
from ..common.messages import Body, Register, Reply, Request
from ..common.names import SocketPath
from ..common.outcome import signal_name
from ..common.paths import Paths
from ..common.pump import PUMPS, Pumps
from . import findings
from .delivery import Delivery
from .epochs import Epochs
from .events import Events
from .keeping import Keeping
from .operations import Operations
from .peers import REQUESTS_MAX, Peer
from .succession import Inheritance, Succession, end_of, last_words
from .threads import ThreadManager

# Descriptors kept free: libzmq aborts the process when `accept` meets EMFILE.
RESERVE = 64
# Of those, how many peers may take: whoever comes to a full broker may come to end something.
PEERS_RESERVE = 24
# Seconds that a new connection has for its handshake.
HANDSHAKE_DEADLINE = 10.0
# Seconds between two tries to start a keeper, while there is none.
KEEPER_PAUSE = 5.0
# Seconds that a candidate for an upgrade has until it asks to take over; it has to load the program.
CANDIDATE_DEADLINE = 30.0
# Seconds for what is on its way when we stop: messages, and callbacks of what was written.
_LAST_WORDS = 0.05
# Seconds for what is under way to come to its end, cancelled.
_TASKS_WITHIN = 2.0
# Descriptors that the keeper needs beside what it keeps.
KEEPERS_OWN = 24
# Peers at once: each takes a descriptor or two.
PEERS_MAX = 1000
# What workers say that is taken in after the answers that came with it have been passed on.
_AFTER_ANSWERS = messages.Ended, messages.Collected


class Broker:
    """One broker, from its sockets to its end."""

    def __init__(self, paths: Paths, config: Config, mode: str, inheritance: Inheritance) -> None:
        self._paths = paths
        self._inheritance = inheritance
        self.upgrade_failed = inheritance.failure
        self._successor: Peer | None = None
        self._candidate = 0
        self._keeper_timer: asyncio.TimerHandle | None = None
        self._mode = mode
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._peers: dict[str, Peer] = {}
        self._unknown: dict[Peer, asyncio.TimerHandle] = {}
        self._workers: dict[int, tuple[int, str, int, bool]] = {}
        self._epochs = Epochs(paths.workers)
        self._events = Events(lambda wanted: self.threads.want_deltas(wanted))
        self._stopping = asyncio.Event()
        self._log_fd = paths.open_log()
        self._pumps = Pumps(self._loop)
        self.threads = ThreadManager(self, paths, config, self._pumps, PUMPS[mode])
        self.delivery = Delivery(self, self.threads, config)
        self._operations = Operations(self, self.threads, self.delivery, mode, self._stopping.set)
        self._keeping = Keeping(
            inheritance.line, on_found=self._found, on_orphan=self.threads.orphan_ended, on_lost=self._keeper_lost
        )

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> Succession | None:
        """Serve until told to stop, or until another broker takes over; then return what it is to be handed.

        `on_ready`: called once requests are taken.
        """
        kernel.become_subreaper()
        self._loop.add_signal_handler(signal.SIGCHLD, self.notice_deaths)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._asked_to_end)
        self._control = wire.Port(self._bind(zmq.ROUTER, "control"), self._frames)
        self._events.serve(self._bind(zmq.XPUB, "events"))
        self._expect_survivors()
        self._take_inheritance()
        await self._keeping.hear()  # now the keeper has what we hold, and we what spawners told it
        self.threads.lose_missing()
        if self._keeping.line is None and notify.ADDRESS in os.environ:
            self._keeper_lost()  # while we took over
        # Last: whoever gets through the handshake finds the rest in place.
        self._listener = channel.listen(self._paths.channel)
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self.publish("broker", "", what="up", pid=os.getpid())
        self._keeping.ready()
        on_ready()
        self.delivery.begin()
        await self._stopping.wait()
        if self._successor is None:
            self._keeping.stopping()
        self.publish("broker", "", what="replaced" if self._successor else "down", pid=os.getpid())
        await asyncio.sleep(_LAST_WORDS)  # the last replies and events are on their way
        return await self._close()

    def _bind(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket = wire.new_socket(self._context, kind)
        path = self._paths.run / name
        path.unlink(missing_ok=True)
        with SocketPath(path) as address:
            socket.bind(f"ipc://{address}")
        path.chmod(0o600)
        return socket

    def _asked_to_end(self) -> None:
        """SIGTERM: end if nothing lives, else say why not: a signal must not cost anybody a process.

        Under systemd, which may be about to start us again, everything is left in its store instead.
        """
        if notify.UNIT in os.environ:
            self._stopping.set()
        elif live := len(self.threads.live_entries()):
            self.log(f"asked to end while {live} processes live; use `outlive down --force`")
        else:
            self._stopping.set()

    async def _close(self) -> Succession | None:
        self._loop.remove_signal_handler(signal.SIGCHLD)
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._keeping.listen_no_more()
        self._control.close()  # a request that came now would find workers without channels
        self._events.close()
        for peer in list(self._peers.values()):
            self._take_in(peer)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_TASKS_WITHIN)
            for task in late:
                self.log(f"not ended within {_TASKS_WITHIN:.0f} s: {task}")
        for peer in [*self._peers.values(), *self._unknown]:
            self._loop.remove_reader(peer.channel.fileno())
            peer.close()
        if self._keeper_timer:
            self._keeper_timer.cancel()
        for pidfd in self._workers:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self.delivery.close()
        handles = self.threads.relinquish()
        self._pumps.close()
        await asyncio.sleep(_LAST_WORDS)  # what is on the disk now, the keeper need not keep
        for path in (self._paths.channel, self._paths.control, self._paths.events):
            path.unlink(missing_ok=True)
        self._context.destroy(0)
        os.close(self._log_fd)
        line = self._keeping.let_go()
        if self._successor:
            return Succession(self._successor, handles, line, upgrade=self._successor.pid == self._candidate)
        for left in handles.values():
            left.close()
        if line:
            line.close()
        return None

    def _take_in(self, peer: Peer) -> None:
        """Take in what a peer has deposited by now; what comes later finds it closed, and goes to the keeper."""
        self._loop.remove_reader(peer.channel.fileno())
        with suppress(OSError, PeerError):  # refused, as ever, or the end
            peer.channel.socket.shutdown(socket.SHUT_RD)
            while packet := peer.channel.receive():
                try:
                    self._packet(peer, packet)
                finally:
                    packet.close()

    # What came before us, and what comes after.

    def _take_inheritance(self) -> None:
        """Take up the processes of a former broker."""
        for fds in self._inheritance.found.values():
            self._found(fds)
        for handles in self._inheritance.handed:
            self.threads.found(handles, kept=self._inheritance.kept)

    def _found(self, fds: list[int]) -> None:
        """The keeper has handed us what it keeps of one process."""
        try:
            handles = findings.identify(fds, self.log)
        except PeerError as error:
            self.log(f"{len(fds)} descriptors from the keeper are closed: {error}")
            return
        self.threads.found(handles, kept=True)

    def _keeper_lost(self) -> None:
        """The keeper has died: unless systemd starts the next, we do; its broker will take over from us."""
        if notify.UNIT in os.environ:
            self.log("the keeper has died; systemd starts the next")
            return
        self.log("the keeper has died; starting the next")
        with suppress(OSError):
            launch.launch("outlive.broker.keeper", log=self._log_fd, forsaken=True)
        # A second one finds the lock taken, and ends.
        self._keeper_timer = self._loop.call_later(KEEPER_PAUSE, self._keeper_lost)

    @property
    def keeper_pid(self) -> int | None:
        """The pid of the keeper."""
        line = self._keeping.line
        return kernel.peer_credentials(line)[0] if line else None

    async def upgrade(self) -> str:
        """Start a broker of the installed program, which takes over; return why it did not come up."""
        if self._candidate:
            raise BadRequest("an upgrade is under way; wait for it")
        ready, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        since = end_of(self._paths.log)
        try:
            self._candidate = launch.launch(
                "outlive.broker", [str(launch.FIRST_FD)], fds=[theirs], log=self._log_fd
            )
            os.close(theirs)
            pidfd = os.pidfd_open(self._candidate)
            # Once it asks to take over, it is ours to wait no more.
            came = await until_readable(ready, CANDIDATE_DEADLINE)
            said = os.read(ready, 4096).decode("utf-8", "replace").strip() if came else ""
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            if came:
                return said or f"it died{last_words(self._paths.log, since)}"
            return f"nothing within {CANDIDATE_DEADLINE:.0f} s"
        finally:
            os.close(ready)
            if self._successor is None:
                self._candidate = 0

    # What the threads ask of us.

    def transmit(self, peer: Peer, frame: bytes) -> None:
        """Send a frame to a worker; raises `zmq.ZMQError`."""
        if peer.route is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._control.send([peer.route, frame])

    @property
    def deltas_wanted(self) -> bool:
        """Whether somebody wants output as it comes."""
        return self._events.deltas_wanted

    def publish(self, event: str, thread_id: str, process_id: str | None = None, **fields: Any) -> None:
        """Tell the subscribers."""
        self._events.publish(event, thread_id, process_id, **fields)

    def descriptors_left(self) -> int:
        """Return how many descriptors may still be opened before the reserve.

        Counted, not looked up: /proc/self/fd takes a millisecond when it is full.
        """
        peers = len(self._peers) + len(self._unknown)
        limit = launch.descriptor_limit()
        ours = limit - RESERVE - self.threads.descriptors - 2 * peers - len(self._workers)
        # To start a broker with all of them, the keeper needs two numbers each, and some of its own.
        return min(ours, min(notify.STORE_MAX, limit // 2 - KEEPERS_OWN) - self.threads.descriptors)

    def keep(self, mark: str, fds: Sequence[int]) -> None:
        """Have the keeper keep descriptors of a process."""
        self._keeping.store(mark, fds)

    def unkeep(self, mark: str) -> None:
        """Have the keeper close them."""
        self._keeping.remove(mark)

    async def hear_keeper(self) -> bool:
        """Take in what the keeper was told before now; tell whether we have."""
        return await self._keeping.hear()

    def epoch_is_over(self, thread_id: str, epoch: int) -> bool:
        """Tell whether worker and spawners of an epoch are all dead."""
        return self._epochs.is_over(thread_id, epoch)

    def log(self, text: str) -> None:
        """Write a line to the log; a full disk costs the line, and nothing else."""
        line = f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}\n"
        with suppress(OSError):
            os.write(2, line.encode("utf-8", "backslashreplace"))

    def start_worker(self, thread_id: str, epoch: int) -> int:
        """Start a worker, and watch for its end."""
        arguments = [thread_id, str(epoch), self._mode]
        held = self._epochs.open(thread_id, epoch)
        try:
            pid = launch.launch("outlive.worker", arguments, fds=[held], log=self._log_fd)
        except OSError:
            os.close(held)
            raise
        self._epochs.write(held, pid)
        self._watch_worker(os.pidfd_open(pid), thread_id, epoch, pid, ours=True)
        return pid

    def kill_worker(self, pid: int) -> None:
        """Kill one of our workers, by its pidfd."""
        for pidfd, (worker, *_) in self._workers.items():
            if worker == pid:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    # Workers.

    def _watch_worker(self, pidfd: int, thread_id: str, epoch: int, pid: int, *, ours: bool) -> None:
        self._workers[pidfd] = (pid, thread_id, epoch, ours)
        self._loop.add_reader(pidfd, self._worker_died, pidfd)

    def _worker_died(self, pidfd: int) -> None:
        if pidfd not in self._workers:  # SIGCHLD was first
            return
        pid, thread_id, epoch, ours = self._workers.pop(pidfd)
        self._loop.remove_reader(pidfd)
        how = "gone"
        if ours:
            with suppress(ChildProcessError):
                result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
                if result is not None:
                    exited = result.si_code == os.CLD_EXITED
                    how = f"exit status {result.si_status}" if exited else signal_name(result.si_status)
        os.close(pidfd)
        for peer in list(self._peers.values()):
            if peer.role == "worker" and peer.pid == pid:
                self._read_channel(peer)
        self.threads.worker_died(thread_id, epoch, how)

    def _expect_survivors(self) -> None:
        for survivor in self._epochs.survivors():
            try:
                if survivor.pidfd < 0:
                    self.threads.unfinished(survivor.thread_id, survivor.epoch)
                    continue
                self.threads.expect(survivor.thread_id, survivor.epoch, survivor.pid)
            except OutliveError as error:
                self.log(f"a survivor of {survivor.thread_id} is left alone: {error}")
                continue
            self._watch_worker(survivor.pidfd, survivor.thread_id, survivor.epoch, survivor.pid, ours=False)

    def notice_deaths(self) -> None:
        """SIGCHLD: bury our workers, and reap orphans that came to us; how ours ended is recorded before."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            if any(pid == worker for worker, *_ in self._workers.values()):
                # Its pidfd will tell; until it is reaped there, it hides whoever comes after it here.
                for pidfd, (worker, *_) in list(self._workers.items()):
                    if worker == pid:
                        self._worker_died(pidfd)
                continue
            entry = self.threads.entry_by_pid(pid)
            if entry and entry.transcript:
                # Not reaped yet, so the pid is still its own; we may have no pidfd of it, its spawner being dead.
                pidfd = os.pidfd_open(pid)
                ending.learn(pidfd, entry.transcript)
                os.close(pidfd)
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)

    # The channel.

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self.log(f"accept: {error}")
                return
            try:
                pid = channel.check_user(connection)
                many = len(self._peers) + len(self._unknown)
                full = many >= PEERS_MAX or self.descriptors_left() <= -PEERS_RESERVE
                # Whoever is connected waits for a worker.
                if full and not any(pid == worker for worker, *_ in self._workers.values()):
                    raise PeerError(f"{PEERS_MAX} peers are connected, or no descriptors are left")
            except PeerError as error:
                self.log(f"refused: {error}")
                with suppress(OSError, HandoffError):
                    Channel(connection).send("refused", message=str(error))
                connection.close()
                continue
            peer = Peer(Channel(connection), pid, kernel.peer_pidfd(connection))
            self._unknown[peer] = self._loop.call_later(HANDSHAKE_DEADLINE, self._hang_up, peer)
            self._loop.add_reader(connection.fileno(), self._read_channel, peer)

    def _read_channel(self, peer: Peer) -> None:
        while peer.channel.fileno() >= 0:
            try:
                packet = peer.channel.receive()
                if packet is None:
                    self._hang_up(peer)
                    return
            except BlockingIOError:
                return
            except (PeerError, OSError) as error:
                self.log(f"peer {peer.pid}: {error}; dropped")
                self._hang_up(peer)
                return
            try:
                self._packet(peer, packet)
            except (PeerError, BadRequest) as error:
                self.log(f"peer {peer.pid}: {error}; refused")
                if peer.role is None:
                    with suppress(OSError, HandoffError):
                        peer.channel.send("refused", message=str(error))
                    self._hang_up(peer)
            finally:
                packet.close()

    def _packet(self, peer: Peer, packet: Packet) -> None:
        kind, message = packet.kind, packet.message
        if peer.role is None:
            self._hello(peer, packet)
        elif kind == "deposit" and peer.role == "worker":
            kept = packet.message.get("kept") is True
            self.threads.deposited(peer, open_parcel(packet), kept=kept)
        elif kind == "undeposit" and peer.role == "worker" and message.get("thread") == peer.thread_id:
            self.threads.never_ran(peer.thread_id, str(message.get("process")))
        else:
            raise PeerError(f"packet {kind!r:.40} is not for a {peer.role} to send")

    def _hello(self, peer: Peer, packet: Packet) -> None:
        message = packet.message
        if packet.kind != "hello":
            raise PeerError(f"packet {packet.kind!r:.40} before hello")
        role = message.get("role")
        if role == "successor":
            self._succeed(peer)
            return
        if role == "client":
            token = peer.admit("client")
        elif role == "worker":
            thread_id, epoch = message.get("thread"), message.get("epoch")
            # A list: what the peer sent may be something that cannot be hashed.
            known = [(pid, thread, number) for pid, thread, number, _ in self._workers.values()]
            there = peer.pidfd is not None and kernel.pidfd_pid(peer.pidfd) == peer.pid
            if not there or (peer.pid, thread_id, epoch) not in known:
                raise PeerError(f"process {peer.pid} is not the worker of {thread_id!r:.80} epoch {epoch!r:.20}")
            token = peer.admit("worker", str(thread_id), int(epoch or 0))
        else:
            raise PeerError(f"hello: role {role!r:.40}; use client or worker")
        self._unknown.pop(peer).cancel()
        self._peers[token] = peer
        with suppress(OSError):  # it has died meanwhile; its end of file comes next
            peer.channel.send("welcome", token=token, broker_pid=os.getpid(), protocol=messages.VERSION)

    def _succeed(self, peer: Peer) -> None:
        """Another broker is there to take over: stop serving, for `run` to hand everything over."""
        if self._successor:
            raise PeerError("another broker is about to take over")
        self._unknown.pop(peer).cancel()
        self._loop.remove_reader(peer.channel.fileno())
        self._successor = peer
        self._stopping.set()

    def _hang_up(self, peer: Peer) -> None:
        if peer.channel.fileno() < 0:
            return
        self._loop.remove_reader(peer.channel.fileno())
        self._peers.pop(peer.token, None)
        if timer := self._unknown.pop(peer, None):
            timer.cancel()
        peer.close()
        if peer.role == "worker":
            self.threads.channel_closed(peer)

    # Control.

    def _frames(self, frames: list[bytes]) -> None:
        route = frames[0]
        if not 2 <= len(frames) <= 1 + wire.BATCH_MAX:
            many = PeerError(f"{len(frames) - 1} messages at once; 1 to {wire.BATCH_MAX} are taken")
            self._answer(route, wire.failure(0, many))
            return
        for frame in frames[1:]:
            self._frame(route, frame)

    def _frame(self, route: bytes, frame: bytes) -> None:
        try:
            message = wire.decode(frame)
        except PeerError as error:
            self._answer(route, wire.failure(0, error))
            return
        if isinstance(message, Reply):
            for peer in self._peers.values():
                if peer.role == "worker" and peer.route == route:
                    self._read_channel(peer)
                    peer.answered(message)
                    return
            return
        sender = self._peers.get(message.token)
        if sender is None or not sender.open:
            unknown = PeerError("token: unknown, or its channel is closed; connect again")
            self._refuse(route, message, unknown)
            return
        if sender.route is None:
            sender.route = route
        elif sender.route != route:
            self._refuse(route, message, PeerError("token: belongs to another connection"))
            return
        if sender.role == "worker":
            self._from_worker(sender, message)
        else:
            self._from_client(sender, message)

    def _refuse(self, route: bytes, request: Request, error: PeerError) -> None:
        if request.id:  # an answer without one is about a frame that we could not read
            self._answer(route, wire.failure(request.id, error))

    def _answer(self, route: bytes, reply: Reply) -> None:
        try:
            frame = wire.encode(reply)
        except BadRequest as error:
            frame = wire.encode(wire.failure(reply.id, error))
        with suppress(zmq.ZMQError):  # the caller has gone, or does not read
            self._control.send([route, frame])

    def _from_client(self, peer: Peer, request: Request) -> None:
        assert peer.route is not None
        try:
            body = wire.body_of(request, messages.CLIENT_OPS)
            if request.deadline is not None and kernel.boottime() > request.deadline:
                raise DeadlineExceeded(f"{request.op}: reached the broker after its deadline")
            if isinstance(body, messages.NeverMind):
                if waiting := peer.waits.get(body.request):
                    waiting.cancel()
                return
            if len(peer.tasks) >= REQUESTS_MAX:
                raise BadRequest(f"{REQUESTS_MAX} requests of this client are under way; wait for some")
        except OutliveError as error:
            self._answer(peer.route, wire.failure(request.id, error))
            return
        task = self._loop.create_task(self._serve(peer, request.id, body, request.deadline))
        peer.tasks.add(task)
        task.add_done_callback(peer.tasks.discard)
        if isinstance(body, messages.Wait | messages.ReadOutput):
            peer.waits[request.id] = task
            task.add_done_callback(lambda _: peer.waits.pop(request.id, None))

    async def _serve(self, peer: Peer, number: int, body: Body, deadline: float | None) -> None:
        try:
            if isinstance(body, messages.RecentEvents):
                result: Any = self._events.recent()
            else:
                result = await self._operations.carry_out(body, deadline)
            reply = wire.success(number, result)
        except OutliveError as error:
            reply = wire.failure(number, error)
        except Exception as error:
            import traceback  # nothing of the kind is foreseen

            self.log(f"{type(body).__name__}: {traceback.format_exc()}")
            reply = wire.failure(number, OutliveError(f"{error!r}; see {self._paths.log}"))
        if peer.route is not None:
            self._answer(peer.route, reply)

    def _from_worker(self, peer: Peer, request: Request) -> None:
        self._read_channel(peer)
        if not peer.open:
            return
        try:
            body = wire.body_of(request, messages.FROM_WORKER_OPS)
        except BadRequest as error:
            self.log(f"worker {peer.pid}: {error}")
            return
        if isinstance(body, Register):
            assert peer.route is not None
            self._answer(
                peer.route, wire.success(request.id, self.threads.registered(peer, body.processes, body.starting))
            )
        elif isinstance(body, _AFTER_ANSWERS):
            self._loop.call_soon(self.threads.noticed, peer, body)
        else:
            self.threads.noticed(peer, body)
